"""Attention of few queries over a cache: the keys shared out between programs, then their sums merged.

One program takes a share of the keys of one key head for a tile of rows: row r of the head is query r // G of its query
head r % G, so that all G heads use what is read once. In a share it goes as in flash_fwd.py. Of each row it leaves

    m = max_n s[n],  l = Σ_n 2^(s[n] - m),  acc = Σ_n 2^(s[n] - m) v[n]      over its keys, s of attention_tile.py

in float32, which a second kernel adds up in a fixed order; with one share for all keys the first one writes o itself.
How many shares there are follows from sizes, how long they are from a sequence's length, which only the GPU knows.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_tile import key_ranges, logits
from pyfuse.kernels.tiles import LN2, LOG2E, has_nan, wide


@triton.jit
def length_of(lengths, stride, b, N):
    """Keys of sequence b in a cache for N."""
    length = tl.load(lengths + b * stride)
    return tl.minimum(tl.maximum(length, 0), N).to(tl.int32)


@triton.jit
def shares(
    r0, G, M, length, left, right, splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr
):  # fmt: skip
    """key_ranges of the tile of rows at r0, and how many of the keys [lo, hi) a share has: LEAST or more."""
    first = r0 // G
    past = tl.minimum((r0 + BLOCK_M - 1) // G + 1, M)
    lo, a, b, hi = key_ranges(first, past, length - M + past, length, left, right, BLOCK_M, BLOCK_N)
    size = tl.maximum(tl.cdiv(hi - lo, splits * BLOCK_N) * BLOCK_N, LEAST)
    return lo, a, b, hi, size


# The steps below get the cache of one head as (k, v, their strides), its pages as (row of the table, stride, page_size,
# page_bits), what is appended as (k_new, v_new, strides of their rows); without pages, or anything new, of None.


@triton.jit
def place(n, there, pages, MASKED: tl.constexpr):
    """(page, row in it) of the keys n; MASKED: only where they are `there`. Without a table the cache is one page.
    page_bits: of a page size that is a power of 2."""
    table, stride, page_size, page_bits = pages
    page = wide(0)
    row = n
    if table is not None:
        i = n // page_size if page_bits is None else n >> page_bits
        row = n - i * page_size
        entries = table + wide(i) * stride
        entry = tl.load(entries, mask=there, other=0) if MASKED else tl.load(entries)
        page = wide(entry.to(tl.int32))  # a product of 32-bit numbers
    return page, row


@triton.jit
def within(rows, cols, D: tl.constexpr):
    """Mask of a tile of D columns from that of its rows."""
    mask = rows[:, None]
    if cols.shape[0] > D:
        mask = mask & (cols[None, :] < D)
    return mask


@triton.jit
def load_columns(pointers, cols, D: tl.constexpr):
    """A tile of rows that are all there."""
    if cols.shape[0] > D:
        x = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def load_cached(
    x, strides, page, row, there, cols, new, new_stride, fresh, D: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values; with EDGE zero where none is `there`, and from `new` where `fresh` [BN], the row in it,
    is not negative. WHOLE: page and row are those of the first key, and all follow it."""
    at = page * strides[0] + wide(row) * strides[2]
    if WHOLE:
        pointers = x + at + (tl.arange(0, BLOCK_N) * wide(strides[2]))[:, None] + cols[None, :]
    else:
        pointers = (x + cols)[None, :] + at[:, None]
    if EDGE:
        cached = there
        if new is not None:
            cached = there & (fresh < 0)
        out = tl.load(pointers, mask=within(cached, cols, D), other=0.0)
        if new is not None:
            given = (new + cols)[None, :] + (fresh * wide(new_stride))[:, None]
            out = tl.load(given, mask=within(there & (fresh >= 0), cols, D), other=out)
    else:
        out = load_columns(pointers, cols, D)
    return out


@triton.jit
def softmax_step(s, m_i, l_i, scale, GUARD: tl.constexpr):
    """As in flash_fwd.py, but l_i [BM, BN] is summed only at the end: warps share rows, and need not meet for it."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    pivot = m_new
    if GUARD:
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - pivot[:, None])
    shrink = tl.exp2(m_i - pivot)
    return p, m_new, l_i * shrink[:, None] + p, shrink


@triton.jit
def fold_keys(
    acc, m_i, l_i, queries, cache, pages, new, m, lo, hi, start, stop, since, until, shift, scale, softcap, slope,
    D: tl.constexpr, Dv: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    FOLD: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold the keys [lo, hi) into the running sums of a tile of rows; their queries come in tiles of CHUNK columns.
    EDGE: not all rows see all of them, but [since, until), [BM], of [start, stop); keys from `shift` on may be new."""
    k, v, k_strides, v_strides = cache
    k_new, v_new, k_new_stride, v_new_stride = new
    d = tl.arange(0, CHUNK)
    dv = tl.arange(0, acc.shape[1])
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        fresh = n - shift
        there = (n >= start) & (n < stop)
        cached = there
        if k_new is not None:
            cached = there & (fresh < 0)
        page, row = place(n0 if WHOLE else n, cached, pages, EDGE and not WHOLE)
        s = tl.zeros([acc.shape[0], BLOCK_N], tl.float32)
        for c in tl.static_range(0, D, CHUNK):
            keys = load_cached(
                k + c, k_strides, page, row, there, d, k_new if k_new is None else k_new + c, k_new_stride, fresh,
                D - c, BLOCK_N, EDGE, WHOLE,
            )  # fmt: skip
            s = tl.dot(queries[c // CHUNK], keys.T, s, input_precision=PRECISION)
        if not FOLD:
            s, _ = logits(s, scale, softcap, slope, m[:, None], n[None, :], shift)
        values = load_cached(
            v, v_strides, page, row, there, dv, v_new, v_new_stride, fresh, Dv, BLOCK_N, EDGE, WHOLE
        )
        if EDGE:
            # A weight of 0 does not stop a NaN: values that are not finite reach only the rows that see them.
            spoilt = has_nan(values)
            values = tl.where(spoilt[:, None], 0.0, values)
            seen = n[None, :] < until[:, None]
            if since is not None:
                seen = seen & (n[None, :] >= since[:, None])
            s = tl.where(seen, tl.where(spoilt[None, :], float("nan"), s), float("-inf"))
        p, m_i, l_i, shrink = softmax_step(s, m_i, l_i, scale if FOLD else 1.0, EDGE)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def write_rows(
    x, strides, new, new_stride, page, row, m, there, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows m of `new` into a cache."""
    d = tl.arange(0, BLOCK_D)
    mask = within(there, d, D)
    given = tl.load(new + (m * wide(new_stride))[:, None] + d[None, :], mask=mask)
    to = page * strides[0] + wide(row) * strides[2]
    tl.store(x + to[:, None] + d[None, :], given, mask=mask)


@triton.jit
def append(
    cache, pages, new, shift, M, N,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write what is new of one head into its cache, as keys from `shift` on."""
    k, v, k_strides, v_strides = cache
    k_new, v_new, k_new_stride, v_new_stride = new
    for m0 in range(0, M, ROWS):
        m = m0 + tl.arange(0, ROWS)
        n = shift + m
        there = (m < M) & (n >= 0) & (n < N)
        page, row = place(n, there, pages, True)
        write_rows(k, k_strides, k_new, k_new_stride, page, row, m, there, D, BLOCK_D)
        write_rows(v, v_strides, v_new, v_new_stride, page, row, m, there, Dv, BLOCK_DV)


@triton.jit
def finish(acc, m_i, l_i, sink):
    """(o, lse) from the sums over all keys; m_i and l_i broadcast against acc. A sink is a key without a value."""
    if sink is not None:
        top = tl.maximum(m_i, sink)
        pivot = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(m_i - pivot)
        l_i = l_i * shrink + tl.exp2(sink - pivot)
        acc = acc * shrink
        m_i = top
    return acc / tl.where(l_i == 0.0, 1.0, l_i), (m_i + tl.log2(l_i)) * LN2


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Triton sees of a number only whether 16 divides it; rows of 8 n elements are aligned to 16 bytes as well."""
    if UNIT == 1:
        product = strides
    else:
        product = (wide(strides[0]) * UNIT, wide(strides[1]) * UNIT, wide(strides[2]) * UNIT)
    return product


@triton.jit
def head_of(
    k, v, k_strides, v_strides, table, table_strides, page_size, page_bits, k_new, v_new, new_strides, b, hk,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The cache, its pages and what is new, of head hk of sequence b."""
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    if table is not None:
        pages = (table + b * table_strides[0], table_strides[1], page_size, page_bits)
        block = wide(0)
    else:
        pages = (table, 0, page_size, page_bits)
        block = b
    k += block * k_strides[0] + hk * k_strides[1]
    v += block * v_strides[0] + hk * v_strides[1]
    if k_new is not None:
        k_new += b * new_strides[0][0] + hk * new_strides[0][1]
        v_new += b * new_strides[1][0] + hk * new_strides[1][1]
        new = (k_new, v_new, new_strides[0][2], new_strides[1][2])
    else:
        new = (k_new, v_new, 0, 0)
    return (k, v, k_strides, v_strides), pages, new


@triton.jit(do_not_specialize=["B", "M", "N", "left", "right", "splits", "page_bits"])
def flash_decode_kernel(
    q, k, v, o, lse, partial, q_strides, k_strides, v_strides, o_strides, lengths, length_stride, table,
    table_strides, page_size, page_bits, k_new, v_new, new_strides, B, Hk, G, M, N, scale, softcap, left, right,
    sinks, slopes, splits,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, UNIT: tl.constexpr, FOLD: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What is None is absent. q [B, Hq, M, D]; the cache [B, Hk, N, D], or with a table [pages, Hk, page_size, D] of N
    keys for each sequence. With k_new each head has one program more, that writes into the cache what no other reads.

    partial: float32 sums instead of o and lse where there are several splits: acc [Dv] of each row and split, then the
    m of all, then the l of all. UNIT: elements that strides of q, k and v are counted in. WHOLE: no tile of keys is in
    two pages."""
    rows = M * G
    tiles = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    r0 = pid % tiles * BLOCK_M
    hk = wide(pid // tiles % Hk)
    b = wide(pid // tiles // Hk % B)
    split = pid // tiles // Hk // B
    length = length_of(lengths, length_stride, b, N)
    shift = length - M
    cache, pages, new = head_of(
        k, v, k_strides, v_strides, table, table_strides, page_size, page_bits, k_new, v_new, new_strides, b, hk, UNIT
    )  # fmt: skip
    if k_new is not None and split == splits:
        if r0 == 0:
            append(cache, pages, new, shift, M, N, D, Dv, BLOCK_D, BLOCK_DV, 16)
        return
    lo, full, edge, hi, size = shares(
        r0, G, M, length, left, right, splits, BLOCK_M, BLOCK_N, LEAST
    )
    if k_new is not None:
        edge = tl.maximum(tl.minimum(edge, tl.maximum(shift, 0) // BLOCK_N * BLOCK_N), full)
    begin = lo + split * size
    end = tl.minimum(begin + size, hi)
    if partial is not None and begin >= hi:
        return
    # Rows beyond the last are the last again, and never stored.
    r = tl.minimum(r0 + tl.arange(0, BLOCK_M), rows - 1)
    m = r // G
    hq = hk * G + r % G
    start = 0
    since = left
    if left is not None:
        start = r0 // G + shift - left
        since = m + (shift - left)
    until = tl.zeros([BLOCK_M], tl.int32) + length
    if right is not None:
        until = tl.minimum(until, m + (shift + right + 1))
    slope = slopes
    if slopes is not None:
        slope = (tl.load(slopes + hq).to(tl.float32) * LOG2E)[:, None]
    d = tl.arange(0, CHUNK)
    q_strides = in_elements(q_strides, UNIT)
    q += (b * q_strides[0] + hq * q_strides[1] + m * wide(q_strides[2]))[:, None] + d[None, :]
    queries = (load_columns(q, d, D),)
    for column in tl.static_range(CHUNK, D, CHUNK):
        queries += (load_columns(q + column, d, D - column),)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in tl.static_range(3):  # before, in and after the keys that all rows see
        if part != 0 or left is not None:
            first = lo if part == 0 else full if part == 1 else edge
            last = full if part == 0 else edge if part == 1 else hi
            acc, m_i, l_i = fold_keys(
                acc, m_i, l_i, queries, cache, pages, new, m, tl.maximum(first, begin), tl.minimum(last, end),
                start, hi, since, until, shift, scale, softcap, slope,
                D, Dv, CHUNK, BLOCK_N, part != 1, FOLD, WHOLE, PRECISION, STAGES if part == 1 else 1,
            )  # fmt: skip
    l_i = tl.sum(l_i, 1)
    row = (b * Hk * G + hq) * M + m  # of [B, Hq, M]
    inside = r0 + tl.arange(0, BLOCK_M) < rows
    dv = tl.arange(0, BLOCK_DV)
    if partial is not None:
        row = row * splits + split
        plane = wide(B) * Hk * rows * splits
        tl.store(partial + row[:, None] * Dv + dv[None, :], acc, mask=within(inside, dv, Dv))
        tl.store(partial + plane * Dv + row, m_i, mask=inside)
        tl.store(partial + plane * (Dv + 1) + row, l_i, mask=inside)
    else:
        sink = sinks
        if sinks is not None:
            sink = (tl.load(sinks + hq).to(tl.float32) * LOG2E)[:, None]
        out, log_sum = finish(acc, m_i[:, None], l_i[:, None], sink)
        o += (b * o_strides[0] + hq * o_strides[1] + m * wide(o_strides[2]))[:, None] + dv[None, :]
        tl.store(o, out.to(o.dtype.element_ty), mask=within(inside, dv, Dv))
        if lse is not None:
            tl.store(lse + row[:, None], log_sum, mask=inside[:, None])


@triton.jit(do_not_specialize=["M", "N", "left", "right", "splits"])
def merge_kernel(
    partial, o, lse, o_strides, lengths, length_stride, Hq, G, M, N, left, right, sinks, splits,
    Dv: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one row of o, and its lse if there is one, from the sums of its splits: SPLITS at a time, in order."""
    row = wide(tl.program_id(0))
    plane = wide(tl.num_programs(0)) * splits
    m = (row % M).to(tl.int32)
    hq = row // M % Hq
    b = row // M // Hq
    length = length_of(lengths, length_stride, b, N)
    r0 = (m * G + (hq % G).to(tl.int32)) // BLOCK_M * BLOCK_M
    lo, _, _, hi, size = shares(r0, G, M, length, left, right, splits, BLOCK_M, BLOCK_N, LEAST)
    used = tl.cdiv(hi - lo, size)
    dv = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([SPLITS, COLUMNS], tl.float32)
    l_i = tl.zeros([SPLITS], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    for first in range(0, used, SPLITS):
        s = first + tl.arange(0, SPLITS)
        i = row * splits + s
        m_s = tl.load(partial + plane * Dv + i, mask=s < used, other=float("-inf"))
        l_s = tl.load(partial + plane * (Dv + 1) + i, mask=s < used, other=0.0)
        there = (s[:, None] < used) & (dv[None, :] < Dv)
        acc_s = tl.load(partial + i[:, None] * Dv + dv[None, :], mask=there, other=0.0)
        higher = tl.maximum(top, tl.max(m_s, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(m_s - pivot)
        shrink = tl.exp2(top - pivot)
        l_i = l_i * shrink + l_s * weight
        acc = acc * shrink + acc_s * weight[:, None]
        top = higher
    sink = sinks
    if sinks is not None:
        sink = tl.load(sinks + hq).to(tl.float32) * LOG2E
    out, log_sum = finish(tl.sum(acc, 0), top, tl.sum(l_i, 0), sink)
    to = b * o_strides[0] + hq * o_strides[1] + m * wide(o_strides[2])
    tl.store(o + to + dv, out.to(o.dtype.element_ty), mask=dv < Dv)
    if lse is not None:
        tl.store(lse + row, log_sum, mask=tl.program_id(1) == 0)
