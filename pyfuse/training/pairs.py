"""Questions and answers as batches of an encoder-decoder, and its answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyfuse.models.transformer import Transformer
from pyfuse.training.loop import IGNORED, Batch, mixed
from pyfuse.training.tokens import Tokenizer

Pair = tuple[str, str]


class Pairs:
    """Fresh examples for each step, which follow from the seed and the step."""

    def __init__(
        self, make: Callable[[random.Random], Pair], tokenizer: Tokenizer, *, seed: int, count: int
    ) -> None:
        """make: an example from a generator. count: examples of a step."""
        self.make, self.tokenizer, self.seed, self.count = make, tokenizer, seed, count

    def rows(self, step: int) -> Batch:
        generator = random.Random(mixed(self.seed, step))
        return batch([self.make(generator) for _ in range(self.count)], self.tokenizer)


def batch(pairs: Sequence[Pair], tokenizer: Tokenizer) -> Batch:
    """ids, mask [B, S]: the questions, and where they are no padding. decoder_ids, targets [B, T]: before each token of
    an answer the decoder is given the right ones before it, whatever it would have said (teacher forcing: Williams and
    Zipser, Neural Computation 1(2), 1989); an answer begins after the token that ends it.
    """
    assert tokenizer.end is not None
    questions, answers = (_encoded([pair[i] for pair in pairs], tokenizer) for i in (0, 1))
    end = torch.tensor([tokenizer.end])
    return {
        "ids": _padded(questions, tokenizer.end),
        "mask": _padded([torch.ones_like(q) for q in questions], 0),
        "decoder_ids": _padded([torch.cat((end, a)) for a in answers], tokenizer.end),
        "targets": _padded([torch.cat((a, end)) for a in answers], IGNORED),
    }


def _encoded(texts: list[str], tokenizer: Tokenizer) -> list[Tensor]:
    found = tokenizer.library.encode_batch_fast(texts, add_special_tokens=False)
    return [torch.tensor(e.ids, dtype=torch.int64) for e in found]


def _padded(rows: list[Tensor], value: int) -> Tensor:
    """On the right, to the longest."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


@torch.no_grad()
def greedy(model: Transformer, memory: Tensor, mask: Tensor, *, end: int, longest: int) -> Tensor:
    """The token of the largest logit, again and again: [B, longest], with `end` from the end of an answer on.

    memory, mask: `Transformer.encode`'s result and argument. Each step computes the whole answer so far.
    """
    y = torch.full((len(memory), longest + 1), end, device=memory.device)
    speaking = torch.ones_like(y[:, 0], dtype=torch.bool)
    for t in range(longest):
        said = model(y[:, : t + 1], memory=memory, memory_mask=mask)[:, -1].argmax(-1)
        y[:, t + 1] = said.masked_fill(~speaking, end)
        speaking &= said != end
        if not speaking.any():
            break
    return y[:, 1:]
