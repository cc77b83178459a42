"""A stream of tokens as sequences to learn from."""

from __future__ import annotations

from torch import Tensor, stack

from pyfuse.training.loop import Batch
from pyfuse.training.order import Order


class Windows:
    """Window i holds tokens i·context … (i + 1)·context: each token but the first is a target exactly once.

    In which order they come: see `Order`.
    """

    def __init__(
        self, tokens: Tensor, context: int, *, seed: int, count: int, what: str = "to learn from"
    ) -> None:
        """count: sequences of a step. what: the tokens, in an error."""
        self.tokens, self.context = tokens, context
        if not len(self):
            raise ValueError(
                f"text: {len(tokens)} tokens {what}, but one window of context {context} needs {context + 1}"
            )
        self.order = Order(len(self), seed=seed, count=count)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def rows(self, step: int) -> Batch:
        """ids and targets [count, context] of a step."""
        return batch([self.window(i) for i in self.order.step(step)])

    def window(self, i: int) -> Tensor:
        """Tokens [context + 1]"""
        return self.tokens[i * self.context : (i + 1) * self.context + 1]


def batch(windows: list[Tensor]) -> Batch:
    """Each position's target is the next token."""
    tokens = stack(windows).long()
    return {"ids": tokens[:, :-1], "targets": tokens[:, 1:]}


def evenly(windows: Windows, count: int) -> list[Tensor]:
    """So many windows (all, if there are fewer) from the whole stream: always the same ones."""
    count = min(count, len(windows))
    return [windows.window(i * len(windows) // count) for i in range(count)]
