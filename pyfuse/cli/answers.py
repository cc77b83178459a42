"""The results of `pyfuse generate`, and how long they took."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from pyfuse.cli import show
from pyfuse.generation.loop import generate, stream
from pyfuse.generation.options import Options
from pyfuse.generation.request import runner_for
from pyfuse.generation.runner import Runner
from pyfuse.generation.sequence import Piece, Result
from pyfuse.generation.text import Message, Tokenizer
from pyfuse.models.transformer import Transformer

# Options of the command line that are Runner's, and what they are for.
STORED = {
    "weights": "the weights: as the model has them (default), or in int8, which is faster and less exact",
    "cache": "keys and values: as the model has them (default), or in int8, which takes less memory and more time",
}


class Clock:
    """When the tokens of a text came. Speed is of those after the first, which has to wait for the prompt."""

    def __init__(self) -> None:
        self.began = self.ended = time.perf_counter()
        self.first: float | None = None  # seconds until the first token
        self.tokens = 0

    def saw(self, piece: Piece) -> None:
        """A piece has come, which may have a token."""
        self.ended = time.perf_counter()
        if piece.token is not None:
            self.tokens += 1
            if self.first is None:
                self.first = self.seconds

    def stop(self, tokens: int) -> None:
        """So many have come by now, nobody saw when."""
        self.ended, self.tokens = time.perf_counter(), tokens

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def speed(self) -> float | None:
        """Tokens a second; None of a single one."""
        if self.first is None:
            return self.tokens / self.seconds if self.tokens else None
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else None

    def __str__(self) -> str:
        speed = [] if self.speed is None else [f"{self.speed:.1f} tok/s"]
        first = [] if self.first is None else [f"first token after {self.first:.2f} s"]
        tokens = f"{self.tokens} token{'s' * (self.tokens != 1)} in {self.seconds:.2f} s"
        return ", ".join([*first, *speed, tokens])


def note(text: object) -> None:
    """A line on stderr, dim on a terminal, after what has been printed."""
    sys.stdout.flush()
    if show.HAVE_RICH and sys.stderr.isatty():
        console = show.Console(stderr=True, highlight=False)
        console.print(show.Text(str(text), style="dim"), soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def system_message(arguments: argparse.Namespace) -> list[Message]:
    """What --system says, as the beginning of a conversation."""
    said = arguments.system
    return [] if said is None else [{"role": "system", "content": said}]


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    options: Options,
    prompts: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    """Print what follows the prompts. Errors: those of `generate`."""
    chat = _by_template(tokenizer, arguments)
    before = system_message(arguments)
    tokens = [
        tokenizer.chat([*before, {"role": "user", "content": text}]) if chat else tokenizer.encode(text)
        for text in prompts
    ]  # fmt: skip
    begins = tokens
    if model.config.encoder_layers:
        options = replace(options, forced_tokens=tokenizer.forced_tokens)
        begins = [list(tokenizer.start_tokens)] * len(tokens)
    runner = runner_for(model, begins, options, **of_runner(arguments))
    if arguments.stream:
        _stream(runner, tokenizer, options, tokens)
    else:
        _answer_all(runner, tokenizer, options, prompts, tokens, as_json=arguments.json)


def of_runner(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about `Runner`."""
    return {name: said for name in STORED if (said := getattr(arguments, name)) is not None}


def _by_template(tokenizer: Tokenizer, arguments: argparse.Namespace) -> bool:
    """Whether prompts are questions in a conversation."""
    if arguments.raw or tokenizer.has_chat:
        return not arguments.raw
    if arguments.system is not None:
        raise ValueError(
            f"--system: a message of the chat template, but {arguments.model} has none"
        )
    note(f"{arguments.model} has no chat template: it continues the text (as with --raw)")
    return False


def _stream(
    runner: Runner, tokenizer: Tokenizer, options: Options, prompts: Sequence[list[int]]
) -> None:
    """One after the other."""
    seeds = options.seeds_of(len(prompts))
    for i, prompt in enumerate(prompts):
        own = replace(options, seed=seeds[i])
        if len(prompts) > 1:
            print(f"# prompt {i + 1}")
        clock = Clock()
        with closing(stream(runner, prompt, tokenizer=tokenizer, options=own)) as pieces:
            for piece in pieces:
                clock.saw(piece)
                print(piece.text, end="", flush=True)
        print()
        note(clock)


def _answer_all(
    runner: Runner, tokenizer: Tokenizer, options: Options, texts: Sequence[str],
    prompts: Sequence[list[int]], *, as_json: bool,
) -> None:  # fmt: skip
    """All prompts together."""
    together = Clock()
    clocks = [Clock() for _ in range(len(prompts) * options.n)]

    def saw(piece: Piece) -> None:
        together.saw(piece)
        clocks[piece.prompt * options.n + piece.index].saw(piece)

    given: dict[str, Any] = {"tokenizer": tokenizer, "options": options}
    if options.searches:
        results = generate(runner, prompts, **given)
        together.stop(sum(len(r.tokens) for r in results))
        for clock, result in zip(clocks, results, strict=True):
            clock.stop(len(result.tokens))
    else:
        results = generate(runner, prompts, callback=saw, **given)
    for i, (clock, result) in enumerate(zip(clocks, results, strict=True)):
        if as_json:
            record = _record(
                texts[result.prompt], len(prompts[result.prompt]), i % options.n, result, clock
            )
            print(json.dumps(record, ensure_ascii=False))
        else:
            _print(result, len(prompts), i % options.n, options.n)
    note(together)


def _print(result: Result, prompts: int, index: int, n: int) -> None:
    """The text, under a line that says which, where there are several."""
    which = [f"prompt {result.prompt + 1}"] * (prompts > 1) + [f"text {index + 1}"] * (n > 1)
    score = "" if result.score is None else f", score {result.score:.4f}"
    if which:
        print(f"# {', '.join(which)} ({result.finish_reason}{score})")
    print(result.text)


def _record(text: str, length: int, index: int, result: Result, clock: Clock) -> dict[str, Any]:
    """For JSON. length: of the prompt, in tokens; times in seconds."""
    record: dict[str, Any] = {
        "prompt": text,
        "index": index,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": length,
        "timings": {"first_token": clock.first, "total": clock.seconds},
        "tokens_per_second": clock.speed,
    }
    if result.score is not None:
        record["score"] = result.score
    if result.logprobs is not None:
        record["logprobs"] = [one._asdict() for one in result.logprobs]
    return record
