"""Philox4x32-10 in torch integer operations: the random numbers of every dropout.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The generator
has no state: a counter of four 32-bit words and a key of two give four random words, so that every
backend, tile size and thread count finds the same number for the same element.

How pyfuse uses it (what a kernel has to reproduce):
- key = (seed mod 2^32, offset mod 2^32), from the int64 tensor dropout_seed = (seed, offset);
- counter = (b, h, m, n), the element's index in [B, H, M, N];
- the element is kept iff (first output word >> 8) >= ceil(p · 2^24), a comparison of integers.
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


def keep_mask(seed: Tensor, counter: Words4, p: float) -> Tensor:
    """True where dropout with probability p keeps the element of that counter.

    seed: int64 [2], (seed, offset); counter: four broadcastable int64 tensors on one device.
    """
    key = seed.to(counter[0].device) & _WORD
    word = philox4x32(counter, (key[0], key[1]))[0]
    return (word >> (32 - _UNIFORM_BITS)) >= math.ceil(p * (1 << _UNIFORM_BITS))


def dropout_mask(
    seed: Tensor, shape: Sequence[int], p: float, device: torch.device | str | None = None
) -> Tensor:
    """:func:`keep_mask` over a whole [B, H, M, N] grid, counted from 0 in each dimension."""
    b, h, m, n = (torch.arange(size, device=device) for size in shape)
    counter = (b[:, None, None, None], h[:, None, None], m[:, None], n)
    return keep_mask(seed, counter, p)
