"""LayerNorm: n = (z - mean) · rstd with rstd = (var(z) + eps)^-1/2, y = n · weight + bias.

Ba et al., arXiv:1607.06450. Backward, with g = dy · weight and means over the D columns:
    dz' = rstd · (g - mean(g) - n · mean(g · n)) + dz,  dweight = Σ_rows dy · n,  dbias = Σ_rows dy
A row that a program can keep in registers is read once. The kernels named wide are for the others: they go through
a row twice, BLOCK_D columns at a time. Their `width` is D at run time: a loop of known length the assembler unrolls
until registers do not suffice. norm_row.py says what all arguments are.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.norm_row import (
    add_pairs,
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
def centre(z, mean, cols, D: tl.constexpr):
    """z - mean, 0 beyond column D."""
    if (cols.shape[0] - D) % cols.shape[0] != 0:
        return tl.where(cols[None, :] < D, z - mean[:, None], 0.0)
    else:
        return z - mean[:, None]


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "rows", "key0", "key1", "threshold"])
def layer_norm_kernel(
    x, residual, weight, bias, y, z, mean, rstd, x_stride, residual_stride, rows, eps,
    key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """y, z [rows, D]; mean, rstd [rows] float32. HOLD: weight and bias stay in registers from row to row."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    DROP: tl.constexpr = key0 is not None
    cols = columns(BLOCK_D, UNIT)
    if HOLD and weight is not None:
        w = load_parameter(weight, cols, D)
    if HOLD and bias is not None:
        b = load_parameter(bias, cols, D)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = rows_of(block, ROWS)
        t = load_z(source, row, rows, 0, cols, dropout, D, UNIT, DROP)
        if z is not None:
            store_rows(z, t, row, rows, cols, D)
        middle = tl.sum(t, 1) * (1.0 / D)
        t = centre(t, middle, cols, D)
        scale = tl.rsqrt(tl.sum(product(t, t, UNIT), 1) * (1.0 / D) + eps)
        if mean is not None:
            store_statistic(mean, middle, row, rows)
            store_statistic(rstd, scale, row, rows)
        if y is not None:
            t *= scale[:, None]
            if weight is not None:
                t *= w if HOLD else load_parameter(weight, cols, D)
            if bias is not None:
                t += b if HOLD else load_parameter(bias, cols, D)
            store_rows(y, t, row, rows, cols, D)


@triton.jit(
    do_not_specialize=["x_stride", "residual_stride", "rows", "width", "key0", "key1", "threshold"]
)
def layer_norm_wide_kernel(
    x, residual, weight, bias, y, z, mean, rstd, x_stride, residual_stride, rows, width, eps,
    key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same for wide rows. Means and squares of stretches are joined as Chan, Golub and LeVeque do."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    DROP: tl.constexpr = key0 is not None
    for block in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = rows_of(block, 1)
        middle = tl.zeros([1], tl.float32)
        squares = tl.zeros([1], tl.float32)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
            if z is not None:
                store_rows(z, t, row, rows, cols, D)
            here = tl.minimum(D - start, BLOCK_D).to(tl.float32)
            middle_here = tl.sum(t, 1) / here
            t = centre(t, middle_here, cols, D)
            share = here / (start + here)
            step = middle_here - middle
            squares += tl.sum(t * t, 1) + step * step * (start * share)
            middle += step * share
        scale = tl.rsqrt(squares * (1.0 / D) + eps)
        if mean is not None:
            store_statistic(mean, middle, row, rows)
            store_statistic(rstd, scale, row, rows)
        if y is not None:
            for start in range(0, width, BLOCK_D):
                cols = start + columns(BLOCK_D, UNIT)
                t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
                t = (t - middle[:, None]) * scale[:, None]
                if weight is not None:
                    t *= load_parameter(weight, cols, D)
                if bias is not None:
                    t += load_parameter(bias, cols, D)
                store_rows(y, t, row, rows, cols, D)


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "dy_stride", "dz_stride", "rows", "key0", "key1", "threshold"
    ]
)  # fmt: skip
def layer_norm_backward_kernel(
    x, residual, weight, dy, dz, mean, rstd, dx, dresidual, dweight, dbias,
    x_stride, residual_stride, dy_stride, dz_stride, rows, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """dx, dresidual [rows, D]; dweight, dbias [programs, D] float32: the sums of each program's rows.

    x is z itself where the forward kept that: no residual then, and not DROP.
    """
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    cols = columns(BLOCK_D, UNIT)
    if weight is not None:
        w = load_parameter(weight, cols, D)
    if dweight is not None:
        weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = rows_of(block, ROWS)
        g = load_rows(dy, dy_stride, row, rows, cols, D, UNIT)
        t = load_z(source, row, rows, 0, cols, dropout, D, UNIT, DROP)
        scale = load_statistic(rstd, row, rows)
        n = (t - load_statistic(mean, row, rows)) * scale
        if dweight is not None:
            weight_sum += g * n
        if dbias is not None:
            bias_sum += g
        if dx is not None or dresidual is not None:
            if weight is not None:
                g = product(g, w, UNIT)
            slope, offset = tl.reduce((product(g, n, UNIT), g), 1, add_pairs)
            out = scale * (g - offset[:, None] * (1.0 / D) - n * (slope[:, None] * (1.0 / D)))
            if dz is not None:
                out += load_rows(dz, dz_stride, row, rows, cols, D, UNIT)
            store_gradients(out, dx, dresidual, row, rows, 0, cols, dropout, D)
    if dweight is not None:
        store_sum(dweight, tl.program_id(0), weight_sum, cols, D)
    if dbias is not None:
        store_sum(dbias, tl.program_id(0), bias_sum, cols, D)


@triton.jit
def load_terms(
    source, weight, dy, dy_stride, middle, scale, row, rows, start, cols, dropout,
    D: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """g and n of a stretch of a wide row."""
    g = load_rows(dy, dy_stride, row, rows, cols, D, UNIT)
    if weight is not None:
        g *= load_parameter(weight, cols, D)
    t = load_z(source, row, rows, start, cols, dropout, D, UNIT, DROP)
    return g, (t - middle) * scale


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "dy_stride", "dz_stride", "rows", "width", "key0", "key1", "threshold"
    ]
)  # fmt: skip
def layer_norm_wide_backward_kernel(
    x, residual, weight, dy, dz, mean, rstd, dx, dresidual,
    x_stride, residual_stride, dy_stride, dz_stride, rows, width, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of wide rows."""
    source = (x, residual, x_stride, residual_stride)
    dropout = (key0, key1, threshold, keep_scale)
    for block in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = rows_of(block, 1)
        middle = load_statistic(mean, row, rows)
        scale = load_statistic(rstd, row, rows)
        along = tl.zeros([1, BLOCK_D], tl.float32)
        level = tl.zeros([1, BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            g, n = load_terms(
                source, weight, dy, dy_stride, middle, scale, row, rows, start, cols, dropout, D, UNIT, DROP
            )  # fmt: skip
            along += g * n
            level += g
        slope = tl.sum(along, 1)[:, None] * (1.0 / D)
        offset = tl.sum(level, 1)[:, None] * (1.0 / D)
        for start in range(0, width, BLOCK_D):
            cols = start + columns(BLOCK_D, UNIT)
            g, n = load_terms(
                source, weight, dy, dy_stride, middle, scale, row, rows, start, cols, dropout, D, UNIT, DROP
            )  # fmt: skip
            out = scale * (g - offset - n * slope)
            if dz is not None:
                out += load_rows(dz, dz_stride, row, rows, cols, D, UNIT)
            store_gradients(out, dx, dresidual, row, rows, start, cols, dropout, D)
