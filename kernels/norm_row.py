"""The steps that the kernels of LayerNorm and RMSNorm share: rows in and out, z, sums for the parameters' gradients.

A tile is [ROWS, BLOCK_D]: so many rows of D columns, or a stretch of one row that is wider than a tile. Tensors are
[rows, D] with unit stride in D. Strides of rows are run-time integers in units of UNIT elements, as many as one lane
reads together: 16 bytes of the widest tensor, fewer where D or a stride is no multiple of that.

source: (x, residual, their strides), what z is made of. dropout: two words of the key, the least 24-bit number that is
kept, and 1 / (1 - p). What is None isn't there.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.tiles import keep_tile, wide


@triton.jit
def columns(BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    """0 to BLOCK_D; a lane takes UNIT neighbours and no more, so that tensors of two widths are both coalesced."""
    return tl.max_contiguous(tl.arange(0, BLOCK_D), UNIT)


@triton.jit
def rows_of(block, ROWS: tl.constexpr):
    """The 64-bit indices of a block's rows."""
    return wide(block) * ROWS + tl.arange(0, ROWS)


@triton.jit
def load_rows(base, stride, row, rows, cols, D: tl.constexpr, UNIT: tl.constexpr):
    """The tile of a tensor in float32, 0 outside of its rows and columns."""
    # (BLOCK_D - D) % BLOCK_D is D % BLOCK_D in the form that Triton's interpreter computes, too.
    pointers = base + (row * stride * UNIT)[:, None] + cols[None, :]
    ROWS: tl.constexpr = row.shape[0] > 1
    COLS: tl.constexpr = (cols.shape[0] - D) % cols.shape[0] != 0
    if ROWS and COLS:
        t = tl.load(pointers, mask=(row[:, None] < rows) & (cols[None, :] < D), other=0.0)
    elif ROWS:
        t = tl.load(pointers, mask=row[:, None] < rows, other=0.0)
    elif COLS:
        t = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        t = tl.load(pointers)
    return t.to(tl.float32)


@triton.jit
def store_rows(base, t, row, rows, cols, D: tl.constexpr):
    """Write the tile t to a contiguous tensor, rounded to its dtype."""
    pointers = base + (row * D)[:, None] + cols[None, :]
    t = t.to(base.dtype.element_ty)
    ROWS: tl.constexpr = row.shape[0] > 1
    COLS: tl.constexpr = (cols.shape[0] - D) % cols.shape[0] != 0
    if ROWS and COLS:
        tl.store(pointers, t, mask=(row[:, None] < rows) & (cols[None, :] < D))
    elif ROWS:
        tl.store(pointers, t, mask=row[:, None] < rows)
    elif COLS:
        tl.store(pointers, t, mask=cols[None, :] < D)
    else:
        tl.store(pointers, t)


@triton.jit
def load_parameter(base, cols, D: tl.constexpr):
    """A parameter [D] as [1, BLOCK_D] in float32."""
    if (cols.shape[0] - D) % cols.shape[0] != 0:
        t = tl.load(base + cols, mask=cols < D, other=0.0)
    else:
        t = tl.load(base + cols)
    return t.to(tl.float32)[None, :]


@triton.jit
def keep(row, start, dropout, BLOCK_D: tl.constexpr):
    """Dropout's mask of the columns from `start` on, counted by (0, 0, row, column)."""
    zero = wide(0)
    return keep_tile(
        zero, zero, row.to(tl.int32), start, dropout[0], dropout[1], dropout[2], BLOCK_D
    )


@triton.jit
def load_z(
    source, row, rows, start, cols, dropout, D: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr
):
    """z = dropout(x) + residual, rounded to its dtype. start: the first of cols. DROP: there is dropout to do."""
    z = load_rows(source[0], source[2], row, rows, cols, D, UNIT)
    if DROP:
        z = tl.where(keep(row, start, dropout, cols.shape[0]), z * dropout[3], 0.0)
    if source[1] is not None:
        z += load_rows(source[1], source[3], row, rows, cols, D, UNIT)
        z = z.to(source[1].dtype.element_ty).to(tl.float32)
    elif DROP:
        z = z.to(source[0].dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def store_gradients(dz, dx, dresidual, row, rows, start, cols, dropout, D: tl.constexpr):
    """Write dz to dresidual, and through dropout to dx."""
    if dresidual is not None:
        store_rows(dresidual, dz, row, rows, cols, D)
    if dx is not None:
        if dropout[0] is not None:
            dz = tl.where(keep(row, start, dropout, cols.shape[0]), dz * dropout[3], 0.0)
        store_rows(dx, dz, row, rows, cols, D)


@triton.jit
def load_statistic(base, row, rows):
    """mean or rstd of the rows as [ROWS, 1]; 0 beyond them."""
    if row.shape[0] > 1:
        s = tl.load(base + row, mask=row < rows, other=0.0)
    else:
        s = tl.load(base + row)
    return s[:, None]


@triton.jit
def store_statistic(base, s, row, rows):
    if row.shape[0] > 1:
        tl.store(base + row, s, mask=row < rows)
    else:
        tl.store(base + row, s)


@triton.jit
def store_sum(base, program, acc, cols, D: tl.constexpr):
    """Row `program` of [programs, D] float32: the sums of acc over its rows."""
    pointers = base + wide(program) * D + cols
    if (cols.shape[0] - D) % cols.shape[0] != 0:
        tl.store(pointers, tl.sum(acc, 0), mask=cols < D)
    else:
        tl.store(pointers, tl.sum(acc, 0))


@triton.jit
def product(a, b, UNIT: tl.constexpr):
    """a · b, the terms of a sum over a row, in the shape of a.

    Where each lane has one term, lanes swap them and add. Were this addition fused with the product, a lane's own term
    would be exact and the other's rounded, and no two lanes had the same sum.
    """
    if UNIT == 1:
        return tl.fma(a, tl.broadcast_to(b, a.shape), tl.zeros_like(a))
    else:
        return a * b


@triton.jit
def add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit(
    do_not_specialize=[
        "x_stride",
        "residual_stride",
        "dy_stride",
        "rows",
        "key0",
        "key1",
        "threshold",
    ]
)
def parameter_sums_kernel(
    x, residual, dy, mean, rstd, dweight, dbias, x_stride, residual_stride, dy_stride, rows,
    key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Σ_rows dy · n and Σ_rows dy of rows too wide for the backward kernels: dweight, dbias [programs, D] float32.

    Grid: programs, stretches of BLOCK_D columns. mean is None for RMSNorm; x: as in the backward kernels.
    """
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    start = tl.program_id(1) * BLOCK_D
    cols = start + columns(BLOCK_D, UNIT)
    if dweight is not None:
        weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = rows_of(block, ROWS)
        g = load_rows(dy, dy_stride, row, rows, cols, D, UNIT)
        if dweight is not None:
            t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
            if mean is not None:
                t -= load_statistic(mean, row, rows)
            weight_sum += g * (t * load_statistic(rstd, row, rows))
        if dbias is not None:
            bias_sum += g
    if dweight is not None:
        store_sum(dweight, tl.program_id(0), weight_sum, cols, D)
    if dbias is not None:
        store_sum(dbias, tl.program_id(0), bias_sum, cols, D)


@triton.jit
def add_programs(
    sums, out, programs, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[d] = Σ_p sums[p, d] for BLOCK_D columns, always in the same order."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, programs, BLOCK_P):
        acc += load_rows(sums, D, start + rows_of(0, BLOCK_P), programs, cols, D, 1)
    total = tl.sum(acc, 0).to(out.dtype.element_ty)
    if D % BLOCK_D != 0:
        tl.store(out + cols, total, mask=cols < D)
    else:
        tl.store(out + cols, total)


@triton.jit(do_not_specialize=["programs"])
def add_programs_kernel(
    weight_sums, bias_sums, dweight, dbias, programs,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweight, dbias [D], of those that are not None, from the [programs, D] float32 sums of the kernels before."""
    if dweight is not None:
        add_programs(weight_sums, dweight, programs, D, BLOCK_P, BLOCK_D)
    if dbias is not None:
        add_programs(bias_sums, dbias, programs, D, BLOCK_P, BLOCK_D)
