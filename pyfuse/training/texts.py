"""Labelled texts as batches: each as long as its longest text, and a mask of what is text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from pyfuse.training.labelled import Part
from pyfuse.training.loop import Batch
from pyfuse.training.order import Order
from pyfuse.training.tokens import Tokenizer, from_json

PADDING = ("[PAD]", "<pad>")


class Texts:
    """Token ids of texts, cut to `context` tokens, with the marks that the tokenizer puts around them ([CLS], [SEP]).

    A step takes its rows by `Order`. padding: the id beside a text.
    """

    def __init__(
        self, part: Part, tokenizer: Tokenizer, context: int, *, seed: int, count: int
    ) -> None:
        """count: texts of a step. ValueError: context leaves no room beside the marks."""
        library = from_json(
            tokenizer.json
        ).library  # a copy: the checkpoint has the one that does not cut
        marks = library.num_special_tokens_to_add(False)
        if context <= marks:
            raise ValueError(
                f"--context: {context} tokens, of which the tokenizer's marks take {marks}"
            )
        library.enable_truncation(context)
        encoded = library.encode_batch_fast(part.texts)
        self.ids = [torch.tensor(e.ids, dtype=torch.int32) for e in encoded]
        self.targets = torch.tensor(part.targets)
        self.padding = padding(tokenizer)
        self.order = Order(len(self.ids), seed=seed, count=count)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, step: int) -> Batch:
        """ids, mask [count, T] and targets [count] of a step."""
        return self.batch(self.order.step(step))

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = [self.ids[i].long() for i in rows]
        ids = pad_sequence(chosen, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(t) for t in chosen])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"ids": ids, "mask": mask, "targets": self.targets[list(rows)]}

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """These rows, the shortest first, so that little is padded."""
        sorted_rows = sorted(rows, key=lambda i: len(self.ids[i]))
        for i in range(0, len(sorted_rows), size):
            yield self.batch(sorted_rows[i : i + size])


def padding(tokenizer: Tokenizer) -> int:
    """The id of what pads; of any token if it has none, since padding is masked."""
    ids = (tokenizer.library.token_to_id(name) for name in PADDING)
    return next((i for i in ids if i is not None), 0)
