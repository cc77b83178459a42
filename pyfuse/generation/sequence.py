"""One sequence that is being generated: its tokens, its text, and when it ends.

A `Row` is all that a decoding method has to carry along for a sequence. `accept` takes the next token and says whether
it was the last one; whoever calls it decides how tokens are chosen and which rows run together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyfuse.generation.options import Options
from pyfuse.generation.sampling import Logprob
from pyfuse.generation.text import Detokenizer, StopStrings, Tokenizer

_BEFORE = 8  # tokens of a prompt that say how what follows it is written


@dataclass
class Speculation:
    """What became of a sequence's drafts (`pyfuse.generation.speculative`).

    proposed: tokens of all drafts. accepted: those that the model has confirmed. calls: of the model, each of which
    would have brought one token without drafts.
    """

    proposed: int = 0
    accepted: int = 0
    calls: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted / proposed; 0 where nothing was proposed."""
        return self.accepted / max(self.proposed, 1)


@dataclass
class Result:
    """A generated sequence.

    prompt: number of its prompt. tokens: the new ones, without the stop token that ended it, but with those of a stop
      string. text: of the tokens, up to the stop string; None without a tokenizer.
    finish_reason: "length" (max_new_tokens, or the end of the model's context), "stop_token" or "stop_string".
    logprobs: one for each of the tokens, where they were asked for. score: of beam search, log-probability divided by
      the length's penalty. speculation: of its drafts, where there were to be some; results that differ in nothing else
      are equal.
    """

    prompt: int
    tokens: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[Logprob] | None = None
    score: float | None = None
    speculation: Speculation | None = field(default=None, compare=False)


@dataclass(slots=True)
class Piece:
    """What one step adds to a sequence.

    prompt, index: which prompt, and which of its n sequences. token: None where a piece brings only the end, as a stop
      token does. text: what has become certain, maybe nothing; None without a tokenizer. All texts of a sequence make
      up `Result.text`. result: of the last piece of a sequence.
    """

    prompt: int
    index: int
    token: int | None
    text: str | None
    logprob: Logprob | None = None
    result: Result | None = None

    @property
    def finish_reason(self) -> str | None:
        return None if self.result is None else self.result.finish_reason


class Text:
    """The text of a sequence, up to the first of its stop strings."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...] = ()) -> None:
        self._detokenizer, self._stop = detokenizer, StopStrings(stop)
        self._shown: list[str] = []
        self._taken = 0

    def add(self, token: int) -> bool:
        """Whether the text has come to a stop string."""
        return self._show(self._detokenizer.add(token))

    def end(self) -> bool:
        """Nothing follows. Whether what the detokenizer held back completes a stop string."""
        found = self._show(self._detokenizer.end())
        self._shown.append(self._stop.end())
        return found

    def take(self) -> str:
        """What has become certain since it was last asked for."""
        new = "".join(self._shown[self._taken :])
        self._taken = len(self._shown)
        return new

    def __str__(self) -> str:
        return "".join(self._shown)

    def copy(self) -> Text:
        twin = object.__new__(Text)
        twin._detokenizer, twin._stop = self._detokenizer.copy(), self._stop.copy()
        twin._shown, twin._taken = self._shown.copy(), self._taken
        return twin

    def _show(self, piece: str) -> bool:
        certain, hit = self._stop.add(piece)
        if certain:
            self._shown.append(certain)
        return hit is not None


class Row:
    """A sequence on its way.

    prompt, index: as in `Piece`. tokens: the prompt's `start` tokens and the new ones. seed: of its draws. limit: most
    tokens in all. slot: where the runner keeps it. score: of a beam, the sum of its tokens' scores.
    speculation: what became of its drafts.
    """

    __slots__ = (
        "at", "finish_reason", "index", "limit", "logprobs", "options", "prompt", "score", "seed", "slot",
        "speculation", "start", "stop_tokens", "text", "tokens",
    )  # fmt: skip

    def __init__(
        self, prompt: int, index: int, tokens: list[int], *, options: Options, stop_tokens: frozenset[int],
        limit: int, seed: tuple[int, int] = (0, 0), text: Text | None = None,
    ) -> None:  # fmt: skip
        self.prompt, self.index, self.seed = prompt, index, seed
        self.tokens, self.start, self.limit = tokens.copy(), len(tokens), limit
        self.options, self.stop_tokens, self.text = options, stop_tokens, text
        self.logprobs: list[Logprob] | None = None if options.logprobs is None else []
        self.finish_reason: str | None = None
        self.slot: Any = None
        self.speculation: Speculation | None = None
        self.at = 0  # which of the latest logits are this row's
        self.score = 0.0

    @property
    def step(self) -> int:
        """Number of new tokens."""
        return len(self.tokens) - self.start

    def accept(self, token: int, logprob: Logprob | None = None) -> bool:
        """Whether the sequence ends with this token; `finish_reason` is set then."""
        if token in self.stop_tokens:
            return self._finish("stop_token")
        self.tokens.append(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        if self.text is not None and self.text.add(token):
            self.finish_reason = "stop_string"
            return True
        if len(self.tokens) >= self.limit:
            return self._finish("length")
        return False

    def fork(self) -> Row:
        """The same sequence once more, to go on otherwise."""
        other = object.__new__(Row)
        for name in Row.__slots__:
            setattr(other, name, getattr(self, name))
        other.tokens = self.tokens.copy()
        other.logprobs = None if self.logprobs is None else self.logprobs.copy()
        other.text = None if self.text is None else self.text.copy()
        return other

    def result(self, tokenizer: Tokenizer | None, score: float | None = None) -> Result:
        new = self.tokens[self.start :]
        text = self.text
        if text is None and tokenizer is not None:
            text = text_of(self, tokenizer)
            for token in new:
                text.add(token)
            text.end()
        assert self.finish_reason is not None
        shown = None if text is None else str(text)
        return Result(
            self.prompt, new, shown, self.finish_reason, self.logprobs, score, self.speculation
        )

    def _finish(self, reason: str) -> bool:
        found = self.text is not None and self.text.end()
        self.finish_reason = "stop_string" if found else reason
        return True


def text_of(row: Row, tokenizer: Tokenizer) -> Text:
    """For what follows the prompt: a word that begins with a space keeps it."""
    before = row.tokens[max(0, row.start - _BEFORE) : row.start]
    return Text(tokenizer.detokenizer(before), row.options.stop)
