"""A conversation by `pyfuse generate`: what is said, what is computed, and what keys do."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from text_cases import MESSAGE, Terminal, of_hf, write_llama

from pyfuse import cli
from pyfuse.cli import answers, chat
from pyfuse.generation.text import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a chat template."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "chat")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", ["--raw", "--json", "--n 2 --temperature 1", "--beams 3"])
def test_what_a_conversation_has_not(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert cli.main(["generate", "nowhere", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pyfuse generate: {arguments.split()[0]}: ") and "--prompt" in said


@pytest.fixture
def talk(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """A conversation: what the user types, an exception being what a key raises; (stdout, stderr)."""

    def talk(typed: Sequence[str | type[BaseException]], *arguments: object, folder: Path = tiny):
        lines = iter(typed)

        def read(prompt: str) -> str:
            line = next(lines, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)
        assert cli.main(["generate", str(folder), *map(str, arguments)]) == 0
        said = capsys.readouterr()
        return said.out, said.err

    return talk


def test_a_conversation(talk: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer follows from all that was said, and of that only what is new is computed."""
    chats = []
    made = chat.Chat.__init__
    monkeypatch.setattr(
        chat.Chat, "__init__", lambda self, *a: chats.append(self) or made(self, *a)
    )
    few = ("--max-new-tokens", 9)
    out, err = talk(["Why? " * 8, "  ", "And?", "/bye", "never read"], *few)
    tokenizer = Tokenizer.of(tiny)
    first = MESSAGE.format(("Why? " * 8).strip())
    (one,) = of_hf(tiny, first, max_new_tokens=9)
    said = tokenizer.decode(one)
    second = first + said + "<|stop|>\n" + MESSAGE.format("And?")
    (two,) = of_hf(tiny, second, max_new_tokens=9)
    assert out == f"{said}\n{tokenizer.decode(two)}\n"
    assert err.count("first token after ") == 2 and "/bye or Ctrl-D leaves" in err
    (talked,) = chats
    assert [m["role"] for m in talked.messages] == ["user", "assistant"] * 2
    whole = len(tokenizer._plain(first)) + len(tokenizer._plain(second))
    assert talked.runner.computed < whole + 2 * 9 - 32


def test_what_was_said_can_be_forgotten(talk: Any) -> None:
    few = ("--max-new-tokens", 6, "--system", "Be brief.")
    out, err = talk(["Why?", "/reset", "Why?", "/rset", EOFError], *few)
    first, second, last = out.split("\n")[:3]
    assert first == second and last == ""
    assert "forgotten" in err and "/rset: no such command; /reset forgets" in err


def test_answers_have_luck_of_their_own(talk: Any) -> None:
    out, _ = talk(["Why?", "/reset", "Why?"], "--temperature", 1, "--max-new-tokens", 20)
    first, second = out.split("\n")[:2]
    assert first != second
    again, _ = talk(["Why?", "/reset", "Why?"], "--temperature", 1, "--max-new-tokens", 20)
    assert again == out


def test_ctrl_c_stops_the_answer_alone(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    saw, chats = answers.Clock.saw, []
    made = chat.Chat.__init__
    monkeypatch.setattr(
        chat.Chat, "__init__", lambda self, *a: chats.append(self) or made(self, *a)
    )

    def press(self: answers.Clock, piece: Any) -> None:
        saw(self, piece)
        if self.tokens == 3 and len(chats[0].messages) == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answers.Clock, "saw", press)
    _, err = talk(["Why?", KeyboardInterrupt, "And?"], "--max-new-tokens", 12)
    assert "stopped, first token after " in err and "3 tokens in" in err
    assert "12 tokens in" in err and err.count("first token") == 2
    assert [m["role"] for m in chats[0].messages] == ["user", "assistant"] * 2
    assert chats[0].runner.cache.pages_in_use == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program(
    talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(self: answers.Clock, piece: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answers.Clock, "saw", press)
    with pytest.raises(AssertionError, match="130"):
        talk(["Why?"])
    assert "pyfuse: interrupted" in capsys.readouterr().err


def test_a_conversation_that_is_too_long(talk: Any) -> None:
    """What does not fit is not said, and the conversation goes on without it."""
    out, err = talk(["x" * 200, "Why?"], "--max-new-tokens", 500)
    assert "tokens" in err and "/reset forgets what was said" in err
    assert out.count("\n") >= 1 and "cut off by --max-new-tokens or the model's context, " in err


def test_a_conversation_needs_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert cli.main(["generate", str(write_llama(tmp_path, template=None))]) == 1
    assert "the model has no chat template" in capsys.readouterr().err


def test_in_a_real_terminal(tmp_path: Path) -> None:
    """By keys: a question, Ctrl-C in the middle of its answer, Ctrl-C at the prompt, another question, Ctrl-D."""
    folder = write_llama(tmp_path / "long", positions=8192)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pyfuse", "generate", str(folder), "--threads", "1"]
    program = subprocess.Popen(
        [*command, "--min-new-tokens", "5000", "--max-new-tokens", "5000"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_own_terminal,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)

    heard = b""

    def until(what: bytes) -> None:
        """The program says that, after what it has said before."""
        nonlocal heard
        while what not in heard:
            assert select.select([ours], [], [], 100)[0], heard
            try:
                heard += os.read(ours, 4096)
            except OSError as error:  # the other side has been closed
                raise AssertionError(heard.decode(errors="replace")) from error
        heard = heard.partition(what)[2]

    try:
        until(b"\n> ")
        for question in (b"Why?\n", b"And?\n"):
            os.write(ours, question)
            until(question.strip() + b"\r\n")
            if not heard:
                heard += os.read(ours, 1)  # the answer has begun
            os.write(ours, b"\x03")
            until(b"stopped, first token after ")
            until(b"> ")
            # The line end, as Python may miss a Ctrl-C right after the prompt until the next key.
            os.write(ours, b"\x03\n")
            until(b"> ")
        os.write(ours, b"\x04")
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(ours)


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
