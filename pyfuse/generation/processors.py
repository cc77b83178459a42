"""What the options do to the logits x [V] of a row's next token, before one is chosen.

`Pipeline` applies them in this order, which is Hugging Face's (the presence and frequency penalties, which it has not,
stand behind the repetition penalty). t: the row's tokens so far, prompt and text; the text has s of them.

    logit_bias           x[i] += bias[i]
    repetition_penalty   x[i] /= penalty, or *= penalty where x[i] < 0, for every i in t
    presence_penalty     x[i] -= penalty                     for every i in the text
    frequency_penalty    x[i] -= penalty · (times that i is in the text)
    no_repeat_ngram      x[i] = -inf where t has its last n - 1 tokens elsewhere too, followed by i
    bad_words            x[i] = -inf where t ends with a bad word but for its last token, i; stop tokens are none
    min_new_tokens       x[i] = -inf for stop tokens i while s < min_new_tokens
    forced_tokens        x[i] = 0 for the token of step s, -inf elsewhere
    suppress_tokens      x[i] = -inf

and then, where tokens are drawn, temperature, top_k, top_p, min_p and typical_p as `sampling` defines them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pyfuse.generation import sampling
from pyfuse.generation.options import LAST_STEP, Options

Tokens = Sequence[Sequence[int]]


class Pipeline:
    """The processors of some rows. It holds no tensors, and nothing of earlier steps: making one costs next to nothing.

    stop_tokens: those in force, which min_new_tokens bans and bad_words spares. prompt_lengths[r]: how many of row r's
    tokens are its prompt; what follows is its text.
    """

    def __init__(
        self, options: Options, stop_tokens: Sequence[int], prompt_lengths: Sequence[int]
    ) -> None:
        self._options = options
        self._stop_tokens = list(stop_tokens)
        self._prompt_lengths = list(prompt_lengths)
        stops = {(token,) for token in stop_tokens}
        self._bad_words = [word for word in options.bad_words if word not in stops]
        self._forced = dict(options.forced_tokens)
        if LAST_STEP in self._forced:
            self._forced[options.max_new_tokens - 1] = self._forced.pop(LAST_STEP)
        self.has_penalties = bool(
            options.logit_bias
            or options.repetition_penalty != 1.0
            or options.presence_penalty
            or options.frequency_penalty
            or options.no_repeat_ngram
            or self._bad_words
            or (options.min_new_tokens and self._stop_tokens)
            or self._forced
            or options.suppress_tokens
        )

    @property
    def is_empty(self) -> bool:
        """Whether every call returns the logits as they are."""
        return not self.has_penalties and not self._options.samples

    def __call__(self, tokens: Tokens, logits: Tensor) -> Tensor:
        """All of it. tokens[r]: row r's prompt and text; logits float32 [R, V], which are not written to.

        Returns float32 [R, V]: the logits, with -inf where a token cannot be. TypeError, ValueError: other shapes."""
        return self.warp(self.penalize(tokens, logits))

    def penalize(self, tokens: Tokens, logits: Tensor) -> Tensor:
        """The part before the temperature. Beam search gives it log-probabilities for logits."""
        sampling.check_logits(logits)
        if len(tokens) != len(self._prompt_lengths) or len(tokens) != logits.shape[0]:
            raise ValueError(
                f"tokens: got {len(tokens)} rows, but logits has {logits.shape[0]} and prompt_lengths "
                f"{len(self._prompt_lengths)}"
            )
        if not self.has_penalties:
            return logits
        x = logits.clone()
        for row, sequence, start in zip(x, tokens, self._prompt_lengths, strict=True):
            self._penalize_row(row, sequence, start)
        return x

    def warp(self, logits: Tensor) -> Tensor:
        """The part from the temperature on. ValueError: a row of logits that has NaN, or nothing but -inf."""
        return sampling.warp(logits, self._options)

    def _penalize_row(self, x: Tensor, tokens: Sequence[int], start: int) -> None:
        """In place. x [V]."""
        options, step = self._options, len(tokens) - start
        if step in self._forced:  # then nothing else matters, but what is suppressed
            x.fill_(-math.inf)[self._forced[step]] = 0.0
            return
        if options.logit_bias:
            x[_indices(list(options.logit_bias), x)] += x.new_tensor(
                list(options.logit_bias.values())
            )
        if options.repetition_penalty != 1.0:
            _divide(x, tokens, options.repetition_penalty)
        if step and (options.presence_penalty or options.frequency_penalty):
            counts = Counter(tokens[start:])
            taken = [
                options.presence_penalty + options.frequency_penalty * n for n in counts.values()
            ]
            x[_indices(list(counts), x)] -= x.new_tensor(taken)
        banned = list(options.suppress_tokens)
        banned += [word[-1] for word in self._bad_words if _ends_with(tokens, word[:-1])]
        if step < options.min_new_tokens:
            banned += self._stop_tokens
        if banned:
            x[_indices(banned, x)] = -math.inf
        if options.no_repeat_ngram:
            x[_followers(_indices(tokens, x), options.no_repeat_ngram)] = -math.inf


def _indices(tokens: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=x.device)


def _divide(x: Tensor, tokens: Sequence[int], penalty: float) -> None:
    seen = _indices(tokens, x)  # writing one value twice is as good as once
    score = x[seen]
    x[seen] = torch.where(score < 0, score * penalty, score / penalty)


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) <= len(tokens) and list(tokens[len(tokens) - len(end) :]) == list(end)


def _followers(tokens: Tensor, n: int) -> Tensor:
    """Of every sequence of n tokens whose first n - 1 are those that tokens [T] ends with, the last."""
    if len(tokens) < n:
        return tokens[:0]
    windows = tokens.unfold(0, n, 1)
    matches = (windows[:, :-1] == tokens[len(tokens) + 1 - n :]).all(1)
    return windows[matches, -1]
