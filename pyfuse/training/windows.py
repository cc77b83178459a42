"""A stream of tokens as sequences to learn from, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.training.loop import Batch


class Windows:
    """Window i holds tokens i·context … (i + 1)·context: each token but the first is a target exactly once.

    Each epoch goes through all windows, in its own permutation; step n takes those from n·count on. Nothing has to be
    remembered in order to go on at step n.
    """

    def __init__(
        self, tokens: Tensor, context: int, *, seed: int, count: int, what: str = "to learn from"
    ) -> None:
        """count: sequences of a step. what: the tokens, in an error."""
        self.tokens, self.context, self.seed, self.count = tokens, context, seed, count
        self._order: tuple[int, Tensor] | None = None
        if not len(self):
            raise ValueError(
                f"text: {len(tokens)} tokens {what}, but one window of context {context} needs {context + 1}"
            )

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._order = epoch, torch.randperm(len(self), generator=generator)
        return self._order[1]

    def rows(self, step: int) -> Batch:
        """ids and targets [count, context] of a step."""
        first = step * self.count
        places = [divmod(i, len(self)) for i in range(first, first + self.count)]
        return batch([self.window(int(self.order(epoch)[i])) for epoch, i in places])

    def window(self, i: int) -> Tensor:
        """Tokens [context + 1]"""
        return self.tokens[i * self.context : (i + 1) * self.context + 1]


def batch(windows: list[Tensor]) -> Batch:
    """Each position's target is the next token."""
    tokens = torch.stack(windows).long()
    return {"ids": tokens[:, :-1], "targets": tokens[:, 1:]}


def evenly(windows: Windows, count: int) -> list[Tensor]:
    """So many windows (all, if there are fewer) from the whole stream: always the same ones."""
    count = min(count, len(windows))
    return [windows.window(i * len(windows) // count) for i in range(count)]
