"""y = dropout(act(x)), and the gradient of x from y's: act'(x) · dy / (1 - p) where y was kept, else 0.

Tensors are [rows, D] with unit stride in D; the random numbers are counted by (0, 0, row, column), as norm_row.py's.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.norm_row import columns, keep, load_rows, rows_of, store_rows
from pyfuse.kernels.tiles import LOG2E

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2PI = tl.constexpr(0.3989422804014327)  # its inverse
TWO_U, CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # 2 √(2/π): of gelu_tanh


@triton.jit
def logistic(x):
    """σ(x) and σ·(1 - σ), neither by a difference."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))
    elif ACTIVATION == "gelu_tanh":  # x/2·(1 + tanh u) = x·σ(2u)
        s, _ = logistic(TWO_U * (x + CUBE * x * x * x))
        x = x * s
    elif ACTIVATION == "silu":
        s, _ = logistic(x)
        x = x * s
    return x


@triton.jit
def gradient(x, flow, ACTIVATION: tl.constexpr):
    """flow · act'(x). For relu, x may be the result as well: it has the same sign."""
    if ACTIVATION == "relu":
        flow = tl.where(x <= 0.0, 0.0, flow)
    elif ACTIVATION == "gelu":
        density = ROOT_2PI * tl.exp2(-0.5 * LOG2E * x * x)
        flow = flow * (0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * density)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        s, slope = logistic(TWO_U * x * (1.0 + CUBE * square))
        flow = flow * (s + x * slope * (TWO_U * (1.0 + 3.0 * CUBE * square)))
    elif ACTIVATION == "silu":
        s, slope = logistic(x)
        flow = flow * (s + x * slope)
    return flow


@triton.jit(do_not_specialize=["x_stride", "flow_stride", "rows", "key0", "key1", "threshold"])
def dropout_kernel(
    x, flow, y, x_stride, flow_stride, rows, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STRETCHES: tl.constexpr, UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """flow: None in the forward. Strides are counted in UNITs. key0: None where relu's result, or p = 0, says what is
    kept."""
    first = tl.program_id(0) % STRETCHES * BLOCK_D
    cols = first + columns(BLOCK_D, UNIT)
    row = rows_of(tl.program_id(0) // STRETCHES, ROWS)
    if flow is None:
        t = activate(load_rows(x, x_stride, row, rows, cols, D, UNIT), ACTIVATION)
    elif ACTIVATION is None:
        t = load_rows(flow, flow_stride, row, rows, cols, D, UNIT)
    else:
        t = load_rows(x, x_stride, row, rows, cols, D, UNIT)
        t = gradient(t, load_rows(flow, flow_stride, row, rows, cols, D, UNIT), ACTIVATION)
    if keep_scale is not None:
        t *= keep_scale
    if key0 is not None:
        t = tl.where(keep(row, first, (key0, key1, threshold, keep_scale), BLOCK_D), t, 0.0)
    store_rows(y, t, row, rows, cols, D)
