"""What is asked of a generation, checked before the first token: prompts as tokens, options, a runner with room."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pyfuse.generation.options import LAST_STEP, Options
from pyfuse.generation.runner import CacheFull, Runner, Slot
from pyfuse.generation.sequence import Row, text_of
from pyfuse.generation.text import Tokenizer
from pyfuse.models.transformer import Config, Transformer

Prompt = str | Sequence[int] | Tensor
Prompts = Prompt | Sequence[Prompt]

_ROWS, _TOKENS = (
    16,
    1 << 15,
)  # sequences that a runner made here takes at once, and tokens of all of them


class Request:
    """Prompts that wait for room in the runner, and what their rows need.

    prompts: for the decoder. sources: for the encoder before it, if there is one.
    """

    def __init__(
        self, runner: Runner, prompts: list[list[int]], sources: list[list[int]] | None, options: Options,
        stop_tokens: frozenset[int], tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        """CacheFull: a prompt with all of its sequences would not fit into the runner, even alone."""
        self.runner, self.prompts, self.sources = runner, prompts, sources
        self.options, self.stop_tokens, self.tokenizer = options, stop_tokens, tokenizer
        self.rows = max(options.n, options.beams)  # of a prompt
        self.waiting = deque(range(len(prompts)))
        self._seeds = options.seeds_of(len(prompts))
        self._left = [self.rows] * len(prompts)
        self._room = runner.cache.pages.room
        for prompt in self.waiting:
            self._check_fits(prompt)

    def row(self, prompt: int, index: int = 0, *, with_text: bool = False) -> Row:
        """Sequence number `index` of a prompt, before its first step."""
        tokens = self.prompts[prompt]
        limit = self._limit(prompt)
        row = Row(
            prompt, index, tokens, options=_within(self.options, limit - len(tokens)),
            stop_tokens=self.stop_tokens, limit=limit, seed=(self._seeds[prompt], index),
        )  # fmt: skip
        if self.tokenizer is not None and (with_text or self.options.stop):
            row.text = text_of(row, self.tokenizer)
        return row

    def take(self) -> Iterator[tuple[int, Slot]]:
        """Prompts that there is room for, and their slots, until `free` gives the room back."""
        while self.waiting and self._pages(self.waiting[0]) <= self._room:
            prompt = self.waiting.popleft()
            self._room -= self._pages(prompt)
            memory = None if self.sources is None else self.runner.encode(self.sources[prompt])
            yield prompt, self.runner.begin(self.prompts[prompt], memory)

    def free(self, prompt: int, rows: int = 1) -> None:
        """So many rows of a prompt have ended; its room is free when all have."""
        self._left[prompt] -= rows
        if not self._left[prompt]:
            self._room += self._pages(prompt)

    def _limit(self, prompt: int) -> int:
        """Most tokens of one of its sequences."""
        return min(len(self.prompts[prompt]) + self.options.max_new_tokens, self.runner.max_tokens)

    def _pages(self, prompt: int) -> int:
        """What all sequences of a prompt may come to hold: each its own pages, but for the full ones of the prompt."""
        runner, limit = self.runner, self._limit(prompt)
        size, window = runner.cache.page_size, runner.cache.window
        if window is not None:
            return self.rows * -(-min(limit, window - 1 + runner.chunk + size) // size)
        shared = len(self.prompts[prompt]) // size
        return shared + self.rows * (-(-limit // size) - shared)

    def _check_fits(self, prompt: int) -> None:
        needed = self._pages(prompt)
        if needed > self._room:
            cache = self.runner.cache
            raise CacheFull(
                f"prompts[{prompt}]: {self.rows} sequences of up to {self._limit(prompt)} tokens need {needed} pages of"
                f" {cache.page_size}, but the runner has room for {self._room}"
            )


def _within(options: Options, new: int) -> Options:
    """The options of a sequence with room for so many new tokens: the last of these is the last that may be forced."""
    if LAST_STEP not in options.forced_tokens or new == options.max_new_tokens:
        return options
    forced = {step: token for step, token in options.forced_tokens.items() if step < new - 1}
    return replace(
        options, max_new_tokens=new, min_new_tokens=min(options.min_new_tokens, new), forced_tokens=forced
    )  # fmt: skip


def make_request(
    model: Transformer | Runner, prompts: Prompts, tokenizer: Tokenizer | None, options: Options | None,
    decoder_start: int | Sequence[int] | None, knobs: dict[str, Any],
) -> Request:  # fmt: skip
    """Errors: see `pyfuse.generation.generate`."""
    if isinstance(model, nn.Module) and not isinstance(model, Transformer):
        raise TypeError(
            f"model: got {type(model).__name__}, needs a Runner or a Transformer, which"
            " pyfuse.models.checkpoint.from_pretrained makes of a Hugging Face model"
        )
    options = Options(**knobs) if options is None else replace(options, **knobs)
    if options.stop and tokenizer is None:
        raise ValueError("stop: texts that end a sequence need a tokenizer")
    config = (model if isinstance(model, Transformer) else model.model).config
    context = _context(config) if isinstance(model, Transformer) else model.max_tokens
    options.check_vocabulary(config.vocabulary)
    lists = token_lists(prompts, tokenizer)
    sources = None
    if config.encoder_layers:
        sources, lists = lists, [_start(decoder_start, tokenizer)] * len(lists)
        for i, tokens in enumerate(sources):
            _check_prompt(f"prompts[{i}]", tokens, config.vocabulary, _context(config))
    elif decoder_start is not None:
        raise ValueError(
            "decoder_start: the model has no encoder, so its prompts start its decoder"
        )
    for i, tokens in enumerate(lists):
        name = f"prompts[{i}]" if sources is None else "decoder_start"
        _check_prompt(name, tokens, config.vocabulary, context, new=1)
    ends = options.stop_tokens
    if ends is None:
        known = () if tokenizer is None else tokenizer.end_tokens
        ends = tuple(token for token in known if token < config.vocabulary)
    runner = runner_for(model, lists, options) if isinstance(model, Transformer) else model
    return Request(runner, lists, sources, options, frozenset(ends), tokenizer)


def token_lists(prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Texts, sequences of ids or tensors, one or several of them, as lists of ids."""
    if isinstance(prompts, str):
        return [_tokens("prompts", prompts, tokenizer)]
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: needs texts or token ids, got {type(prompts).__name__}")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], int):
        return [_tokens("prompts", prompts, tokenizer)]
    return [_tokens(f"prompts[{i}]", prompt, tokenizer) for i, prompt in enumerate(prompts)]


def _tokens(name: str, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name}: a text needs a tokenizer")
        return tokenizer.encode(prompt)
    tokens = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not isinstance(tokens, Sequence):
        raise TypeError(f"{name}: needs a text or token ids, got {type(prompt).__name__}")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"{name}: needs token ids, which are ints, got {token!r}")
    return list(tokens)


def _start(given: int | Sequence[int] | None, tokenizer: Tokenizer | None) -> list[int]:
    if given is None and tokenizer is not None:
        given = tokenizer.start_tokens
    if given is None or given == ():
        raise ValueError(
            "decoder_start: needed with an encoder: the token that its decoder starts with"
        )
    return _tokens("decoder_start", [given] if isinstance(given, int) else given, tokenizer)


def _check_prompt(name: str, tokens: list[int], vocabulary: int, context: int, new: int = 0) -> None:  # fmt: skip
    if not tokens:
        raise ValueError(f"{name}: empty, needs a token at least")
    unknown = [t for t in (min(tokens), max(tokens)) if not 0 <= t < vocabulary]
    if unknown:
        raise ValueError(f"{name}: got token {unknown[0]}, the vocabulary has {vocabulary}")
    if len(tokens) + new > context:
        room = " with none left for a new one" if new else ""
        raise ValueError(f"{name}: {len(tokens)} tokens{room}, the model's context is {context}")


def runner_for(
    model: Transformer, prompts: list[list[int]], options: Options, **of_runner: Any
) -> Runner:
    """A runner with room for as many of these prompts as run at once, at their longest.

    prompts: what its decoder starts with. of_runner: further arguments of the Runner.
    """
    rows = max(options.n, options.beams)
    longest = max(map(len, prompts), default=0) + options.max_new_tokens
    most = min(longest, _context(model.config))
    together = max(1, min(len(prompts), _ROWS // rows, _TOKENS // (rows * most)))
    return Runner(model, max_tokens=most, sequences=together * rows, **of_runner)


def _context(config: Config) -> int:
    """Most tokens of a sequence; relative positions have no end."""
    return sys.maxsize if config.position == "relative" else config.max_positions
