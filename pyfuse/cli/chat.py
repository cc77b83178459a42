"""A conversation in the terminal, of `pyfuse generate` without a prompt."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType

from pyfuse.cli.answers import Clock, note, of_runner, system_message
from pyfuse.generation.loop import stream
from pyfuse.generation.options import Options
from pyfuse.generation.runner import CacheFull, Runner
from pyfuse.generation.text import Message, Tokenizer
from pyfuse.models.transformer import Transformer

MOST = 8192  # tokens of a conversation, where the model would take more
ANSWER = 1024  # tokens of an answer, where --max-new-tokens does not say how many
_HELP = "/reset forgets what was said, /bye or Ctrl-D leaves; Ctrl-C stops an answer"


class Chat:
    """Questions and answers. The runner keeps what it has computed of the conversation for the next question."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        options: Options,
        arguments: argparse.Namespace,
    ) -> None:
        """ValueError: the model has no chat template, or one that takes no system message."""
        self.tokenizer, self.name = tokenizer, arguments.model
        self.beginning = system_message(arguments)
        tokenizer.chat([*self.beginning, _said("user", "?")])
        self.options = (
            options
            if "max_new_tokens" in vars(arguments)
            else replace(options, max_new_tokens=ANSWER)
        )
        most = min(MOST, model.config.max_positions)
        self.runner = Runner(model, max_tokens=most, **of_runner(arguments))
        self.messages: list[Message] = list(self.beginning)
        self.seed = options.seeds_of(1)[0]
        self.turns = 0

    def run(self) -> None:
        """Until the user leaves."""
        if importlib.util.find_spec("readline") is not None:
            import readline  # noqa: F401  input() edits the line then, and knows the ones before it
        note(f"{self.name}: {_HELP}")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "/bye":
                return
            with stopping() as stop:
                self.take(line, stop)

    def take(self, line: str, stop: threading.Event) -> None:
        """A command, or something to answer."""
        if line == "/reset":
            self.messages = list(self.beginning)
            note("forgotten")
        elif line.startswith("/") and line[1:].isalpha():
            note(f"{line}: no such command; {_HELP}")
        elif line:
            self.say(line, stop)

    def say(self, text: str, stop: threading.Event) -> None:
        """Print the answer, as much of it as comes before `stop` is set. A question without an answer is forgotten."""
        asked = [*self.messages, _said("user", text)]
        clock, parts, result = Clock(), list[str](), None
        # Draws follow from seed and step: without seeds of their own all answers would have the same luck.
        options = replace(self.options, seed=(self.seed + self.turns) % (1 << 64))
        self.turns += 1
        try:
            prompt = self.tokenizer.chat(asked)
            pieces = stream(self.runner, prompt, tokenizer=self.tokenizer, options=options)
            with closing(pieces):
                for piece in pieces:
                    clock.saw(piece)
                    parts.append(piece.text or "")
                    print(parts[-1], end="", flush=True)
                    result = piece.result
                    if stop.is_set():
                        break
        except (ValueError, CacheFull) as error:
            message = str(error).removeprefix("prompts[0]: ")
            note(f"{message}; /reset forgets what was said")
            return
        print()
        why = "stopped, " if result is None else _why(result.finish_reason)
        note(f"{why}{clock}")
        if answer := "".join(parts):
            self.messages = [*asked, _said("assistant", answer)]


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets: what computes comes to an end between two tokens. A second Ctrl-C interrupts."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _why(reason: str) -> str:
    return "cut off by --max-new-tokens or the model's context, " if reason == "length" else ""


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}
