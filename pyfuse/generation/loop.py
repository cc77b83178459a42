"""Text from a model, token by token: greedy and by sampling. Beam search: `pyfuse.generation.beam`.

results = generate(model, ["The sky is", "Once"], tokenizer=tokenizer, max_new_tokens=64)
for piece in stream(model, "The sky is", tokenizer=tokenizer, temperature=0.7, top_p=0.9, seed=3):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyfuse.generation.beam import search
from pyfuse.generation.options import Options
from pyfuse.generation.processors import Pipeline
from pyfuse.generation.request import Prompts, Request, make_request
from pyfuse.generation.runner import Runner
from pyfuse.generation.sampling import Logprob, sample
from pyfuse.generation.sequence import Piece, Result, Row
from pyfuse.generation.text import Tokenizer
from pyfuse.models.transformer import Transformer

if TYPE_CHECKING:
    from pyfuse.generation.speculative import Speculate

Callback = Callable[[Piece], None]


def generate(
    model: Transformer | Runner, prompts: Prompts, *, tokenizer: Tokenizer | None = None,
    options: Options | None = None, decoder_start: int | Sequence[int] | None = None,
    callback: Callback | None = None, speculate: Speculate | None = None, draft_tokens: int | None = None,
    **knobs: Any,
) -> list[Result]:  # fmt: skip
    """What the model says after each prompt: n results for each, prompt by prompt.

    model: a Transformer, or a Runner, which keeps what it knows of earlier prompts, and takes as many sequences at once
      as it was made for; further prompts wait until others have ended.
    prompts: a text (needs a tokenizer), ids as a sequence or tensor [T], or several of them, of any lengths, unpadded.
      A model with an encoder reads them there; its decoder starts with `decoder_start`, by default the tokenizer's.
    options, or its fields as further arguments (`Options`): how to choose tokens, and when to end. A sequence ends at
      the latest where the model's context does, whatever max_new_tokens says. Stop tokens are the tokenizer's, unless
      options say others. The seed is the prompt's own: its text does not depend on which prompts are beside it, nor on
      the number of threads; sequence i of n is drawn by (seed, i).
    callback: called with every `Piece` as it comes. With beams there are none before the end: ValueError.
    speculate: guess several tokens and have them checked in one call (`pyfuse.generation.speculative`): "prompt" takes
      them from what prompt and text have said before, a smaller Transformer with the same vocabulary, or its Runner,
      says them itself. The texts are the same; `Result.speculation` tells how many guesses were right. How many tokens
      are guessed at a time follows from that, draft_tokens at most, 15 by default. Not with beams: ValueError.

    ValueError: a prompt without tokens, with an unknown one, or as long as the model's context; contradictions in
    options; logits that are NaN. CacheFull: the runner has no room.
    """
    request = make_request(model, prompts, tokenizer, options, decoder_start, knobs)
    loop = _loop(request, speculate, draft_tokens, callback is not None)
    if request.options.searches:
        if callback is not None:
            raise ValueError("callback: beam search has no tokens before its end (needs beams=1)")
        return search(request)
    rows: list[Row] = []
    with loop:
        while loop.busy:
            for row, token in loop.step():
                if callback is not None:
                    callback(loop.piece(row, token))
                if row.finish_reason is not None:
                    rows.append(row)
    rows.sort(key=lambda row: (row.prompt, row.index))
    return [row.result(tokenizer) for row in rows]


def stream(
    model: Transformer | Runner, prompts: Prompts, *, tokenizer: Tokenizer | None = None,
    options: Options | None = None, decoder_start: int | Sequence[int] | None = None,
    speculate: Speculate | None = None, draft_tokens: int | None = None, **knobs: Any,
) -> Generator[Piece, None, None]:  # fmt: skip
    """The pieces of `generate`'s results as they come, those of several sequences by turns. Arguments, errors: there.

    Arguments are checked at once, not at the first piece. An iterator that is dropped before its end, or closed, gives
    everything back. ValueError: beams, which have no tokens before their end.
    """
    request = make_request(model, prompts, tokenizer, options, decoder_start, knobs)
    if request.options.searches:
        raise ValueError("beams: beam search has no tokens before its end, so nothing to stream")
    return _pieces(_loop(request, speculate, draft_tokens, True))


def _pieces(loop: Loop) -> Generator[Piece, None, None]:
    with loop:
        while loop.busy:
            for row, token in loop.step():
                yield loop.piece(row, token)


def _loop(
    request: Request, speculate: Speculate | None, draft_tokens: int | None, streams: bool
) -> Loop:
    from pyfuse.generation.speculative import speculative_loop  # whose loop is made of this one

    if speculate is not None:
        return speculative_loop(request, speculate, draft_tokens, streams=streams)
    if draft_tokens is not None:
        raise ValueError(f"draft_tokens: got {draft_tokens}, but without speculate there are none")
    return Loop(request, streams=streams)


class Loop:
    """Rows that advance together by a token a step. Prompts join as soon as there is room for them.

    As a context it gives back what the runner holds for it, whatever happens.
    """

    def __init__(self, request: Request, *, streams: bool = False) -> None:
        """streams: whether rows carry their text along."""
        self.request, self.runner, self.streams = request, request.runner, streams
        self.rows: list[Row] = []
        self._choose = Chooser([])

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error: object) -> None:
        for row in self.rows:
            self.runner.end(row.slot)
        self.rows = []

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.request.waiting)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int | None]]:
        """Every row's next token, which it has accepted; None for a stop token. Rows that ended with it have left."""
        return self._advance(self._join() if self.request.waiting else [])

    def _advance(self, fresh: list[Row]) -> list[tuple[Row, int | None]]:
        """A step in which these rows have joined."""
        work = [(row.slot, row.tokens[row.slot.length :]) for row in self.rows]
        logits = self.runner.forward(work).float()
        if fresh:
            logits = self._split(fresh, logits)
        rows = self.rows
        if self._choose.rows is not rows:
            self._choose = Chooser(rows)
        tokens, logprobs = self._choose(logits)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.accept(token, logprob)
        self._let_go()
        return [
            (row, None if token in row.stop_tokens else token)
            for row, token in zip(rows, tokens, strict=True)
        ]

    def piece(self, row: Row, token: int | None) -> Piece:
        """Of what `step` has returned."""
        text = None if row.text is None else row.text.take()
        logprob = row.logprobs[-1] if row.logprobs and token is not None else None
        result = None if row.finish_reason is None else row.result(self.request.tokenizer)
        return Piece(row.prompt, row.index, token, text, logprob, result)

    def _join(self) -> list[Row]:
        """Prompts that have got a slot, a row for each."""
        fresh = []
        for prompt, slot in self.request.take():
            row = self.request.row(prompt, with_text=self.streams)
            row.slot = slot
            fresh.append(row)
            self.rows = [*self.rows, row]
        return fresh

    def _split(self, fresh: list[Row], logits: Tensor) -> Tensor:
        """The other sequences of the fresh rows' prompts begin from what has been computed. Logits of all rows."""
        at = list(range(len(self.rows)))
        for i in range(len(self.rows) - len(fresh), len(self.rows)):
            first = self.rows[i]
            for index in range(1, self.request.options.n):
                row = self.request.row(first.prompt, index, with_text=self.streams)
                row.slot = self.runner.fork(first.slot)
                self.rows.append(row)
                at.append(i)
        return logits[at] if len(at) > len(logits) else logits

    def _let_go(self) -> None:
        """Of rows that have ended."""
        if all(row.finish_reason is None for row in self.rows):
            return
        ended = [row for row in self.rows if row.finish_reason is not None]
        self.rows = [row for row in self.rows if row.finish_reason is None]
        for row in ended:
            self.runner.end(row.slot)
            self.request.free(row.prompt)


class Chooser:
    """The next token of each of some rows, by its own options."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        alike: dict[tuple[int, frozenset[int]], list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault((id(row.options), row.stop_tokens), []).append(i)
        self._groups = [(at, Group([rows[i] for i in at])) for at in alike.values()]

    def __call__(self, logits: Tensor) -> tuple[list[int], list[Logprob | None]]:
        """Tokens and, where they are asked for, log-probabilities. logits: the model's, float32 [R, V]."""
        if len(self._groups) == 1:
            return self._groups[0][1].choose(logits)
        tokens, logprobs = [0] * len(self.rows), list[Logprob | None]([None] * len(self.rows))
        for at, group in self._groups:
            for i, token, logprob in zip(at, *group.choose(logits[at]), strict=True):
                tokens[i], logprobs[i] = token, logprob
        return tokens, logprobs


class Group:
    """Rows of the same `Options`."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.options = rows, rows[0].options
        self._tokens, self._seeds = [row.tokens for row in rows], [row.seed for row in rows]
        self._unknown: list[Logprob | None] = [None] * len(rows)
        stop, starts = sorted(rows[0].stop_tokens), [row.start for row in rows]
        self._pipeline = Pipeline(self.options, stop, starts)

    def choose(self, logits: Tensor) -> tuple[list[int], list[Logprob | None]]:
        """See `Chooser`."""
        penalized = logits
        if self._pipeline.has_penalties:
            penalized = self._pipeline.penalize(self._tokens, logits)
        steps = [row.step for row in self.rows]
        tokens, logprobs = sample(penalized, self.options, self._seeds, steps, logits)
        return tokens, self._unknown if logprobs is None else list(logprobs)
