"""LayerNorm's backward in Triton, with three ways of summing the weight's gradient over the rows.

    x̂ = (x - mean) rstd,  g = w dy,  dx = rstd (g - mean_d(g) - x̂ mean_d(g x̂)),  dw = Σ_rows dy x̂,  db = Σ_rows dy

for rows of D elements: x, dy, dx [R, D] with unit stride in D; w, dw, db [D]; mean, rstd [R] in float32, from the
forward. "partial": each program sums the rows it owns into its own row of partial sums, a second kernel adds these
up; sums are in one order, so results are bitwise equal from run to run. "wide": the same for rows too long for the
registers. "lock": one program per row; rows that share a row of partial sums add to it in turn, under a spin lock.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

import ptxemu
from ptxemu import triton_run

if TYPE_CHECKING:
    from ptxemu import Report
    from ptxemu.gpu import Gpu

LONGEST_ROW = 8192  # elements of a row that one program holds in registers


@triton.jit
def load_row(x, d, D):
    """Elements d of a row in float32, 0 from D on."""
    return tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def normalised(x, d, D, mean, rstd):
    """x̂ of elements d of a row, 0 from D on."""
    return tl.where(d < D, (load_row(x, d, D) - mean) * rstd, 0.0)


@triton.jit
def row_gradient(dx, dy, x, w_d, mean, rstd, d, D):
    """Write dx of one row that is held whole, w_d its weights; its parts of dw and db."""
    x_hat = normalised(x, d, D, mean, rstd)
    dy_d = load_row(dy, d, D)
    g = w_d * dy_d
    along = tl.sum(g * x_hat) / D
    dx_d = (g - tl.sum(g) / D - x_hat * along) * rstd
    tl.store(dx + d, dx_d.to(dx.dtype.element_ty), mask=d < D)
    return dy_d * x_hat, dy_d


@triton.jit
def partial_kernel(
    dx, dy, x, w, mean, rstd, dw_part, db_part, dx_stride, dy_stride, x_stride, R, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows p, p + P, ... of dx for program p of P, and its row p of the partial sums [P, D]."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    w_d = load_row(w, d, D)
    dw_d = tl.zeros([BLOCK_D], tl.float32)
    db_d = tl.zeros([BLOCK_D], tl.float32)
    for row in range(p, R, tl.num_programs(0)):
        dw_row, db_row = row_gradient(
            dx + row * dx_stride, dy + row * dy_stride, x + row * x_stride, w_d,
            tl.load(mean + row), tl.load(rstd + row), d, D,
        )  # fmt: skip
        dw_d += dw_row
        db_d += db_row
    tl.store(dw_part + p * D + d, dw_d, mask=d < D)
    tl.store(db_part + p * D + d, db_d, mask=d < D)


@triton.jit
def wide_kernel(
    dx, dy, x, w, mean, rstd, dw_part, db_part, dx_stride, dy_stride, x_stride, R, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`partial_kernel` in tiles of BLOCK_D columns; row p of the partial sums, 0 at first, is added to in memory."""
    p = tl.program_id(0).to(tl.int64)
    for row in range(p, R, tl.num_programs(0)):
        mean_row = tl.load(mean + row)
        rstd_row = tl.load(rstd + row)
        along = tl.zeros([BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            g = load_row(w, d, D) * load_row(dy + row * dy_stride, d, D)
            along += g * normalised(x + row * x_stride, d, D, mean_row, rstd_row)
            total += g
        mean_along = tl.sum(along) / D
        mean_g = tl.sum(total) / D
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x_hat = normalised(x + row * x_stride, d, D, mean_row, rstd_row)
            dy_d = load_row(dy + row * dy_stride, d, D)
            dx_d = (load_row(w, d, D) * dy_d - mean_g - x_hat * mean_along) * rstd_row
            tl.store(dx + row * dx_stride + d, dx_d.to(dx.dtype.element_ty), mask=d < D)
            add_to(dw_part + p * D, dy_d * x_hat, d, D)
            add_to(db_part + p * D, dy_d, d, D)


@triton.jit
def add_to(row, value, d, D):
    """row[d] += value, for a row that no other program touches meanwhile."""
    value += tl.load(row + d, mask=d < D)
    # Where threads outnumber columns, many load the same element, and one of them stores it.
    tl.debug_barrier()
    tl.store(row + d, value, mask=d < D)


@triton.jit
def lock_kernel(
    dx, dy, x, w, mean, rstd, dw_part, db_part, locks, dx_stride, dy_stride, x_stride, groups, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row of dx per program; it adds to row (row mod groups) of the partial sums while it holds that row's lock.

    Partial sums [groups, D] and locks [groups] are 0 at first.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    w_d = load_row(w, d, D)
    dw_row, db_row = row_gradient(
        dx + row * dx_stride, dy + row * dy_stride, x + row * x_stride, w_d,
        tl.load(mean + row), tl.load(rstd + row), d, D,
    )  # fmt: skip
    group = row % groups
    while tl.atomic_cas(locks + group, 0, 1) == 1:
        pass
    add_to(dw_part + group * D, dw_row, d, D)
    add_to(db_part + group * D, db_row, d, D)
    # Every thread's stores come before the one thread that opens the lock.
    tl.debug_barrier()
    tl.atomic_xchg(locks + group, 0)


@triton.jit
def column_sum_kernel(parts, sums, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """sums[d] = Σ_p parts[p, d], a block of columns per program."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < P) & (d[None, :] < D)
        total += tl.load(parts + p.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(sums + d, tl.sum(total, 0).to(sums.dtype.element_ty), mask=d < D)


KERNELS = {"partial": partial_kernel, "wide": wide_kernel, "lock": lock_kernel}


def layer_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, *,
    way: str = "partial", programs: int = 8, warps: int = 4, block_d: int | None = None, arch: int = 80,
    gpu: Gpu | None = None, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Report]]:  # fmt: skip
    """dx like x, dw and db like w, and the emulator's reports of the three launches.

    programs: rows of partial sums (and, except by lock, programs of the first kernel). block_d: columns of a tile.
    """
    rows, size = x.shape
    dx, dw, db = torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)
    # Only the wide way and the lock add to what they find.
    parts = torch.zeros(2, programs, size) if way != "partial" else torch.empty(2, programs, size)
    kernel, args, options = plan(way, dx, dy, x, w, mean, rstd, parts, block_d)
    grid = (rows if way == "lock" else programs,)
    run: dict[str, Any] = {
        "arch": arch,
        "gpu": gpu,
        "seed": seed,
        "num_warps": warps,
        # Fused into the first step of a sum over lanes, x·y + shuffled(x·y) would be rounded in one lane where it is
        # not in the other, and lanes that hold the same sum would differ in its last bit.
        "enable_fp_fusion": False,
    }
    reports = [triton_run.launch(kernel, grid, *args, **options, **run)]
    for part, total in zip(parts, (dw, db), strict=True):
        args = (part, ptxemu.Output(total), programs, size)
        grid = (triton.cdiv(size, 64),)
        reports.append(
            triton_run.launch(column_sum_kernel, grid, *args, BLOCK_P=16, BLOCK_D=64, **run)
        )
    return dx, dw, db, reports


def plan(
    way: str, dx: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, parts: torch.Tensor, block_d: int | None = None,
) -> tuple[triton.JITFunction, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Kernel, arguments and constants of the first launch; parts [2, P, D]."""
    rows, size = x.shape
    if way != "wide" and size > LONGEST_ROW:
        raise ValueError(f"x: rows of {size}, only the wide way has more than {LONGEST_ROW}")
    sums = tuple(map(ptxemu.Output, parts)) if way == "partial" else tuple(parts)
    tensors = (ptxemu.Output(dx), dy, x, w, mean, rstd, *sums)
    strides = (dx.stride(0), dy.stride(0), x.stride(0))
    if way == "lock":
        groups = parts.shape[1]
        locks = torch.zeros(groups, dtype=torch.int32)
        args = (*tensors, locks, *strides, groups, size)
    else:
        args = (*tensors, *strides, rows, size)
    whole = 1024 if way == "wide" else triton.next_power_of_2(size)
    return KERNELS[way], args, {"BLOCK_D": block_d or whole}
