"""Attention once more, from its definition: Python loops over numbers, sharing no code with pyfuse.

Slow, for a handful of queries and keys: it checks the eager formula, which checks everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Band = tuple[int | None, int | None]


Counter = tuple[int, int, int, int]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def philox_word(index: Counter, key: tuple[int, int]) -> int:
    """The random word of the element (b, h, m, n): four neighbours in n share a counter."""
    b, h, m, n = index
    return philox((b, h, m, n // 4), key)[n % 4]


def sees(i: int, j: int, m: int, n: int, *, causal: bool, band: Band, length: int | None) -> bool:
    """Whether query i of m may see key j of n, masks aside; the last query is on the last key."""
    here = i + n - m
    left, right = band
    if causal and j > here:
        return False
    if left is not None and j < here - left:
        return False
    if right is not None and j > here + right:
        return False
    return length is None or j < length


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    band: Band = (None, None),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dropout: tuple[float, int, int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse) in float64; dropout = (p, seed, offset)."""
    (batch, heads, m, _), n = q.shape, k.shape[2]
    group = heads // max(k.shape[1], 1)
    full = None if mask is None else mask.expand(batch, heads, m, n).detach().numpy()
    qs, ks, vs = (x.detach().double().numpy() for x in (q, k, v))
    o = np.zeros((batch, heads, m, v.shape[3]))
    lse = np.full((batch, heads, m), -math.inf)
    for b, h, i in np.ndindex(batch, heads, m):
        length = None if seqlens_k is None else int(seqlens_k[b])
        seen = [
            j
            for j in range(n)
            if sees(i, j, m, n, causal=causal, band=band, length=length)
            and _allowed(full, b, h, i, j)
        ]
        score = _scorer(qs[b, h, i], ks[b, h // group], softcap, scale)
        scores = {}
        for j in seen:
            scores[j] = score(j)
            if full is not None and full.dtype != np.bool_:
                scores[j] += float(full[b, h, i, j])
            if alibi_slopes is not None:
                scores[j] -= float(alibi_slopes[h]) * abs(i + n - m - j)
        total = sum(math.exp(s) for s in scores.values())
        if sinks is not None:
            total += math.exp(float(sinks[h]))
        if total > 0:
            lse[b, h, i] = math.log(total)
        for j, s in scores.items():
            weight = math.exp(s) / total
            if dropout is not None:
                p, seed, offset = dropout
                uniform = (philox_word((b, h, i, j), (seed, offset)) >> 8) / 2**24
                weight = weight / (1 - p) if uniform >= p else 0.0
            o[b, h, i] += weight * vs[b, h // group, j]
    return torch.from_numpy(o), torch.from_numpy(lse)


def _allowed(mask: np.ndarray | None, b: int, h: int, i: int, j: int) -> bool:
    if mask is None:
        return True
    value = mask[b, h, i, j]
    return bool(value) if mask.dtype == np.bool_ else value != -math.inf


def _scorer(
    query: np.ndarray, keys: np.ndarray, softcap: float | None, scale: float | None
) -> Callable[[int], float]:
    def score(j: int) -> float:
        factor = 1 / math.sqrt(len(query)) if scale is None else scale
        s = factor * sum(float(a) * float(b) for a, b in zip(query, keys[j], strict=True))
        return s if softcap is None else softcap * math.tanh(s / softcap)

    return score
