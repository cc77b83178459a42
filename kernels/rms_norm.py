"""RMSNorm: n = z · rstd with rstd = (mean(z²) + eps)^-1/2, y = n · weight.

Zhang and Sennrich, arXiv:1910.07467. CASTING says how n meets the weight: "llama" rounds n to x's dtype before, "gemma"
multiplies by 1 + weight. Backward, with g = dy · weight (or 1 + weight) and the mean over the D columns:
    dz' = rstd · (g - n · mean(g · n)) + dz,  dweight = Σ_rows dy · n
A row that a program can keep in registers is read once. The kernels named wide are for the others: they go through
a row twice, BLOCK_D columns at a time. Their `width` is D at run time: a loop of known length the assembler unrolls
until registers do not suffice. norm_row.py says what all arguments are.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.norm_row import (
    columns,
    load_parameter,
    load_rows,
    load_statistic,
    load_z,
    product,
    rows_of,
    store_gradients,
    store_rows,
    store_statistic,
    store_sum,
)


@triton.jit
def factor(weight, cols, D: tl.constexpr, CASTING: tl.constexpr):
    """What n is multiplied by, [1, BLOCK_D]."""
    w = load_parameter(weight, cols, D)
    return 1.0 + w if CASTING == "gemma" else w


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "rows", "key0", "key1", "threshold"])
def rms_norm_kernel(
    x, residual, weight, y, z, rstd, x_stride, residual_stride, rows, eps, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, HOLD: tl.constexpr,
    CASTING: tl.constexpr,
):  # fmt: skip
    """y, z [rows, D]; rstd [rows] float32. HOLD: the weight stays in registers from row to row."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    DROP: tl.constexpr = key0 is not None
    cols = columns(BLOCK_D, UNIT)
    if HOLD and weight is not None:
        w = factor(weight, cols, D, CASTING)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = rows_of(block, ROWS)
        t = load_z(source, row, rows, 0, cols, dropout, D, UNIT, DROP)
        if z is not None:
            store_rows(z, t, row, rows, cols, D)
        scale = tl.rsqrt(tl.sum(product(t, t, UNIT), 1) * (1.0 / D) + eps)
        if rstd is not None:
            store_statistic(rstd, scale, row, rows)
        if y is not None:
            t *= scale[:, None]
            if CASTING == "llama":
                t = t.to(x.dtype.element_ty).to(tl.float32)
            if weight is not None:
                t *= w if HOLD else factor(weight, cols, D, CASTING)
            store_rows(y, t, row, rows, cols, D)


@triton.jit(
    do_not_specialize=["x_stride", "residual_stride", "rows", "width", "key0", "key1", "threshold"]
)
def rms_norm_wide_kernel(
    x, residual, weight, y, z, rstd, x_stride, residual_stride, rows, width, eps, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    """The same for wide rows."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    DROP: tl.constexpr = key0 is not None
    for block in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = rows_of(block, 1)
        squares = tl.zeros([1, BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
            if z is not None:
                store_rows(z, t, row, rows, cols, D)
            squares += t * t
        scale = tl.rsqrt(tl.sum(squares, 1) * (1.0 / D) + eps)
        if rstd is not None:
            store_statistic(rstd, scale, row, rows)
        if y is not None:
            for start in range(0, width, BLOCK_D):
                cols = start + columns(BLOCK_D, UNIT)
                t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
                t *= scale[:, None]
                if CASTING == "llama":
                    t = t.to(x.dtype.element_ty).to(tl.float32)
                if weight is not None:
                    t *= factor(weight, cols, D, CASTING)
                store_rows(y, t, row, rows, cols, D)


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "dy_stride", "dz_stride", "rows", "key0", "key1", "threshold"
    ]
)  # fmt: skip
def rms_norm_backward_kernel(
    x, residual, weight, dy, dz, rstd, dx, dresidual, dweight,
    x_stride, residual_stride, dy_stride, dz_stride, rows, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr,
    CASTING: tl.constexpr,
):  # fmt: skip
    """dx, dresidual [rows, D]; dweight [programs, D] float32: the sums of each program's rows.

    x is z itself where the forward kept that: no residual then, and not DROP.
    """
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    cols = columns(BLOCK_D, UNIT)
    if weight is not None:
        w = factor(weight, cols, D, CASTING)
    if dweight is not None:
        weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = rows_of(block, ROWS)
        g = load_rows(dy, dy_stride, row, rows, cols, D, UNIT)
        t = load_z(source, row, rows, 0, cols, dropout, D, UNIT, DROP)
        scale = load_statistic(rstd, row, rows)
        n = t * scale
        if dweight is not None:
            weight_sum += g * n
        if dx is not None or dresidual is not None:
            if weight is not None:
                g *= w
            slope = tl.sum(product(g, n, UNIT), 1)[:, None] * (1.0 / D)
            out = scale * (g - n * slope)
            if dz is not None:
                out += load_rows(dz, dz_stride, row, rows, cols, D, UNIT)
            store_gradients(out, dx, dresidual, row, rows, 0, cols, dropout, D)
    if dweight is not None:
        store_sum(dweight, tl.program_id(0), weight_sum, cols, D)


@triton.jit
def load_terms(
    source, weight, dy, dy_stride, scale, row, rows, start, cols, dropout,
    D: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    """g and n of a stretch of a wide row."""
    g = load_rows(dy, dy_stride, row, rows, cols, D, UNIT)
    if weight is not None:
        g *= factor(weight, cols, D, CASTING)
    return g, load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP) * scale


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "dy_stride", "dz_stride", "rows", "width", "key0", "key1", "threshold"
    ]
)  # fmt: skip
def rms_norm_wide_backward_kernel(
    x, residual, weight, dy, dz, rstd, dx, dresidual,
    x_stride, residual_stride, dy_stride, dz_stride, rows, width, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of wide rows."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    for block in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = rows_of(block, 1)
        scale = load_statistic(rstd, row, rows)
        along = tl.zeros([1, BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            g, n = load_terms(
                source, weight, dy, dy_stride, scale, row, rows, start, cols, dropout, D, UNIT, DROP, CASTING
            )  # fmt: skip
            along += g * n
        slope = tl.sum(along, 1)[:, None] * (1.0 / D)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            g, n = load_terms(
                source, weight, dy, dy_stride, scale, row, rows, start, cols, dropout, D, UNIT, DROP, CASTING
            )  # fmt: skip
            out = scale * (g - n * slope)
            if dz is not None:
                out += load_rows(dz, dz_stride, row, rows, cols, D, UNIT)
            store_gradients(out, dx, dresidual, row, rows, start, cols, dropout, D)
