"""Philox4x32-10 in torch integer operations: the random numbers of every dropout.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The generator
has no state: a counter of four 32-bit words and a key of two give four random words, so that every
backend, tile size and thread count finds the same number for the same element.

How pyfuse uses it (what a kernel has to reproduce):
- key = (seed mod 2^32, offset mod 2^32), from the int64 tensor dropout_seed = (seed, offset);
- counter = (b, h, m, n >> 2), where (b, h, m, n) is the element's index in [B, H, M, N], and of the
  four output words the element takes number n & 3: one call serves four neighbours in n;
- the element is kept iff (its word >> 8) >= ceil(p · 2^24), a comparison of integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_UNIFORM_BITS = 24  # as many as a float32 holds exactly


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product. int64 wraps, but its 64 bits are the right ones."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Four random words of 32 bits for each counter.

    The words of counter and key are int64 tensors with values in [0, 2^32), broadcast against each
    other; so are the results. An index of each dimension in its own word, [B, 1, 1, 1] to [N], thus
    never builds the whole grid before the rounds need it.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _kept(word: Tensor, p: float) -> Tensor:
    return (word >> (32 - _UNIFORM_BITS)) >= math.ceil(p * (1 << _UNIFORM_BITS))


def _words(seed: Tensor, counter: Words4) -> Words4:
    key = seed.to(counter[0].device) & _WORD
    return philox4x32(counter, (key[0], key[1]))


def keep_mask(seed: Tensor, index: Words4, p: float) -> Tensor:
    """True where dropout with probability p keeps the element of that index (b, h, m, n).

    seed: int64 [2], (seed, offset); index: four broadcastable int64 tensors on one device, in any
    order. Where n counts up from 0, :func:`dropout_mask` gives the same for a quarter of the work.
    """
    b, h, m, n = index
    w0, w1, w2, w3 = _words(seed, (b, h, m, n >> 2))
    low, high = (n & 1) == 0, (n & 2) == 0
    return _kept(torch.where(high, torch.where(low, w0, w1), torch.where(low, w2, w3)), p)


def dropout_mask(
    seed: Tensor, shape: Sequence[int], p: float, device: torch.device | str | None = None
) -> Tensor:
    """:func:`keep_mask` over a whole [B, H, M, N] grid, counted from 0 in each dimension."""
    batch, heads, rows, columns = shape
    sizes = (batch, heads, rows, (columns + 3) // 4)
    b, h, m, group = (torch.arange(size, device=device) for size in sizes)
    words = _words(seed, (b[:, None, None, None], h[:, None, None], m[:, None], group))
    kept = torch.stack([_kept(word, p) for word in words], -1)  # [B, H, M, N/4, 4]
    return kept.flatten(-2)[..., :columns]
