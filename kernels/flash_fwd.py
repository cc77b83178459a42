"""Attention's forward: o[m] = Σ_n softmax_n(s[m, n]) v[n], with s of attention_tile.py. (Dao, arXiv:2307.08691)

One program owns BLOCK_M queries of one head and folds the keys into them, BLOCK_N at a time, by an online softmax.
Tiles of keys that every query of the block sees carry no mask; only those at the edges do.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_tile import (
    edge_block,
    edges,
    in_band,
    key_ranges,
    keys_of,
    logits,
    mask_tile,
    rows_of,
    segment,
    with_mask,
)
from pyfuse.kernels.tiles import LN2, LOG2E, has_nan, head, keep_tile, load_tile, tile, wide


@triton.jit
def softmax_step(s, m_i, l_i, scale, GUARD: tl.constexpr):
    """Weights p = 2^(scale s - max) of s [BM, BN], the new maximum and sum, and what older sums shrink by."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    pivot = m_new
    if GUARD:
        # A row that has seen no key yet would give inf - inf.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - pivot[:, None])
    shrink = tl.exp2(m_i - pivot)
    return p, m_new, l_i * shrink + tl.sum(p, 1), shrink


@triton.jit
def fold_keys(
    acc, m_i, l_i, q, k, v, n0, m, M, N, end, left, right, scale, softcap, slope, mask, mask_strides, key0, key1,
    threshold, b, h, D: tl.constexpr, Dv: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
    MAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the tile of keys at n0 into the running sums of one block of queries.

    k and v: pointers to the tile, or MAPS: descriptors of the head. EDGE: some query does not see some key, or the tile
    is cut. FOLD: the scale is applied in exp2."""
    BLOCK_M: tl.constexpr = q.shape[0]
    GUARD: tl.constexpr = EDGE or mask is not None
    n = n0 + tl.arange(0, BLOCK_N)
    e = tl.arange(0, acc.shape[1])
    if MAPS:
        keys = k.load([n0, 0])
    else:
        keys = load_tile(k, n, end, tl.arange(0, q.shape[1]), D, EDGE)
    extra = mask
    if mask is not None:  # early, to be there after the product
        extra = mask_tile(mask, mask_strides, m[:, None], n[None, :], M, N, EDGE)
    s = tl.dot(q, keys.T, input_precision=PRECISION)
    if not FOLD:
        s, _ = logits(s, scale, softcap, slope, m[:, None], n[None, :], N - M)
    if MAPS:
        values = v.load([n0, 0])
    elif GUARD:
        # A weight of 0 does not stop a NaN: values that are not finite reach only the rows that see them.
        spoilt = has_nan(load_tile(v, n, end, e, Dv, EDGE))
        there = ~spoilt[:, None] & (n[:, None] < end) & (e[None, :] < Dv)
        values = tl.load(v, mask=there, other=0.0)
    else:
        values = load_tile(v, n, end, e, Dv, EDGE)
    if GUARD:
        seen = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
        if EDGE:
            seen = in_band(m[:, None], n[None, :], N - M, end, left, right)
        if mask is not None:
            s, seen = with_mask(s, seen, extra)
        s = tl.where(seen, tl.where(spoilt[None, :], float("nan"), s), float("-inf"))
    p, m_i, l_i, shrink = softmax_step(s, m_i, l_i, scale if FOLD else 1.0, GUARD)
    if key0 is not None:
        p = tl.where(keep_tile(b, h, m, n0, key0, key1, threshold, BLOCK_N), p, 0.0)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def descriptor(start, row_stride, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of a head's rows x D elements in tiles of ROWS x COLS; beyond them a load gives 0."""
    return tl.make_tensor_descriptor(start, [rows, D], [wide(row_stride), 1], [ROWS, COLS])


@triton.jit(do_not_specialize=["M", "N", "left", "right", "B", "key0", "key1", "threshold"])
def flash_fwd_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, lse_strides, B, Hq, G, M, N, scale,
    softcap, left, right, sinks, slopes, lengths, mask, mask_strides, cu_q, cu_k, key0, key1, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, FOLD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What is None is absent. q [B, Hq, M, D], or with cu_q [Hq, M, D] for all sequences together; lse natural."""
    pid = tl.program_id(0)
    if cu_q is not None:
        hq = wide(pid % Hq)
        found, block = segment(pid // Hq, cu_q, B, M, BLOCK_M, BLOCK_B)
        if found > B + 1:
            return
        q_row, query_count = rows_of(cu_q, found, B, M)
        k_row, key_count = keys_of(cu_k, found, B)
        b = wide(found - 1)
        q += q_row * q_strides[2]
        k += k_row * k_strides[2]
        v += k_row * v_strides[2]
        o += q_row * o_strides[2]
        if lse is not None:
            lse += q_row
        M = query_count
        N = key_count
        batch = wide(0)
    else:
        blocks = tl.cdiv(M, BLOCK_M)
        block = blocks - 1 - pid % blocks  # with causal, the longest rows first
        hq = wide(pid // blocks % Hq)
        b = wide(pid // blocks // Hq)
        batch = b
    hk = hq // G
    m0 = block * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    end = N
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), N).to(tl.int32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        # The sink is the row's first key, without a value.
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + hq).to(tl.float32) * LOG2E
        l_i += 1.0
    slope = slopes
    if slopes is not None:
        slope = tl.load(slopes + hq).to(tl.float32) * LOG2E
    mask_start = mask
    if mask is not None:
        mask_start = head(mask, mask_strides, b, hq)
    q_start = head(q, q_strides, batch, hq)
    k_start = head(k, k_strides, batch, hk)
    v_start = head(v, v_strides, batch, hk)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    queries = load_tile(tile(q_start, q_strides[2], m, d), m, M, d, D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lo, a, c, hi = key_ranges(m0, M, N, end, left, right, BLOCK_M, BLOCK_N)
    if TMA:
        rows = tl.maximum(end, 1)  # a descriptor of nothing is none, even if it is never used
        k_map = descriptor(k_start, k_strides[2], rows, D, BLOCK_N, BLOCK_D)
        v_map = descriptor(v_start, v_strides[2], rows, Dv, BLOCK_N, BLOCK_DV)
        for n0 in tl.range(a, c, BLOCK_N, num_stages=STAGES):
            acc, m_i, l_i = fold_keys(
                acc, m_i, l_i, queries, k_map, v_map, n0, m, M, N, end, left, right, scale, softcap, slope,
                mask_start, mask_strides, key0, key1, threshold, b, hq, D, Dv, BLOCK_N, False, FOLD, True, PRECISION,
            )  # fmt: skip
    else:
        k_tile = tile(k_start, k_strides[2], a + n, d)
        v_tile = tile(v_start, v_strides[2], a + n, e)
        for n0 in tl.range(a, c, BLOCK_N, num_stages=STAGES):
            acc, m_i, l_i = fold_keys(
                acc, m_i, l_i, queries, k_tile, v_tile, n0, m, M, N, end, left, right, scale, softcap, slope,
                mask_start, mask_strides, key0, key1, threshold, b, hq, D, Dv, BLOCK_N, False, FOLD, False, PRECISION,
            )  # fmt: skip
            k_tile += BLOCK_N * wide(k_strides[2])
            v_tile += BLOCK_N * wide(v_strides[2])
    count, before = edges(lo, a, c, hi, BLOCK_N)
    for i in tl.range(0, count, num_stages=1):
        n0 = edge_block(i, before, lo, c, BLOCK_N)
        k_tile = tile(k_start, k_strides[2], n0 + n, d)
        v_tile = tile(v_start, v_strides[2], n0 + n, e)
        acc, m_i, l_i = fold_keys(
            acc, m_i, l_i, queries, k_tile, v_tile, n0, m, M, N, end, left, right, scale, softcap, slope,
            mask_start, mask_strides, key0, key1, threshold, b, hq, D, Dv, BLOCK_N, True, FOLD, False, PRECISION,
        )  # fmt: skip
    total = tl.where(l_i == 0.0, 1.0, l_i)
    if key0 is not None:
        total /= keep_scale
    out = (acc / total[:, None]).to(o.dtype.element_ty)
    o_tile = tile(head(o, o_strides, batch, hq), o_strides[2], m, e)
    tl.store(o_tile, out, mask=(m[:, None] < M) & (e[None, :] < Dv))
    if lse is not None:
        row = lse + batch * lse_strides[0] + hq * lse_strides[1] + m
        tl.store(row, (m_i + tl.log2(l_i)) * LN2, mask=m < M)
