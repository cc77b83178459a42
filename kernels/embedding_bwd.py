"""The embedding sum's gradient through dropout and norm. With n = (e - mean) · rstd, g = dropout(dy), h = g · weight

    d(sum of rows) = rstd · (h - mean(h) - n · mean(h · n)),   dnorm_weight = Σ_tokens g · n,   dnorm_bias = Σ_tokens g

in float32. The rows of e are looked up again. What each row of a table gets of it: row_sums.py.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.embedding import (
    UNSPECIALISED,
    centred,
    drop,
    frequencies,
    looked_up,
    parameter,
    ragged,
    row_sum,
    store_tokens,
    summands,
)
from pyfuse.kernels.tiles import wide


@triton.jit
def arriving(dy, dy_stride, t, tokens, first, cols, dropout, D: tl.constexpr, UNIT: tl.constexpr):
    """g [ROWS, BLOCK_D] of the tokens t, 0 beyond the last."""
    return drop(looked_up(dy, dy_stride, wide(t), t < tokens, cols, D, UNIT), t, first, dropout)


@triton.jit
def statistic(statistics, which: tl.constexpr, t, tokens):
    """mean (0) or rstd (1) of the tokens t; 0 beyond the last."""
    return tl.load(statistics + 2 * wide(t) + which, mask=t < tokens, other=0.0)


@triton.jit
def store_sums(sums, part, g, cols, D: tl.constexpr):
    """Row `part` of [..., D] float32: the sum of g over its rows."""
    mask = cols < D if ragged(D, cols.shape[0]) else None
    tl.store(sums + wide(part) * D + cols, tl.sum(g, 0), mask=mask)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "dy_stride"])
def embed_backward_kernel(
    tables, stride0, stride1, stride2, height0, height1, height2, ids, length, turns, statistics,
    dy, dy_stride, norm_weight, dsum, sums, tokens, scale, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dsum [tokens, D] float32, and sums [programs, 2, D] float32: each program's share of dnorm_weight and dnorm_bias;
    None if it isn't wanted."""
    source = (tables, (stride0, stride1, stride2), (height0, height1, height2), ids, length, turns)
    dropout = (key0, key1, threshold, keep_scale)
    # dsum's 4 bytes: a lane takes UNIT neighbours and no more, so that what it computes is what it writes.
    cols = tl.max_contiguous(tl.arange(0, BLOCK_D), UNIT)
    steps = frequencies(turns, 0, BLOCK_D, D)
    w = parameter(norm_weight, cols, D)
    if sums is not None:
        weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        t = block * ROWS + tl.arange(0, ROWS)
        g = arriving(dy, dy_stride, t, tokens, 0, cols, dropout, D, UNIT)
        n = summands(source, steps, scale, t, tokens, cols, D, UNIT)
        rstd = statistic(statistics, 1, t, tokens)
        n = centred(n, statistic(statistics, 0, t, tokens), cols, D) * rstd[:, None]
        if sums is not None:
            weight_sum += g * n
            bias_sum += g
        if dsum is not None:
            g *= w
            along = row_sum(g * n) * (1.0 / D)
            level = row_sum(g) * (1.0 / D)
            g = rstd[:, None] * (g - level[:, None] - n * along[:, None])
            store_tokens(dsum, g, t, tokens, cols, D)
    if sums is not None:
        store_sums(sums, 2 * tl.program_id(0), weight_sum, cols, D)
        store_sums(sums, 2 * tl.program_id(0) + 1, bias_sum, cols, D)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "dy_stride"])
def embed_wide_backward_kernel(
    tables, stride0, stride1, stride2, height0, height1, height2, ids, length, turns, statistics,
    dy, dy_stride, norm_weight, dsum, tokens, scale, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dsum of wide rows, token by token."""
    source = (tables, (stride0, stride1, stride2), (height0, height1, height2), ids, length, turns)
    dropout = (key0, key1, threshold, keep_scale)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        t = token + tl.arange(0, 1)
        mean = statistic(statistics, 0, t, tokens)
        rstd = statistic(statistics, 1, t, tokens)
        along = tl.zeros([1, BLOCK_D], tl.float32)
        level = tl.zeros([1, BLOCK_D], tl.float32)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.max_contiguous(tl.arange(0, BLOCK_D), UNIT)
            steps = frequencies(turns, first, BLOCK_D, D)
            g = arriving(dy, dy_stride, t, tokens, first, cols, dropout, D, UNIT)
            g *= parameter(norm_weight, cols, D)
            n = summands(source, steps, scale, t, tokens, cols, D, UNIT)
            along += g * ((n - mean[:, None]) * rstd[:, None])
            level += g
        slope = row_sum(along) * (1.0 / D)
        offset = row_sum(level) * (1.0 / D)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.max_contiguous(tl.arange(0, BLOCK_D), UNIT)
            steps = frequencies(turns, first, BLOCK_D, D)
            g = arriving(dy, dy_stride, t, tokens, first, cols, dropout, D, UNIT)
            g *= parameter(norm_weight, cols, D)
            n = summands(source, steps, scale, t, tokens, cols, D, UNIT)
            n = (n - mean[:, None]) * rstd[:, None]
            g = rstd[:, None] * (g - offset[:, None] - n * slope[:, None])
            store_tokens(dsum, g, t, tokens, cols, D)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "dy_stride"])
def embed_norm_sums_kernel(
    tables, stride0, stride1, stride2, height0, height1, height2, ids, length, turns, statistics,
    dy, dy_stride, sums, tokens, scale, key0, key1, threshold, keep_scale,
    STRETCHES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """sums [programs / STRETCHES, 2, D] of wide rows: a program has one of STRETCHES of its tokens' columns."""
    source = (tables, (stride0, stride1, stride2), (height0, height1, height2), ids, length, turns)
    dropout = (key0, key1, threshold, keep_scale)
    first = tl.program_id(0) % STRETCHES * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    steps = frequencies(turns, first, BLOCK_D, D)
    weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    part = tl.program_id(0) // STRETCHES
    for block in range(part, tl.cdiv(tokens, ROWS), tl.num_programs(0) // STRETCHES):
        t = block * ROWS + tl.arange(0, ROWS)
        g = arriving(dy, dy_stride, t, tokens, first, cols, dropout, D, UNIT)
        n = summands(source, steps, scale, t, tokens, cols, D, UNIT)
        n = (n - statistic(statistics, 0, t, tokens)[:, None]) * statistic(
            statistics, 1, t, tokens
        )[:, None]
        weight_sum += g * n
        bias_sum += g
    store_sums(sums, 2 * part, weight_sum, cols, D)
    store_sums(sums, 2 * part + 1, bias_sum, cols, D)
