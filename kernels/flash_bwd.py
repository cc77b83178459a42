"""Attention's backward, from o and lse of its forward. (Dao, arXiv:2307.08691, §3)

    p = exp(s - lse);  dv = pᵀ do;  dp = do vᵀ;  ds = p (dp - delta);  delta[m] = Σ_d o do - dlse
    dq = scale ds k;  dk = scale dsᵀ q;  d(bias) = ds;  d(slope) = -Σ ds |i + N - M - j|

with dropout: p in dv and dp are those that stayed, times 1 / (1 - p); with softcap c tanh(x / c): dx = ds (1 - tanh²).
Every element of a gradient is summed by one program in one order: no atomics, the same bits in every run. After
`row_terms_kernel` one kernel owns keys, one queries, and one elements of the mask (flash_bwd_mask.py).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_gradient import pair_gradients, uncapped
from pyfuse.kernels.attention_tile import (
    edge_block,
    edges,
    key_ranges,
    keys_of,
    query_ranges,
    rows_of,
    segment,
)
from pyfuse.kernels.tiles import LOG2E, has_nan, head, load_tile, tile, wide


@triton.jit(do_not_specialize=["M"])
def row_terms_kernel(
    o, do, lse, dlse, lse2, delta, o_strides, do_strides, dlse_strides, Hq, M,
    Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse2 and delta [B, Hq, M] from lse. A query that saw no key gets lse2 = inf, so that its weights are 0."""
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    h = wide(pid // blocks % Hq)
    b = wide(pid // blocks // Hq)
    m = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    x = load_tile(tile(head(o, o_strides, b, h), o_strides[2], m, d), m, M, d, Dv, True)
    dx = load_tile(tile(head(do, do_strides, b, h), do_strides[2], m, d), m, M, d, Dv, True)
    total = tl.sum(x.to(tl.float32) * dx.to(tl.float32), 1)
    if dlse is not None:
        row = dlse + b * dlse_strides[0] + h * dlse_strides[1] + m * wide(dlse_strides[2])
        total -= tl.load(row, mask=m < M, other=0.0).to(tl.float32)
    place = (b * Hq + h) * M + m
    natural = tl.load(lse + place, mask=m < M, other=float("-inf"))
    blind = natural == float("-inf")
    tl.store(lse2 + place, tl.where(blind, float("inf"), natural * LOG2E), mask=m < M)
    tl.store(delta + place, tl.where(blind, 0.0, total), mask=m < M)


@triton.jit
def fold_queries(
    dk, dv, k, v, q, do, lse2, rest, delta, q_rows, do_rows, m0, n, n0, M, N, end, left, right, scale, softcap, slope,
    mask, mask_strides, key0, key1, threshold, keep_scale, b, h,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a block of keys what the block of queries at m0 of one head gives."""
    d = tl.arange(0, k.shape[1])
    e = tl.arange(0, v.shape[1])
    m = m0 + tl.arange(0, BLOCK_M)
    queries = load_tile(tile(q, q_rows, m, d), m, M, d, D, EDGE)
    d_out = load_tile(tile(do, do_rows, m, e), m, M, e, Dv, EDGE)
    if EDGE:
        row_lse2 = tl.load(lse2 + m, mask=m < M, other=float("inf"))
        row_delta = tl.load(delta + m, mask=m < M, other=0.0)
    else:
        row_lse2 = tl.load(lse2 + m)
        row_delta = tl.load(delta + m)
    row_rest = rest
    if rest is not None:
        row_rest = tl.load(rest + m, mask=m < M, other=0.0)[None, :]
    p, stays, ds, t = pair_gradients(
        k, queries, v, d_out, row_lse2[None, :], row_rest, row_delta[None, :], m[None, :], n[:, None], m, n0, M, N,
        end, left, right, scale, softcap, slope, mask, mask_strides, key0, key1, threshold, keep_scale, b, h,
        k.shape[0], EDGE, FOLD, True, PRECISION,
    )  # fmt: skip
    dv = tl.dot(stays.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    ds = uncapped(ds, t, softcap)
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["M", "N", "left", "right", "B", "T", "key0", "key1", "threshold"])
def flash_bwd_dkdv_kernel(
    q, k, v, do, lse2, rest, delta, dk, dv, q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    row_strides, B, Hq, G, M, N, T, scale, softcap, factor, left, right, slopes, lengths, mask, mask_strides, cu_q,
    cu_k, key0, key1, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head: over all heads of its group, and all queries that see them.

    factor: of dk in the end, d(score) / d(q·k). Packed: T keys in all, and M, N are those of each sequence."""
    pid = tl.program_id(0)
    Hk = Hq // G
    if cu_q is not None:
        hk = wide(pid % Hk)
        found, block = segment(pid // Hk, cu_k, B, T, BLOCK_N, BLOCK_B)
        if found > B + 1:
            return
        k_row, key_count = rows_of(cu_k, found, B, T)
        q_row, query_count = keys_of(cu_q, found, B)
        b = wide(found - 1)
        q += q_row * q_strides[2]
        do += q_row * do_strides[2]
        lse2 += q_row
        if rest is not None:
            rest += q_row
        delta += q_row
        k += k_row * k_strides[2]
        v += k_row * v_strides[2]
        dk += k_row * dk_strides[2]
        dv += k_row * dv_strides[2]
        M = query_count
        N = key_count
        batch = wide(0)
    else:
        blocks = tl.cdiv(N, BLOCK_N)
        block = pid % blocks  # with causal, the keys that most queries see first
        hk = wide(pid // blocks % Hk)
        b = wide(pid // blocks // Hk)
        batch = b
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    end = N
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), N).to(tl.int32)
    keys = load_tile(tile(head(k, k_strides, batch, hk), k_strides[2], n, d), n, end, d, D, True)
    values = load_tile(tile(head(v, v_strides, batch, hk), v_strides[2], n, e), n, end, e, Dv, True)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    lo, a, c, hi = query_ranges(n0, M, N, left, right, BLOCK_M, BLOCK_N)
    if n0 + BLOCK_N > end:
        # Some keys are beyond the end: every tile is an edge, or there is nothing to do at all.
        a = lo
        c = lo
        hi = tl.where(n0 < end, hi, lo)
    count, before = edges(lo, a, c, hi, BLOCK_M)
    for h in range(hk * G, hk * G + G):
        q_start = head(q, q_strides, batch, h)
        do_start = head(do, do_strides, batch, h)
        rows = batch * row_strides[0] + h * row_strides[1]
        row_rest = rest
        if rest is not None:
            row_rest = rest + rows
        slope = slopes
        if slopes is not None:
            slope = tl.load(slopes + h).to(tl.float32) * LOG2E
        mask_start = mask
        if mask is not None:
            mask_start = head(mask, mask_strides, b, h)
        for m0 in tl.range(a, c, BLOCK_M, num_stages=STAGES):
            sum_k, sum_v = fold_queries(
                sum_k, sum_v, keys, values, q_start, do_start, lse2 + rows, row_rest, delta + rows, q_strides[2],
                do_strides[2], m0, n, n0, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
                key0, key1, threshold, keep_scale, b, h, D, Dv, BLOCK_M, False, FOLD, PRECISION,
            )  # fmt: skip
        for i in tl.range(0, count, num_stages=1):
            sum_k, sum_v = fold_queries(
                sum_k, sum_v, keys, values, q_start, do_start, lse2 + rows, row_rest, delta + rows, q_strides[2],
                do_strides[2], edge_block(i, before, lo, c, BLOCK_M), n, n0, M, N, end, left, right, scale, softcap,
                slope, mask_start, mask_strides, key0, key1, threshold, keep_scale, b, h, D, Dv, BLOCK_M, True, FOLD,
                PRECISION,
            )  # fmt: skip
    dk_tile = tile(head(dk, dk_strides, batch, hk), dk_strides[2], n, d)
    dv_tile = tile(head(dv, dv_strides, batch, hk), dv_strides[2], n, e)
    inside = n[:, None] < N
    tl.store(dk_tile, (sum_k * factor).to(dk.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_tile, sum_v.to(dv.dtype.element_ty), mask=inside & (e[None, :] < Dv))


@triton.jit
def fold_keys(
    dq, row_sum, weights, q, do, lse2, rest, delta, k, v, k_rows, v_rows, m, n0, M, N, end, left, right, scale,
    softcap, slope, mask, mask_strides, key0, key1, threshold, keep_scale, b, h,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
    GIVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq, row_sum and weights (Σ p) of a block of queries what the block of keys at n0 gives; GIVES as in the
    kernel."""
    d = tl.arange(0, q.shape[1])
    e = tl.arange(0, do.shape[1])
    n = n0 + tl.arange(0, BLOCK_N)
    keys = load_tile(tile(k, k_rows, n, d), n, end, d, D, EDGE)
    values = load_tile(tile(v, v_rows, n, e), n, end, e, Dv, EDGE)
    delta = delta[:, None]
    if GIVES != "terms" and mask is not None:
        # Triton (3.7 to 3.9) pipelines wrongly a load that a product and the mask of another load need: it gets one
        # buffer where two are due. So the keys of both products are those without NaN, and what sees others has it by
        # its delta.
        spoilt = has_nan(keys)
        there = ~spoilt[:, None] & (n[:, None] < end) & (d[None, :] < D)
        keys = tl.load(tile(k, k_rows, n, d), mask=there, other=0.0)
        delta += tl.where(spoilt, float("nan"), 0.0)[None, :]
    p, stays, ds, t = pair_gradients(
        q, keys, do, values, lse2[:, None], rest, delta, m[:, None], n[None, :], m, n0, M, N, end,
        left, right, scale, softcap, slope, mask, mask_strides, key0, key1, threshold, keep_scale, b, h,
        BLOCK_N, EDGE, FOLD, False, PRECISION,
    )  # fmt: skip
    if GIVES == "terms":
        row_sum += tl.sum(ds, 1)
        weights += tl.sum(p, 1)
    elif GIVES == "slopes":
        row_sum -= tl.sum(ds * tl.abs(m[:, None] + (N - M) - n[None, :]).to(tl.float32), 1)
    if GIVES != "terms":
        ds = uncapped(ds, t, softcap)
        if EDGE and mask is None:
            # A ds of 0 does not stop a NaN; a query that sees it has it in ds already.
            there = ~has_nan(keys)[:, None] & (n[:, None] < end) & (d[None, :] < D)
            keys = tl.load(tile(k, k_rows, n, d), mask=there, other=0.0)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, row_sum, weights


@triton.jit(do_not_specialize=["M", "N", "left", "right", "B", "key0", "key1", "threshold"])
def flash_bwd_dq_kernel(
    q, k, v, do, lse, lse2, rest, delta, dlse, sinks, dq, dslopes, q_strides, k_strides, v_strides, do_strides,
    dlse_strides, dq_strides, row_strides,
    B, Hq, G, M, N, scale, softcap, factor, left, right, slopes, lengths, mask, mask_strides, cu_q, cu_k, key0, key1,
    threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, FOLD: tl.constexpr, GIVES: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """GIVES "dq": that of BLOCK_M queries of one head; "slopes": and their share of its slope's gradient, dslopes
    [B, Hq, M]; "terms": only lse2, rest and delta, for float32, in which rounding lse alone would cost several bits
    of p: rest is what log2 Σ 2^(s - lse2) is in this arithmetic, and delta Σ p dp - dlse, which cancels with dp better
    than Σ o do."""
    pid = tl.program_id(0)
    if cu_q is not None:
        h = wide(pid % Hq)
        found, block = segment(pid // Hq, cu_q, B, M, BLOCK_M, BLOCK_B)
        if found > B + 1:
            return
        q_row, query_count = rows_of(cu_q, found, B, M)
        k_row, key_count = keys_of(cu_k, found, B)
        b = wide(found - 1)
        q += q_row * q_strides[2]
        do += q_row * do_strides[2]
        if GIVES == "terms":
            lse += q_row
            if dlse is not None:
                dlse += q_row * dlse_strides[2]
        else:
            dq += q_row * dq_strides[2]
        lse2 += q_row
        if rest is not None:
            rest += q_row
        delta += q_row
        if dslopes is not None:
            dslopes += q_row
        k += k_row * k_strides[2]
        v += k_row * v_strides[2]
        M = query_count
        N = key_count
        batch = wide(0)
    else:
        blocks = tl.cdiv(M, BLOCK_M)
        block = blocks - 1 - pid % blocks
        h = wide(pid // blocks % Hq)
        b = wide(pid // blocks // Hq)
        batch = b
    hk = h // G
    m0 = block * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    end = N
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), N).to(tl.int32)
    slope = slopes
    if slopes is not None:
        slope = tl.load(slopes + h).to(tl.float32) * LOG2E
    mask_start = mask
    if mask is not None:
        mask_start = head(mask, mask_strides, b, h)
    queries = load_tile(tile(head(q, q_strides, batch, h), q_strides[2], m, d), m, M, d, D, True)
    d_out = load_tile(tile(head(do, do_strides, batch, h), do_strides[2], m, e), m, M, e, Dv, True)
    rows = batch * row_strides[0] + h * row_strides[1] + m
    row_rest = rest
    if GIVES == "terms":
        natural = tl.load(lse + rows, mask=m < M, other=float("-inf"))
        row_lse2 = tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        row_rest = tl.zeros([BLOCK_M, 1], tl.float32)
    else:
        row_lse2 = tl.load(lse2 + rows, mask=m < M, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=m < M, other=0.0)
        if rest is not None:
            row_rest = tl.load(rest + rows, mask=m < M, other=0.0)[:, None]
    k_start = head(k, k_strides, batch, hk)
    v_start = head(v, v_strides, batch, hk)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    lo, a, c, hi = key_ranges(m0, M, N, end, left, right, BLOCK_M, BLOCK_N)
    for n0 in tl.range(a, c, BLOCK_N, num_stages=STAGES):
        total, row_sum, weights = fold_keys(
            total, row_sum, weights, queries, d_out, row_lse2, row_rest, row_delta, k_start, v_start, k_strides[2],
            v_strides[2], m, n0, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
            key0, key1, threshold, keep_scale, b, h, D, Dv, BLOCK_N, False, FOLD, GIVES, PRECISION,
        )  # fmt: skip
    count, before = edges(lo, a, c, hi, BLOCK_N)
    for i in tl.range(0, count, num_stages=1):
        total, row_sum, weights = fold_keys(
            total, row_sum, weights, queries, d_out, row_lse2, row_rest, row_delta, k_start, v_start, k_strides[2],
            v_strides[2], m, edge_block(i, before, lo, c, BLOCK_N), M, N, end, left, right, scale, softcap, slope,
            mask_start, mask_strides, key0, key1, threshold, keep_scale, b, h, D, Dv, BLOCK_N, True, FOLD, GIVES,
            PRECISION,
        )  # fmt: skip
    if GIVES == "terms":
        if sinks is not None:
            weights += tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2E - row_lse2)
        blind = row_lse2 == float("inf")
        weights = tl.where(blind, 1.0, weights)
        row_delta = row_sum / weights
        if dlse is not None:
            row = dlse + batch * dlse_strides[0] + h * dlse_strides[1] + m * wide(dlse_strides[2])
            row_delta -= tl.load(row, mask=m < M, other=0.0).to(tl.float32)
        tl.store(lse2 + rows, row_lse2, mask=m < M)
        tl.store(rest + rows, tl.log2(weights), mask=m < M)
        tl.store(delta + rows, tl.where(blind, 0.0, row_delta), mask=m < M)
    else:
        dq_tile = tile(head(dq, dq_strides, batch, h), dq_strides[2], m, d)
        inside = (m[:, None] < M) & (d[None, :] < D)
        tl.store(dq_tile, (total * factor).to(dq.dtype.element_ty), mask=inside)
        if GIVES == "slopes":
            tl.store(dslopes + rows, row_sum, mask=m < M)
