"""What the kernels of attention's backward share: p and the gradient of the scores of one tile, from q, k, v and do.

p = exp(s - lse);  dp = do vᵀ;  ds = p (dp - delta)            (Dao, arXiv:2307.08691, §3)
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_tile import in_band, logits, mask_tile, with_mask
from pyfuse.kernels.tiles import keep_tile


@triton.jit
def pair_gradients(
    a, x, c, y, lse2, rest, delta, m, n, queries, n0, M, N, end, left, right, scale, softcap, slope, mask, mask_strides,
    key0, key1, threshold, keep_scale, b, h,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr, BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, p as dv takes it, ds, tanh of capped scores) of a tile: s = a xᵀ, dp = c yᵀ.

    m and n, lse2, rest and delta broadcast to the tile: [BM, BN], or BY_KEY [BN, BM]; p = 2^(s - lse2 - rest). A pair
    that is not seen has p = ds = 0, whatever its key and value hold.
    """
    extra = mask
    if mask is not None:  # early, to be there after the product
        extra = mask_tile(mask, mask_strides, m, n, M, N, EDGE)
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
        s, seen = with_mask(s, seen, extra)
    s = s - lse2
    if rest is not None:
        s = s - rest
    p = tl.exp2(s)
    if GUARD:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(c, y.T, input_precision=PRECISION)
    stays = p
    if key0 is not None:
        keep = keep_tile(b, h, queries, n0, key0, key1, threshold, BLOCK_N)
        if BY_KEY:
            keep = keep.T
        stays = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if GUARD:
        ds = tl.where(seen, ds, 0.0)
        if softcap is not None:
            t = tl.where(seen, t, 0.0)
    return p, stays, ds, t


@triton.jit
def uncapped(ds, t, softcap):
    """The gradient of a score before its cap."""
    if softcap is not None:
        ds = ds * (1.0 - t * t)
    return ds
