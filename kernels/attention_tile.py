"""What forward and backward of attention share: which keys a query sees, and what becomes of a score.

    s = scale q·k;  s = c tanh(s / c);  s = s + bias - slope |i + N - M - j|;  s = -inf where the query may not look

all in units of log 2, so that one exp2 makes weights of them. Query i stands on key i + N - M: `here` is that place.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.tiles import LOG2E, tanh, wide


@triton.jit
def segment(pid, cu, B, T, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """(segment, block in it) of program `pid` when each segment takes as many blocks as its rows need.

    Segment 0 are the rows before the first sequence, B + 1 those after the last; b + 1 is sequence b.
    """
    found = tl.full((), 0, tl.int32)
    blocks_before = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    for first in range(0, B + 2, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        low = tl.load(cu + i - 1, mask=(i > 0) & (i < B + 2), other=0).to(tl.int32)
        high = tl.load(cu + i, mask=i < B + 1, other=T).to(tl.int32)
        blocks = tl.where(i < B + 2, tl.cdiv(high - low, BLOCK), 0)
        ends = total + tl.cumsum(blocks, 0)
        passed = (ends <= pid) & (i < B + 2)
        found += tl.sum(passed.to(tl.int32), 0)
        blocks_before += tl.sum(tl.where(passed, blocks, 0), 0)
        total += tl.sum(blocks, 0)
    return found, pid - blocks_before


@triton.jit
def rows_of(cu, found, B, T):
    """First row and number of rows of a segment."""
    low = tl.load(cu + found - 1, mask=found > 0, other=0)
    high = tl.load(cu + found, mask=found <= B, other=T)
    return wide(low), (high - low).to(tl.int32)


@triton.jit
def keys_of(cu, found, B):
    """First key and number of keys of a segment; rows of no sequence have none."""
    inside = (found > 0) & (found <= B)
    low = tl.load(cu + found - 1, mask=inside, other=0)
    high = tl.load(cu + found, mask=inside, other=0)
    return wide(low), (high - low).to(tl.int32)


@triton.jit
def key_ranges(m0, M, N, end, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bounds lo <= a <= b <= hi of the keys that the block of queries at m0 sees, all but hi multiples of BLOCK_N:
    in [a, b) every query sees every key, outside of [lo, hi) none sees any. left, right: None for no limit."""
    first = m0 + N - M
    last = tl.minimum(m0 + BLOCK_M, M) - 1 + N - M
    hi = end
    full = end
    if right is not None:
        hi = tl.minimum(hi, tl.maximum(last + right + 1, 0))
        full = tl.minimum(full, tl.maximum(first + right + 1, 0))
    lo = 0
    a = 0
    if left is not None:
        lo = tl.minimum(tl.maximum(first - left, 0), hi) // BLOCK_N * BLOCK_N
        a = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
        a = tl.minimum(a, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
        a = tl.maximum(a, lo)
    b = tl.maximum(full // BLOCK_N * BLOCK_N, a)
    return lo, a, b, hi


@triton.jit
def query_ranges(n0, M, N, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of the queries that see a block of keys at n0; of whole blocks of keys, all of them before `end`."""
    shift = N - M
    last = n0 + BLOCK_N - 1
    lo = 0
    a = 0
    hi = M
    full = M
    if right is not None:
        lo = tl.minimum(tl.maximum(n0 - right - shift, 0), M) // BLOCK_M * BLOCK_M
        a = tl.cdiv(tl.minimum(tl.maximum(last - right - shift, 0), M), BLOCK_M) * BLOCK_M
    if left is not None:
        hi = tl.minimum(tl.maximum(last + left - shift + 1, 0), M)
        full = tl.minimum(tl.maximum(n0 + left - shift + 1, 0), M)
        hi = tl.maximum(hi, lo)
        a = tl.minimum(a, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    a = tl.maximum(a, lo)
    b = tl.maximum(full // BLOCK_M * BLOCK_M, a)
    return lo, a, b, hi


@triton.jit
def edges(lo, a, c, hi, BLOCK: tl.constexpr):
    """How many blocks lie in [lo, a) and [c, hi), where not every pair is seen, and how many of them in [lo, a)."""
    before = tl.cdiv(tl.minimum(a, hi) - lo, BLOCK)
    return before + tl.cdiv(tl.maximum(hi - c, 0), BLOCK), before


@triton.jit
def edge_block(i, before, lo, c, BLOCK: tl.constexpr):
    """Where the i-th of those blocks starts."""
    return tl.where(i < before, lo + i * BLOCK, c + (i - before) * BLOCK)


@triton.jit
def in_band(m, n, shift, end, left, right):
    """Whether query m sees key n; m and n broadcast against each other."""
    seen = (n < end) & (m >= 0)
    if right is not None:
        seen &= n <= m + (shift + right)
    if left is not None:
        seen &= n >= m + (shift - left)
    return seen


@triton.jit
def mask_tile(start, strides, m, n, M, N, EDGE: tl.constexpr):
    """Elements (m, n) of one head's mask; beyond its edges (EDGE: of the keys, too) those at the edge, never used."""
    row = start + tl.minimum(m, M - 1).to(tl.int64) * strides[2]
    col = n
    if EDGE:
        col = tl.minimum(n, N - 1)
    place = row + col.to(tl.int64) * strides[3]
    # In a branch, always taken, that hides the load from Triton (3.7 to 3.9). Else it passes it through shared memory,
    # in a layout that conflicts there; and a bool mask's bytes make it choose operands as for products of bytes
    # (kWidth), which are too wide for tiles of 16 keys: results were wrong.
    if M > 0:
        x = tl.load(place)
    else:
        x = tl.zeros(place.shape, start.dtype.element_ty)
    return x


@triton.jit
def logits(s, scale, softcap, slope, m, n, shift):
    """(scores in units of log 2, the tanh of those that are capped).

    scale: with log2(e), or, if there is a cap, over it; softcap: the cap with log2(e); slope: with log2(e)."""
    s = s * scale
    t = s
    if softcap is not None:
        t = tanh(s)
        s = t * softcap
    if slope is not None:
        s = s - slope * tl.abs(m + shift - n).to(tl.float32)
    return s, t


@triton.jit
def with_mask(s, seen, mask):
    """(s with a float mask added, seen with what either kind of mask hides); s in units of log 2."""
    if mask.dtype == tl.int1:
        seen = seen & mask
    else:
        bias = mask.to(tl.float32) * LOG2E  # finfo(float32).min overflows and hides as -inf
        s = s + bias
        seen = seen & (bias != float("-inf"))
    return s, seen
