"""Sequences with tokens to be found out (Devlin et al., arXiv:1810.04805, section 3.1).

Of a sequence's tokens a share is chosen; of these 80 % become [MASK], 10 % a random token, 10 % stay. Only the chosen
ones are targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.training.loop import IGNORED, Batch, mixed
from pyfuse.training.tokens import Tokenizer
from pyfuse.training.windows import Windows

HIDDEN, RANDOM = 0.8, 0.1  # of the chosen tokens
_NAMES = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}


class Marks(NamedTuple):
    """The ids of the tokens before and after a sequence, and of the one that hides another."""

    cls: int
    sep: int
    mask: int


def marks(tokenizer: Tokenizer) -> Marks:
    """ValueError: the tokenizer lacks one of them."""
    found = {}
    for part, names in _NAMES.items():
        ids = (tokenizer.library.token_to_id(name) for name in names)
        one = next((i for i in ids if i is not None), None)
        if one is None:
            raise ValueError(f"--from: its tokenizer has no {' or '.join(names)}")
        found[part] = one
    return Marks(**found)


class Masking:
    """Sequences [CLS] tokens [SEP] with some of their tokens hidden. vocabulary: a random token is 0 … vocabulary - 1.

    share: of the tokens but the marks; at least one of each sequence.
    """

    def __init__(self, marks: Marks, vocabulary: int, share: float) -> None:
        self.marks, self.vocabulary, self.share = marks, vocabulary, share

    def batch(self, windows: list[Tensor], *seed: int) -> Batch:
        """ids and targets [len(windows), T + 2] of windows of T tokens: the same for the same seed."""
        rows = torch.stack(windows).long()
        ends = torch.ones_like(rows[:, :1])
        ids = torch.cat((ends * self.marks.cls, rows, ends * self.marks.sep), 1)
        generator = torch.Generator().manual_seed(mixed(*seed))
        chosen = self._chosen(ids, generator)
        targets = ids.where(chosen, IGNORED)
        u = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        ids = ids.masked_fill(chosen & (u < HIDDEN), self.marks.mask)
        ids = others.where(chosen & (u >= HIDDEN) & (u < HIDDEN + RANDOM), ids)
        return {"ids": ids, "targets": targets}

    def _chosen(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """In each row so many, rounded, each set of them as likely as any other."""
        usual = (ids != self.marks.cls) & (ids != self.marks.sep)
        count = (usual.sum(1, keepdim=True) * self.share).round().clamp_min(1)
        u = torch.rand(ids.shape, generator=generator).masked_fill(~usual, 2.0)
        return usual & (u.argsort(stable=True, dim=1).argsort(1) < count)


class Masked:
    """Windows of a text with other tokens hidden in each step, which follow from (seed, step)."""

    def __init__(self, windows: Windows, masking: Masking, seed: int) -> None:
        self.windows, self.masking, self.seed = windows, masking, seed

    def rows(self, step: int) -> Batch:
        """ids and targets [count, context] of a step; a target is -100 where nothing is to be found out."""
        chosen = [inner(self.windows.window(i)) for i in self.windows.order.step(step)]
        return self.masking.batch(chosen, self.seed, step)


def inner(window: Tensor) -> Tensor:
    """A window without its last token, which the next one begins with: here no token is another one's target."""
    return window[:-1]
