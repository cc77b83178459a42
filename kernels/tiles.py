"""What all kernels are written in: pointers to tiles, masked loads, one step of an online softmax, dropout's numbers.

Letters: B batch, Hq and Hk heads, M queries, N keys, D head size; m and n are indices of queries and keys. Strides
come as tuples of run-time integers, counted in elements. Offsets of whole heads and rows are 64-bit; those inside a
tile are 32-bit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def wide(x):
    """x in 64 bits; a stride of 1 comes as a constant, which has no .to()."""
    return x + tl.full((), 0, tl.int64)


@triton.jit
def head(base, strides, b, h):
    """First element of head (b, h) of a [B, H, T, D] tensor; b, h in 64 bits."""
    return base + b * strides[0] + h * strides[1]


@triton.jit
def tile(start, row_stride, rows, cols):
    """Pointers to rows x cols of a head with unit stride in D."""
    return start + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]


@triton.jit
def load_tile(pointers, rows, T, cols, D: tl.constexpr, ROWS: tl.constexpr):
    """A tile, zero outside of T rows (looked at if ROWS) and D columns."""
    if ROWS and cols.shape[0] != D:
        x = tl.load(pointers, mask=(rows[:, None] < T) & (cols[None, :] < D), other=0.0)
    elif ROWS:
        x = tl.load(pointers, mask=rows[:, None] < T, other=0.0)
    elif cols.shape[0] != D:
        x = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def has_nan(x):
    """For each row of x, whether it holds NaN or an infinity: their bits, without the sign, are the largest."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        infinity: tl.constexpr = 0x7F800000
    else:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
        infinity: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
    return tl.max(bits, 1) >= infinity


@triton.jit
def tanh(x):
    """To 2 ulp, small x included: a polynomial (Cephes, tanhf) below 0.625, 1 - 2 / (1 + e^2x) above."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = series * square * x + x
    large = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def philox(b, h, m, n4, key0, key1):
    """The four random words of Philox4x32-10 at counter (b, h, m, n4), as pyfuse/philox.py has them."""
    zero = (m + n4) * 0
    c0 = (zero + b).to(tl.int32).to(tl.uint32, bitcast=True)
    c1 = (zero + h).to(tl.int32).to(tl.uint32, bitcast=True)
    c2 = (zero + m).to(tl.uint32, bitcast=True)
    c3 = (zero + n4).to(tl.uint32, bitcast=True)
    k0 = (zero + key0).to(tl.uint32, bitcast=True)
    k1 = (zero + key1).to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, 10)


@triton.jit
def kept(word, threshold):
    """Whether the element of this word stays: 24 of its bits against ceil(p 2^24)."""
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def keep_tile(b, h, m, n0, key0, key1, threshold, BLOCK_N: tl.constexpr):
    """Dropout's mask [BM, BLOCK_N] of the queries m and the keys from n0 on, a multiple of 4."""
    n4 = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = philox(b, h, m[:, None], n4[None, :], key0, key1)
    even = tl.join(kept(w0, threshold).to(tl.int8), kept(w2, threshold).to(tl.int8))
    odd = tl.join(kept(w1, threshold).to(tl.int8), kept(w3, threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (m.shape[0], BLOCK_N)) != 0
