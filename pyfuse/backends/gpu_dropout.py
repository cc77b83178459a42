"""What kernels on GPUs are told of dropout."""

from __future__ import annotations

import math

from torch import Tensor

Words = tuple[int, int, int, float]


def words(p: float, seed: Tensor | None) -> Words | None:
    """Two words of the key, the least 24-bit number that is kept, and 1 / (1 - p); None for no dropout."""
    if p == 0.0:
        return None
    if seed is None:
        raise ValueError("dropout_seed: got None, but dropout_p > 0 needs int64 (seed, offset)")
    low, high = (word & 0xFFFFFFFF for word in seed.tolist())
    return low, high, math.ceil(p * (1 << 24)), 1.0 / (1.0 - p)
