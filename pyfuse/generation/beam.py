"""Beam search: of all sequences that go on, only the best few of each step are followed.

A prompt's beams are in `beam_groups` groups of the same size B; without diversity there is one group. In every step,
for each group in turn,

    score(beam + i) = score(beam) + p[i],     p = penalties(ln softmax(logits of beam) - diversity_penalty · c)

where c[i] says how many beams of earlier groups have just gone on with token i (Vijayakumar et al., "Diverse beam
search", arXiv:1610.02424). The best max(2, 1 + stop tokens)·B of these are looked at, best first: those that end are
kept as results if they are among the first B, and the first B of the others are the next beams. A result's score is
its sum divided by length**length_penalty, where length counts its new tokens, a stop token included; of the results a
group keeps the best B. A group is finished with B results

    early_stopping=True      at once;
    early_stopping=False     when no beam would be better than the worst of them if it ended now;
    early_stopping="never"   when none can become better: with a positive length penalty, if it had the largest length.

This is what Hugging Face's `generate` does, and so it finds the same sequences. But there a finished group goes on with
padding, which counts as a token in c; here it has no part in c any more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyfuse.generation.processors import Pipeline
from pyfuse.generation.request import Request
from pyfuse.generation.runner import Slot
from pyfuse.generation.sampling import Logprob, log_probabilities
from pyfuse.generation.sequence import Result, Row

_BLOCK = 64  # of scores that are looked at together

Candidate = tuple[float, int, int, Logprob | None]  # score, which row, token


def search(request: Request) -> list[Result]:
    """The best n sequences of each prompt, best first; fewer where there are no more, as when tokens are forced.

    ValueError: logits that are NaN, or leave no token.
    """
    results: dict[int, list[Result]] = {}
    searches: list[Search] = []
    try:
        while searches or request.waiting:
            for prompt, slot in request.take():
                searches.append(Search(request, prompt, slot))
            _step(request, searches)
            for one in [s for s in searches if s.finished]:
                searches.remove(one)
                results[one.prompt] = one.results()
                request.free(one.prompt, request.rows)
    finally:
        for one in searches:
            one.end()
    return [result for prompt in sorted(results) for result in results[prompt]]


@torch.inference_mode()
def _step(request: Request, searches: list[Search]) -> None:
    work = [one.work() for one in searches]
    logits = request.runner.forward([each for works in work for each in works]).float()
    for one, rows in zip(searches, logits.split([len(works) for works in work]), strict=True):
        one.advance(rows)


@dataclass
class Group:
    """The beams that go on, and the best that have ended, both best first."""

    rows: list[Row]
    ended: list[tuple[float, Row]] = field(default_factory=list)
    finished: bool = False


class Search:
    """The beams of a prompt. Those of the same beginning share its pages in the runner."""

    def __init__(self, request: Request, prompt: int, slot: Slot) -> None:
        self.prompt, self.options, self.slots = prompt, request.options, [slot]
        self._runner, self._tokenizer = request.runner, request.tokenizer
        self._size = self.options.beams // self.options.beam_groups
        self._looked_at = max(2, 1 + len(request.stop_tokens)) * self._size
        first = request.row(prompt)
        first.slot = slot
        self.groups = [Group([first.fork()]) for _ in range(self.options.beam_groups)]

    @property
    def finished(self) -> bool:
        return all(group.finished for group in self.groups)

    def work(self) -> list[tuple[Slot, list[int]]]:
        """For `Runner.forward`: each slot with the tokens that it does not have yet."""
        new = {id(row.slot): row.tokens[row.slot.length :] for row in self._rows()}
        return [(slot, new[id(slot)]) for slot in self.slots]

    def advance(self, logits: Tensor) -> None:
        """One step. logits: the model's, float32, a row for each of `work`."""
        gone_on = Counter[int]()
        for group in self.groups:
            if not group.finished:
                gone_on.update(self._advance(group, logits, gone_on))
        self._seat()

    def results(self) -> list[Result]:
        ended = [each for group in self.groups for each in group.ended]
        ended.sort(key=lambda each: -each[0])
        return [row.result(self._tokenizer, score) for score, row in ended[: self.options.n]]

    def end(self) -> None:
        """Give all slots back."""
        while self.slots:
            self._runner.end(self.slots.pop())

    def _rows(self) -> Iterator[Row]:
        return (row for group in self.groups for row in group.rows)

    def _advance(self, group: Group, logits: Tensor, gone_on: Counter[int]) -> list[int]:
        """One step of a group. Returns the tokens that its beams go on with, if only to the end of their length."""
        rows = group.rows
        best, candidates = self._candidates(
            rows, _rows_of(logits, [row.at for row in rows]), gone_on
        )
        group.rows = []
        for rank, (score, at, token, logprob) in enumerate(candidates):
            row = rows[at].fork()
            row.score = score
            if not row.accept(token, logprob) or row.finish_reason == "length":
                group.rows.append(row)
            elif rank < self._size:
                self._keep(group, row)
            if len(group.rows) == self._size:
                break
        tokens = [row.tokens[-1] for row in group.rows]
        self._close(group, best)
        return tokens

    def _close(self, group: Group, best: float) -> None:
        """The group is finished if its beams cannot go on, or need not. best: score of the best candidate.

        In two details Hugging Face's search with groups differs from the one without: there, the best candidate counts
        even if it has just ended, and what the end of the length cuts off does not, if the group is complete without.
        """
        apart = self.options.beam_groups > 1
        if group.rows and not apart:
            best = group.rows[0].score
        over = not group.rows or self._is_over(group, best)
        if group.rows and group.rows[0].finish_reason is not None:
            for row in [] if over and apart else group.rows:
                self._keep(group, row)
            over = True
        group.finished = over
        if over:
            group.rows = []

    def _candidates(
        self, rows: list[Row], logits: Tensor, gone_on: Counter[int]
    ) -> tuple[float, list[Candidate]]:
        """The best continuations of the rows, and the score of the best one."""
        scores = logits.log_softmax(-1)
        if gone_on:
            tokens = torch.tensor(list(gone_on), device=scores.device)
            counts = scores.new_tensor(list(gone_on.values()))
            scores[:, tokens] -= self.options.diversity_penalty * counts
        first = rows[0]
        pipeline = Pipeline(first.options, sorted(first.stop_tokens), [row.start for row in rows])
        scores = pipeline.penalize([row.tokens for row in rows], scores)
        scores += scores.new_tensor([row.score for row in rows])[:, None]
        values, places = _top(scores.flatten(), self._looked_at)
        if not values or math.isnan(values[0]):
            raise ValueError(
                f"logits: {'NaN' if values else 'nothing but -inf, so no token is left'}"
            )
        size = scores.shape[1]
        at, chosen = [i // size for i in places], [i % size for i in places]
        logprobs: list[Logprob | None] = [None] * len(chosen)
        if self.options.logprobs is not None:
            logprobs = list(log_probabilities(logits[at], chosen, self.options.logprobs))
        return values[0], list(zip(values, at, chosen, logprobs, strict=True))

    def _keep(self, group: Group, row: Row) -> None:
        """A row that has ended, if it is among the best."""
        length = row.step + (row.finish_reason == "stop_token")
        group.ended.append((row.score / length**self.options.length_penalty, row))
        group.ended.sort(key=lambda each: -each[0])
        del group.ended[self._size :]

    def _is_over(self, group: Group, best: float) -> bool:
        """best: score of what may go on."""
        options, row = self.options, group.rows[0]
        if len(group.ended) < self._size:
            return False
        if options.early_stopping is True:
            return True
        longest = options.early_stopping == "never" and options.length_penalty > 0.0
        length = row.limit - row.start if longest else row.step
        return best / length**options.length_penalty <= group.ended[-1][0]

    def _seat(self) -> None:
        """A slot for each row that goes on: the best one of a beam keeps its slot, the others fork it."""
        going_on = {id(row.slot) for row in self._rows()}
        for slot in [slot for slot in self.slots if id(slot) not in going_on]:
            self.slots.remove(slot)
            self._runner.end(slot)
        taken: set[int] = set()
        for row in self._rows():
            if id(row.slot) in taken:
                row.slot = self._runner.fork(row.slot)
                self.slots.append(row.slot)
            taken.add(id(row.slot))
        seats = {id(slot): at for at, slot in enumerate(self.slots)}
        for row in self._rows():
            row.at = seats[id(row.slot)]


def _rows_of(logits: Tensor, at: list[int]) -> Tensor:
    """logits[at], without a copy where it is all of them."""
    return logits if at == list(range(len(logits))) else logits[at]


def _top(x: Tensor, k: int) -> tuple[list[float], list[int]]:
    """The k largest of x [N] above -inf, largest first, and where they are.

    They are in the k blocks with the largest maxima, and finding those is one pass over x, unlike `topk`.
    """
    whole = len(x) - len(x) % _BLOCK
    blocks = x[:whole].view(-1, _BLOCK)
    best = blocks.amax(1).topk(min(k, len(blocks))).indices
    places = (best[:, None] * _BLOCK + torch.arange(_BLOCK, device=x.device)).flatten()
    places = torch.cat([places, torch.arange(whole, len(x), device=x.device)])
    values, order = x[places].topk(min(k, len(places)))
    found = [value for value in values.tolist() if value != -math.inf]
    return found, places[order[: len(found)]].tolist()
