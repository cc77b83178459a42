"""Which rows a step learns from: it depends on nothing but the seed and the step."""

from __future__ import annotations

import torch
from torch import Tensor


class Order:
    """Each epoch goes through all rows, in its own permutation; step n takes those from n·count on. Nothing has to be
    remembered in order to go on at step n."""

    def __init__(self, rows: int, *, seed: int, count: int) -> None:
        """count: rows of a step."""
        self.rows, self.seed, self.count = rows, seed, count
        self._last: tuple[int, Tensor] | None = None

    def epoch(self, number: int) -> Tensor:
        """The permutation of an epoch."""
        if self._last is None or self._last[0] != number:
            generator = torch.Generator().manual_seed((self.seed << 20) + number)
            self._last = number, torch.randperm(self.rows, generator=generator)
        return self._last[1]

    def step(self, number: int) -> list[int]:
        """The rows of a step."""
        first = number * self.count
        places = [divmod(i, self.rows) for i in range(first, first + self.count)]
        return [int(self.epoch(epoch)[i]) for epoch, i in places]
