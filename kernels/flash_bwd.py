"""Attention's backward, from o and lse of its forward. (Dao, arXiv:2307.08691, §3)

    p = exp(s - lse);  dv = pᵀ do;  dp = do vᵀ;  ds = p (dp - delta);  delta[m] = Σ_d o do - dlse
    dq = scale ds k;  dk = scale dsᵀ q;  d(bias) = ds;  d(slope) = -Σ ds |i + N - M - j|

with dropout: p in dv and dp are those that stayed, times 1 / (1 - p); with softcap c tanh(x / c): dx = ds (1 - tanh²).
Every element of a gradient is summed by one program in one order: no atomics, the same bits in every run. Three
kernels after `row_terms_kernel`: one owns keys, one owns queries, one owns elements of the mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_tile import (
    in_band,
    key_ranges,
    keys_of,
    logits,
    mask_tile,
    query_ranges,
    rows_of,
    segment,
    with_mask,
)
from pyfuse.kernels.tiles import LOG2E, has_nan, head, keep_tile, load_tile, tile, wide


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
def pair_gradients(
    a, x, c, y, lse2, rest, delta, m, n, queries, n0, M, N, end, left, right, scale, softcap, slope, mask, mask_strides,
    dropout, keep_scale, b, h,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr, BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(p as dv takes it, ds, tanh of capped scores) of a tile: s = a xᵀ, dp = c yᵀ.

    m and n, lse2, rest and delta broadcast to the tile: [BM, BN], or BY_KEY [BN, BM]; p = 2^(s - lse2 - rest). A pair
    that is not seen has p = ds = 0, whatever its key and value hold.
    """
    s = tl.dot(a, x.T, input_precision=PRECISION)
    t = s
    if FOLD:
        s = s * scale
    else:
        s, t = logits(s, scale, softcap, slope, m, n, N - M)
    GUARD: tl.constexpr = EDGE or mask is not None
    seen = s == s
    if EDGE:
        seen = in_band(m, n, N - M, end, left, right)
    elif GUARD:
        seen = (m >= 0) & (n >= 0)
    if mask is not None:
        s, seen = with_mask(s, seen, mask_tile(mask, mask_strides, m, n, M, N))
    s = s - lse2
    if rest is not None:
        s = s - rest
    p = tl.exp2(s)
    if GUARD:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(c, y.T, input_precision=PRECISION)
    stays = p
    if dropout is not None:
        keep = keep_tile(b, h, queries, n0, dropout[0], dropout[1], dropout[2], BLOCK_N)
        if BY_KEY:
            keep = keep.T
        stays = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if GUARD:
        ds = tl.where(seen, ds, 0.0)
    return stays, ds, t


@triton.jit
def uncapped(ds, t, softcap):
    """The gradient of a score before its cap."""
    if softcap is not None:
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def fold_queries(
    dk, dv, k, v, q, do, lse2, rest, delta, q_rows, do_rows, n, n0, lo, hi, M, N, end, left, right, scale, softcap,
    slope, mask, mask_strides, dropout, keep_scale, b, h,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a block of keys what the queries [lo, hi) of one head give."""
    d = tl.arange(0, k.shape[1])
    e = tl.arange(0, v.shape[1])
    for m0 in tl.range(lo, hi, BLOCK_M, num_stages=STAGES):
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
        p, ds, t = pair_gradients(
            k, queries, v, d_out, row_lse2[None, :], row_rest, row_delta[None, :], m[None, :], n[:, None], m, n0, M,
            N, end, left, right, scale, softcap, slope, mask, mask_strides, dropout, keep_scale, b, h,
            k.shape[0], EDGE, FOLD, True, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = uncapped(ds, t, softcap)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["M", "N", "left", "right", "B", "T", "dropout"])
def flash_bwd_dkdv_kernel(
    q, k, v, do, lse2, rest, delta, dk, dv, q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    row_strides, B, Hq, G, M, N, T, scale, softcap, factor, left, right, slopes, lengths, mask, mask_strides, cu_q,
    cu_k, dropout, keep_scale,
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
        if right is not None:
            sum_k, sum_v = fold_queries(
                sum_k, sum_v, keys, values, q_start, do_start, lse2 + rows, row_rest, delta + rows, q_strides[2],
                do_strides[2], n, n0, lo, tl.minimum(a, hi), M, N, end, left, right, scale, softcap, slope,
                mask_start, mask_strides, dropout, keep_scale, b, h, D, Dv, BLOCK_M, True, FOLD, PRECISION, 1,
            )  # fmt: skip
        sum_k, sum_v = fold_queries(
            sum_k, sum_v, keys, values, q_start, do_start, lse2 + rows, row_rest, delta + rows, q_strides[2],
            do_strides[2], n, n0, a, c, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
            dropout, keep_scale, b, h, D, Dv, BLOCK_M, False, FOLD, PRECISION, STAGES,
        )  # fmt: skip
        sum_k, sum_v = fold_queries(
            sum_k, sum_v, keys, values, q_start, do_start, lse2 + rows, row_rest, delta + rows, q_strides[2],
            do_strides[2], n, n0, c, hi, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
            dropout, keep_scale, b, h, D, Dv, BLOCK_M, True, FOLD, PRECISION, 1,
        )  # fmt: skip
    dk_tile = tile(head(dk, dk_strides, batch, hk), dk_strides[2], n, d)
    dv_tile = tile(head(dv, dv_strides, batch, hk), dv_strides[2], n, e)
    inside = n[:, None] < N
    tl.store(dk_tile, (sum_k * factor).to(dk.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_tile, sum_v.to(dv.dtype.element_ty), mask=inside & (e[None, :] < Dv))


@triton.jit
def fold_keys(
    dq, row_sum, q, do, lse2, rest, delta, k, v, k_rows, v_rows, m, lo, hi, M, N, end, left, right, scale, softcap,
    slope, mask, mask_strides, dropout, keep_scale, b, h,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
    GIVES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dq (and row_sum) of a block of queries what the keys [lo, hi) give; GIVES as in the kernel."""
    d = tl.arange(0, q.shape[1])
    e = tl.arange(0, do.shape[1])
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        k_tile = tile(k, k_rows, n, d)
        keys = load_tile(k_tile, n, end, d, D, EDGE)
        values = load_tile(tile(v, v_rows, n, e), n, end, e, Dv, EDGE)
        stays, ds, t = pair_gradients(
            q, keys, do, values, lse2[:, None], rest, delta[:, None], m[:, None], n[None, :], m, n0, M, N, end,
            left, right, scale, softcap, slope, mask, mask_strides, dropout, keep_scale, b, h,
            BLOCK_N, EDGE, FOLD, False, PRECISION,
        )  # fmt: skip
        if GIVES == "delta":
            row_sum += tl.sum(ds, 1)
        elif GIVES == "slopes":
            row_sum -= tl.sum(ds * tl.abs(m[:, None] + (N - M) - n[None, :]).to(tl.float32), 1)
        if GIVES != "delta":
            ds = uncapped(ds, t, softcap)
            if EDGE or mask is not None:
                # A ds of 0 does not stop a NaN; a query that sees it has it in ds already.
                there = ~has_nan(keys)[:, None] & (n[:, None] < end) & (d[None, :] < D)
                keys = tl.load(k_tile, mask=there, other=0.0)
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=["M", "N", "left", "right", "B", "dropout"])
def flash_bwd_dq_kernel(
    q, k, v, do, lse2, rest, delta, dlse, dq, dslopes, q_strides, k_strides, v_strides, do_strides,
    dlse_strides, dq_strides, row_strides,
    B, Hq, G, M, N, scale, softcap, factor, left, right, slopes, lengths, mask, mask_strides, cu_q, cu_k, dropout,
    keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, FOLD: tl.constexpr, GIVES: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """GIVES "dq": that of BLOCK_M queries of one head; "slopes": and their share of its slope's gradient, dslopes
    [B, Hq, M]; "delta": only delta, as Σ p dp - dlse. That is where dp and delta nearly cancel closer than Σ o do."""
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
        if GIVES == "delta":
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
    row_lse2 = tl.load(lse2 + rows, mask=m < M, other=float("inf"))
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    if GIVES != "delta":
        row_delta = tl.load(delta + rows, mask=m < M, other=0.0)
    row_rest = rest
    if rest is not None:
        row_rest = tl.load(rest + rows, mask=m < M, other=0.0)[:, None]
    k_start = head(k, k_strides, batch, hk)
    v_start = head(v, v_strides, batch, hk)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    lo, a, c, hi = key_ranges(m0, M, N, end, left, right, BLOCK_M, BLOCK_N)
    if left is not None:
        total, row_sum = fold_keys(
            total, row_sum, queries, d_out, row_lse2, row_rest, row_delta, k_start, v_start, k_strides[2], v_strides[2],
            m, lo, tl.minimum(a, hi), M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
            dropout, keep_scale, b, h, D, Dv, BLOCK_N, True, FOLD, GIVES, PRECISION, 1,
        )  # fmt: skip
    total, row_sum = fold_keys(
        total, row_sum, queries, d_out, row_lse2, row_rest, row_delta, k_start, v_start, k_strides[2], v_strides[2], m,
        a, c, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
        dropout, keep_scale, b, h, D, Dv, BLOCK_N, False, FOLD, GIVES, PRECISION, STAGES,
    )  # fmt: skip
    total, row_sum = fold_keys(
        total, row_sum, queries, d_out, row_lse2, row_rest, row_delta, k_start, v_start, k_strides[2], v_strides[2], m,
        c, hi, M, N, end, left, right, scale, softcap, slope, mask_start, mask_strides,
        dropout, keep_scale, b, h, D, Dv, BLOCK_N, True, FOLD, GIVES, PRECISION, 1,
    )  # fmt: skip
    if GIVES == "delta":
        if dlse is not None:
            row = dlse + batch * dlse_strides[0] + h * dlse_strides[1] + m * wide(dlse_strides[2])
            blind = row_lse2 == float("inf")
            row_sum -= tl.where(blind, 0.0, tl.load(row, mask=m < M, other=0.0).to(tl.float32))
        tl.store(delta + rows, row_sum, mask=m < M)
    else:
        dq_tile = tile(head(dq, dq_strides, batch, h), dq_strides[2], m, d)
        inside = (m[:, None] < M) & (d[None, :] < D)
        tl.store(dq_tile, (total * factor).to(dq.dtype.element_ty), mask=inside)
        if GIVES == "slopes":
            tl.store(dslopes + rows, row_sum, mask=m < M)


@triton.jit(do_not_specialize=["M", "N", "left", "right", "batches", "heads", "dropout"])
def flash_bwd_dmask_kernel(
    q, k, v, do, lse2, rest, delta, dmask, q_strides, k_strides, v_strides, do_strides, row_strides, dmask_strides,
    Hq, G, M, N, batches, heads, scale, softcap, left, right, slopes, lengths, mask, mask_strides, dropout, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dmask of one tile of an additive mask: the sum of ds over `batches` sequences and `heads` heads that share it.

    ROWS, COLS: dmask has rows and columns of its own; without, they are summed, and a program owns all of them."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    col_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_row = 0
    last_row = row_blocks
    if ROWS:
        first_row = pid % row_blocks
        last_row = first_row + 1
        pid = pid // row_blocks
    first_col = 0
    last_col = col_blocks
    if COLS:
        first_col = pid % col_blocks
        last_col = first_col + 1
        pid = pid // col_blocks
    mask_heads = Hq // heads
    mask_h = wide(pid % mask_heads)
    mask_b = wide(pid // mask_heads)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(mask_b * batches, mask_b * batches + batches):
        end = N
        if lengths is not None:
            end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), N).to(tl.int32)
        for h in range(mask_h * heads, mask_h * heads + heads):
            slope = slopes
            if slopes is not None:
                slope = tl.load(slopes + h).to(tl.float32) * LOG2E
            k_start = head(k, k_strides, b, h // G)
            v_start = head(v, v_strides, b, h // G)
            for row in range(first_row, last_row):
                m = row * BLOCK_M + tl.arange(0, BLOCK_M)
                queries = load_tile(
                    tile(head(q, q_strides, b, h), q_strides[2], m, d), m, M, d, D, True
                )
                d_out = load_tile(
                    tile(head(do, do_strides, b, h), do_strides[2], m, e), m, M, e, Dv, True
                )
                rows = b * row_strides[0] + h * row_strides[1] + m
                row_lse2 = tl.load(lse2 + rows, mask=m < M, other=float("inf"))
                row_delta = tl.load(delta + rows, mask=m < M, other=0.0)
                row_rest = rest
                if rest is not None:
                    row_rest = tl.load(rest + rows, mask=m < M, other=0.0)[:, None]
                lo, a, c, hi = key_ranges(row * BLOCK_M, M, N, end, left, right, BLOCK_M, BLOCK_N)
                from_col = tl.maximum(first_col, lo // BLOCK_N)
                to_col = tl.minimum(last_col, tl.cdiv(hi, BLOCK_N))
                for col in range(from_col, to_col):
                    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
                    keys = load_tile(tile(k_start, k_strides[2], n, d), n, end, d, D, True)
                    values = load_tile(tile(v_start, v_strides[2], n, e), n, end, e, Dv, True)
                    stays, ds, t = pair_gradients(
                        queries, keys, d_out, values, row_lse2[:, None], row_rest, row_delta[:, None], m[:, None],
                        n[None, :], m, col * BLOCK_N, M, N, end, left, right, scale, softcap, slope,
                        head(mask, mask_strides, b, h), mask_strides, dropout, keep_scale, b, h,
                        BLOCK_N, True, False, False, PRECISION,
                    )  # fmt: skip
                    total += ds
    m = first_row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first_col * BLOCK_N + tl.arange(0, BLOCK_N)
    start = head(dmask, dmask_strides, mask_b, mask_h)
    if ROWS and COLS:
        place = start + m.to(tl.int64)[:, None] * dmask_strides[2] + n[None, :]
        tl.store(place, total.to(dmask.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
    elif ROWS:
        tl.store(start + m, tl.sum(total, 1).to(dmask.dtype.element_ty), mask=m < M)
    elif COLS:
        tl.store(start + n, tl.sum(total, 0).to(dmask.dtype.element_ty), mask=n < N)
    else:
        tl.store(start, tl.sum(tl.sum(total, 1), 0).to(dmask.dtype.element_ty))
