"""Rotary embedding: each pair (x1, x2) of a token's heads turned by the angles of the token's row of cos and sin,

    y1 = x1·cos - x2·sin,  y2 = x2·cos + x1·sin                                        (Su et al., arXiv:2104.09864)

and turned back with a sign of -1. One program owns whole tokens (or some heads of one): it reads their angles once,
and turns HEADS heads at a time with them. Of D columns the first R are turned, R / 2 pairs; the others are copied.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.tiles import wide


@triton.jit
def turned(x1, x2, c, s, dtype: tl.constexpr):
    """The pairs (x1, x2) [HEADS, R/2] turned by angles [1, R/2]."""
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    return (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)


@triton.jit
def turn_heads(
    x, y, x_stride, y_stride, c, s, first, last,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Heads [first, last) of one token. x, y: the token's first element of head 0; c, s [R/2, padded]: its angles."""
    PAIRS: tl.constexpr = c.shape[0]
    dtype: tl.constexpr = y.dtype.element_ty
    c, s = c[None, :], s[None, :]
    for h0 in range(first, last, HEADS):
        h = h0 + tl.arange(0, HEADS)
        rows = h.to(tl.int64)[:, None]
        some = (h < last)[:, None]
        x_head, y_head = x + rows * x_stride * UNIT, y + rows * y_stride * UNIT
        if INTERLEAVED:
            d = tl.arange(0, 2 * PAIRS)[None, :]
            mask = some
            if 2 * PAIRS != R:
                mask = some & (d < R)
            both = tl.load(x_head + d, mask=mask)
            x1, x2 = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
            y1, y2 = turned(x1, x2, c, s, dtype)
            tl.store(y_head + d, tl.reshape(tl.join(y1, y2), (HEADS, 2 * PAIRS)), mask=mask)
        else:
            d = tl.arange(0, PAIRS)[None, :]
            mask = some
            if 2 * PAIRS != R:
                mask = some & (d < R // 2)
            x1 = tl.load(x_head + d, mask=mask)
            x2 = tl.load(x_head + (R // 2 + d), mask=mask)
            y1, y2 = turned(x1, x2, c, s, dtype)
            tl.store(y_head + d, y1, mask=mask)
            tl.store(y_head + (R // 2 + d), y2, mask=mask)
        if COPY > 0:
            d = tl.arange(0, COPY)[None, :]
            mask = some
            if COPY != D - R:
                mask = some & (d < D - R)
            tl.store(y_head + (R + d), tl.load(x_head + (R + d), mask=mask), mask=mask)


@triton.jit
def angles(cos, sin, at, sign, known, PAIRS: tl.constexpr, R: tl.constexpr):
    """cos and sign·sin [R/2, padded] of the row at `at`; NaN, and nothing read, where there is no such row."""
    i = tl.arange(0, PAIRS)
    mask = known
    if 2 * PAIRS != R:
        mask = known & (i < R // 2)
    c = tl.load(cos + at + i, mask=mask, other=float("nan")).to(tl.float32)
    s = tl.load(sin + at + i, mask=mask, other=float("nan")).to(tl.float32)
    return c, s * sign


UNSPECIALISED = [
    "x_b", "x_h", "x_m", "y_b", "y_h", "y_m", "x2_b", "x2_h", "x2_m", "y2_b", "y2_h", "y2_m", "positions_b",
    "positions_m", "H", "H2", "rows", "tokens", "M", "each", "heads_each", "splits",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def rope_kernel(
    x, x_b, x_h, x_m, y, y_b, y_h, y_m, H, x2, x2_b, x2_h, x2_m, y2, y2_b, y2_h, y2_m, H2,
    cos, sin, table_b, table_row, rows, positions, positions_b, positions_m, tokens, M, each, heads_each, splits, sign,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr,
    HEADS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x, y [B, H, M, D] and, where they are not None, x2, y2 [B, H2, M, D] by the same angles; their strides are in
    UNITs. tokens: B·M. A program has `each` of them, and heads_each of their H + H2 heads."""
    pid = tl.program_id(0)
    first = pid % splits * heads_each
    last = first + heads_each
    start = pid // splits * each
    for token in range(start, tl.minimum(start + each, tokens)):
        b, m = wide(token // M), wide(token % M)
        row = m
        known = True
        if positions is not None:
            row = wide(tl.load(positions + b * positions_b + m * positions_m))
            known = (row >= 0) & (row < rows)
            tl.device_assert(known, "positions: outside of the tables of cos and sin")
        c, s = angles(cos, sin, b * table_b + row * table_row, sign, known, PAIRS, R)
        turn_heads(
            x + (b * x_b + m * x_m) * UNIT, y + (b * y_b + m * y_m) * UNIT, x_h, y_h, c, s,
            first, tl.minimum(last, H), D, R, INTERLEAVED, COPY, HEADS, UNIT,
        )  # fmt: skip
        if x2 is not None:
            turn_heads(
                x2 + (b * x2_b + m * x2_m) * UNIT, y2 + (b * y2_b + m * y2_m) * UNIT, x2_h, y2_h, c, s,
                tl.maximum(first - H, 0), tl.minimum(last - H, H2), D, R, INTERLEAVED, COPY, HEADS, UNIT,
            )  # fmt: skip
