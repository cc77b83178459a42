"""Where dropout's randomness enters: one draw per call from torch's default generator."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """(seed, offset) for one dropout: int64 [2] on the CPU, 64 random bits.

    It follows ``torch.manual_seed``, and torch.compile and activation checkpointing replay it as
    they do every other draw.
    """
    return torch.randint(0, 1 << 32, (2,), dtype=torch.int64)
