"""Speculative decoding: several tokens for one call of the model, where they can be guessed.

results = generate(model, text, tokenizer=tokenizer, speculate="prompt")     # from what the text has said before
results = generate(model, text, tokenizer=tokenizer, speculate=small_model)  # from a smaller model
print(results[0].speculation.acceptance)

A draft of k tokens goes through the model in one call, together with the token before it, which costs little more than
one token does where the time goes into reading the weights. The logits after each of these tokens tell what the model
would have said there: a drafted token is accepted if the loop without drafts would take it, as the likeliest one or as
the one drawn for its seed and step. At the first that is not, the loop's own token stands in its place, and the cache
is taken back to there. So a call brings one token at least.

Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318, accept a drafted token with the probability
min(1, p / q), which keeps the distribution of texts. This is stronger: draws depend on seed, step and logits alone, so
the very tokens are those without drafts, whatever was drafted, also with penalties, stop strings and log-probabilities.
On the CPU the logits of a token are the same bits whether it comes alone or with others; elsewhere tokens that are
likely to the last bit may change places.

How much is drafted: `pace`. Where drafts come from: `drafts`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyfuse.generation.drafts import Drafter, DraftModel, Lookup
from pyfuse.generation.loop import Chooser, Loop
from pyfuse.generation.pace import FIRST_COST, MOST, Costs, Pace
from pyfuse.generation.request import Request
from pyfuse.generation.runner import Runner
from pyfuse.generation.sequence import Row, Speculation
from pyfuse.models.transformer import Transformer

Speculate = Literal["prompt"] | Transformer | Runner


def speculative_loop(
    request: Request, speculate: Speculate, draft_tokens: int | None, *, streams: bool = False
) -> SpeculativeLoop:
    """The loop for `generate`'s arguments. ValueError, TypeError: those that cannot be."""
    most = MOST if draft_tokens is None else draft_tokens
    if not isinstance(most, int) or isinstance(most, bool):
        raise TypeError(f"draft_tokens: got {most!r}, needs an int")
    if not 1 <= most <= MOST:
        raise ValueError(f"draft_tokens: got {most}, needs 1 … {MOST}")
    if request.options.searches:
        raise ValueError(f"speculate: beam search has no drafts, but beams is {request.options.beams}")  # fmt: skip
    if isinstance(speculate, (Transformer, Runner)):
        runner = _draft_runner(request.runner, speculate)
        costs = Costs(FIRST_COST + _size(runner.model) / _size(request.runner.model))
        return SpeculativeLoop(request, DraftModel(runner), costs, most, streams=streams)
    if isinstance(speculate, str) and speculate == "prompt":
        return SpeculativeLoop(request, Lookup(request.sources), Costs(), most, streams=streams)
    raise ValueError(f"speculate: got {speculate!r}, needs 'prompt', a Transformer or a Runner")


def _draft_runner(target: Runner, given: Transformer | Runner) -> Runner:
    config = (given if isinstance(given, Transformer) else given.model).config
    if config.vocabulary != target.vocabulary:
        raise ValueError(
            f"speculate: the draft model has {config.vocabulary} tokens, the model {target.vocabulary}"
        )
    if config.encoder_layers or config.window is not None:
        raise ValueError("speculate: a draft model cannot have an encoder, or a window")
    if isinstance(given, Runner):
        if given is target:
            raise ValueError("speculate: got the model's own runner, needs one of a smaller model")
        return given
    most = target.max_tokens
    if config.position != "relative":
        most = min(most, config.max_positions)
    return Runner(given, max_tokens=most, sequences=target.sequences)


def _size(model: Transformer) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@dataclass(slots=True, eq=False)
class Check:
    """A draft on its way through `SpeculativeLoop`: the model's logits [k + 1, V], of which `at` have been used."""

    row: Row
    draft: list[int]
    logits: Tensor
    kind: int
    at: int = 0
    accepted: int = 0


class SpeculativeLoop(Loop):
    """A `Loop` that gets several tokens of a row from one call, and gives one of each row at a time as that does.

    costs: of the calls, see `pace`. most: tokens of a draft.
    """

    def __init__(
        self, request: Request, drafter: Drafter, costs: Costs, most: int, *, streams: bool = False
    ) -> None:
        super().__init__(request, streams=streams)
        self._drafter, self._costs, self._most = drafter, costs, most
        self._paces: dict[Row, Pace] = {}
        self._checks: list[Check] = []
        self._began = 0.0  # of the call whose time is being taken
        self._asked = 1.0  # what `pace` was told that a token costs

    def __exit__(self, *error: object) -> None:
        for row in self.rows:
            self._drafter.forget(row)
        super().__exit__(*error)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int | None]]:
        """See Loop; but only those rows are there for which the latest call has told more tokens than were taken."""
        if self._checks:
            return self._take()
        fresh = self._join() if self.request.waiting else []
        self._began = time.perf_counter()
        drafts = {} if fresh else self._drafts()
        if any(draft for draft, _ in drafts.values()):
            return self._verify(drafts)
        return self._without(fresh)

    def _without(self, fresh: list[Row]) -> list[tuple[Row, int | None]]:
        """A call as Loop's."""
        rows = len(self.rows)
        taken = self._advance(fresh)
        if not fresh:
            self._costs.learn(rows, 0, time.perf_counter() - self._began)
        for row, _ in taken:
            if row.speculation is None:
                self._paces[row], row.speculation = Pace(), Speculation()
            self._learn(row, 0, 0, 0)
        return taken

    def _drafts(self) -> dict[Row, tuple[list[int], int]]:
        """Of each row that has one, with its kind."""
        self._asked = self._costs.of(len(self.rows))
        kinds, lengths = {}, {}
        for row in self.rows:
            room = row.limit - len(row.tokens) - 1  # the last token comes without a draft
            kind = self._drafter.kind(row) if room > 0 else None
            if kind is not None:
                length = self._paces[row].length(kind, self._asked, min(room, self._most))
                if length:
                    kinds[row], lengths[row] = kind, length
        if not lengths:
            return {}
        drafts = self._drafter.draft(lengths)
        return {row: (_before_stop(row, drafts[row]), kind) for row, kind in kinds.items()}

    def _verify(self, drafts: dict[Row, tuple[list[int], int]]) -> list[tuple[Row, int | None]]:
        """A call with drafts, and what it says of the first token of each row."""
        found = [drafts.get(row, ([], 0)) for row in self.rows]
        work = [
            (row.slot, row.tokens[row.slot.length :] + draft)
            for row, (draft, _) in zip(self.rows, found, strict=True)
        ]
        logits = self.runner.forward(work, every=True).float()
        parts = logits.split([len(draft) + 1 for draft, _ in found])
        self._checks = [
            Check(row, draft, part, kind)
            for row, (draft, kind), part in zip(self.rows, found, parts, strict=True)
        ]
        rows, drafted = len(work), sum(len(draft) for draft, _ in found)
        taken = self._take()
        self._costs.learn(rows, drafted, time.perf_counter() - self._began)
        return taken

    def _take(self) -> list[tuple[Row, int | None]]:
        """The next token of each row whose draft has been right so far."""
        checks, rows = self._checks, [check.row for check in self._checks]
        if self._choose.rows != rows:
            self._choose = Chooser(rows)
        logits = torch.stack([check.logits[check.at] for check in checks])
        tokens, logprobs = self._choose(logits)
        self._checks = []
        for check, token, logprob in zip(checks, tokens, logprobs, strict=True):
            ended = check.row.accept(token, logprob)
            if check.at < len(check.draft) and token == check.draft[check.at]:
                check.accepted += 1
                check.at += 1
                if not ended:
                    self._checks.append(check)
                    continue
            self._close(check)
        self._let_go()
        return [
            (row, None if token in row.stop_tokens else token)
            for row, token in zip(rows, tokens, strict=True)
        ]

    def _close(self, check: Check) -> None:
        """No more of the draft is of use."""
        row = check.row
        if row.finish_reason is None:
            self.runner.rewind(row.slot, len(row.tokens) - 1)
        self._learn(row, check.kind, len(check.draft), check.accepted)

    def _learn(self, row: Row, kind: int, proposed: int, accepted: int) -> None:
        assert row.speculation is not None
        row.speculation.proposed += proposed
        row.speculation.accepted += accepted
        row.speculation.calls += 1
        self._paces[row].learn(kind, proposed, accepted, self._asked)
        if row.finish_reason is not None:
            del self._paces[row]

    def _let_go(self) -> None:
        for row in self.rows:
            if row.finish_reason is not None:
                self._drafter.forget(row)
        super()._let_go()


def _before_stop(row: Row, draft: list[int]) -> list[int]:
    """A stop token needs no draft: the model says it after the one before."""
    return next((draft[:i] for i, token in enumerate(draft) if token in row.stop_tokens), draft)
