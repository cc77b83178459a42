"""`pyfuse train lm` as a command: its help, its errors, what it says; and several processes."""

from __future__ import annotations

import importlib
import io
from dataclasses import fields
from pathlib import Path

import pytest
from training_cases import TORCHRUN, as_arguments, contents, rows, run, small, write_text

from pyfuse import cli
from pyfuse.cli.train import PROGRAMS
from pyfuse.training import lm
from pyfuse.training.options import flag
from pyfuse.training.progress import Lines, progress


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_something_of_every_option(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", program, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(importlib.import_module(PROGRAMS[program].options).Options):
        assert f"{flag(field.name)} " in shown and len(field.metadata["text"]) > 3
        assert " ".join(field.metadata["text"].split()[:4]) in shown, field.name
        if type(field.default) in (int, float):
            assert f"(default: {field.default:g})" in shown, field.name
    assert "--resume " in shown and "--out FOLDER" in shown


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = small(write_text(tmp_path / "text"), tokenizer="bpe", vocabulary=280, stock=True)
    out = ["train", "lm", "--out", str(tmp_path / "run")]
    assert cli.main([*out, *as_arguments(given)]) == 0
    said = capsys.readouterr()
    assert "held-out loss" in said.out and "(of knowing nothing: 280)" in said.out
    assert "tok/s" in said.out and "checkpoint-00000006" in said.out
    assert "step 0 of 6: held-out loss" in said.err and "step 6 of 6: loss" in said.err
    assert cli.main([*out, *as_arguments(given)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*out, "--resume", "--steps", "7"]) == 0
    assert "7 steps in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps -3", "--steps: got -3, needs at least 1"),
        ("--lr -1", "--lr: got -1, needs at least 0"),
        ("--lr nan", "--lr: got nan"),
        ("--dropout 1", "--dropout: got 1, needs at least 0 and below 1"),
        ("--vocabulary 9", "--vocabulary: got 9, needs at least 257"),
        ("--vocabulary 300", "--vocabulary: with --tokenizer bytes there are 257"),
        ("--width 15", "width: 15 is no multiple of heads = 2"),
        ("--context 100000", "tokens to learn from, but one window of context 100000 needs 100001"),
        ("--held-out 0", "0 tokens held out (--held-out), but one window"),
        ("--tokenizer bpe --vocabulary 9000", "tokens to merge, 9000 were wanted"),
        ("--text nowhere", "text: there is no nowhere"),
    ],
)
def test_wrong_usage(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = as_arguments(small(write_text(tmp_path / "text")))
    status = cli.main(["train", "lm", "--out", str(tmp_path / "run"), *given, *arguments.split()])
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pyfuse.training.progress.time.monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress(100, 0, out) as shown:
        assert isinstance(shown, Lines)
        for step in range(1, 101):
            clock[0] += 1.0
            shown.stepped(step, {"loss": 2.0, "tokens": step * 50.0, "tokens_per_second": 10.0})
    lines = out.getvalue().splitlines()
    assert len(lines) == 11 and lines[0] == "step 1 of 100: loss 2.0000, 10 tok/s, 8:15 left"
    assert lines[-1].startswith("step 100 of 100") and lines[-1].endswith("0:00 left")


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with progress(10, 4, out) as shown:
        shown.stepped(10, {"loss": 2.0, "tokens": 50.0, "tokens_per_second": 10.0})
        shown.evaluated(10, {"loss": 2.0, "perplexity": 7.4, "tokens": 50.0})
    assert "10/10" in out.getvalue() and "held-out loss 2, perplexity 7.4" in out.getvalue()


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    given = small(write_text(tmp_path / "text"), accumulate=2)
    lm.run(tmp_path / "one", given, speak=io.StringIO())
    two = tmp_path / "two"
    done = run(
        [
            *TORCHRUN, "2", "-m", "pyfuse", "train", "lm", "--out", str(two), *as_arguments(given),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1  # the first process alone speaks
    one, other = rows(tmp_path / "one"), rows(two)
    assert len(one) == len(other) == 9
    for a, b in zip(one, other, strict=True):
        assert (a["step"], a["kind"], a["tokens"], a["lr"]) == (
            b["step"],
            b["kind"],
            b["tokens"],
            b["lr"],
        )
        for name in ("loss", "gradient_norm", "perplexity"):
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-5)
    assert contents(tmp_path / "one").keys() == contents(two).keys()
    result = lm.run(two, {"steps": 8}, resume=True, speak=io.StringIO())  # on one process
    assert result is not None and result.steps == 8


def test_processes_need_torchrun_and_even_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = as_arguments(small(write_text(tmp_path / "text")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", "lm", "--out", str(tmp_path / "run"), *given]) == 1
    assert "RANK, MASTER_ADDR, MASTER_PORT is not set: start the processes with torchrun" in (
        capsys.readouterr().err
    )
