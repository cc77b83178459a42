"""A run that was ended goes on as if nothing had happened, and whatever goes wrong leaves the old files alone."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from training_cases import command, contents, environment, rows, small, small_mlm, write_text

from pyfuse.training import lm, mlm, state
from pyfuse.training.errors import TrainingError

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
PROGRAMS = {"lm": (lm.run, small), "mlm": (mlm.run, small_mlm)}
every_program = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here."""
    monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def train(
    folder: Path, given: dict[str, Any], resume: bool = False, program: str = "lm"
) -> lm.Result:
    run, _ = PROGRAMS[program]
    result = run(folder, given, resume=resume, speak=io.StringIO())
    assert result is not None
    return result


def weights(folder: Path) -> dict[str, bytes]:
    """Of the last checkpoint, the optimizer's too."""
    last = state.checkpoints(folder)[-1]
    return {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


@every_program
def test_after_kill_9_the_run_is_bitwise_the_same(program: str, text: Path, tmp_path: Path) -> None:
    _, options = PROGRAMS[program]
    given = options(text, steps=160, save_every=40, eval_every=30, **DROPOUT)
    train(tmp_path / "whole", given, program=program)
    killed = tmp_path / "killed"
    with subprocess.Popen(
        command(killed, given, program=program), env=environment(), stderr=subprocess.PIPE
    ) as process:
        _wait_for_step(killed / "log.csv", 55, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (left,) = state.checkpoints(killed)
    assert 40 <= int(left.name[-8:]) < 160
    with (killed / "log.csv").open("a") as file:
        file.write("57,train,55")  # a row that was cut off
    (killed / ".checkpoint-00000080.partial").mkdir(exist_ok=True)
    train(killed, {}, resume=True, program=program)
    assert rows(killed) == rows(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")
    assert [p.name for p in state.checkpoints(killed)] == ["checkpoint-00000160"]
    assert not list(killed.glob(".*.partial*"))


def _wait_for_step(log: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not (log.is_file() and f"\n{step},train" in log.read_text()):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < end, "it does not get on"
        time.sleep(0.005)


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again(
    text: Path, tmp_path: Path
) -> None:
    given = small(text)
    whole = train(tmp_path / "run", given)
    expected = rows(tmp_path / "run")
    for file in whole.checkpoint.iterdir():
        file.unlink()
    whole.checkpoint.rmdir()
    train(tmp_path / "run", {}, resume=True)
    assert rows(tmp_path / "run") == expected


def test_more_steps_and_a_run_that_has_ended(text: Path, tmp_path: Path) -> None:
    given = small(text)
    before = train(tmp_path / "run", given)
    table = rows(tmp_path / "run")
    again = train(tmp_path / "run", {}, resume=True)
    assert again.loss == before.loss and rows(tmp_path / "run") == table
    assert train(tmp_path / "run", {"steps": 8}, resume=True).steps == 8
    assert [r["step"] for r in rows(tmp_path / "run")][-3:] == ["7", "8", "8"]
    assert rows(tmp_path / "run")[: len(table)] == table
    with pytest.raises(TrainingError, match="--steps: 4, but the run has made 8 steps"):
        train(tmp_path / "run", {"steps": 4}, resume=True)


def test_a_used_folder_is_refused(text: Path, tmp_path: Path) -> None:
    given = small(text)
    train(tmp_path / "run", given)
    before = contents(tmp_path / "run")
    with pytest.raises(TrainingError, match="holds a run already; go on with it by --resume"):
        train(tmp_path / "run", given)
    with pytest.raises(TrainingError, match=r"is not empty \(0\.txt\), and holds no run"):
        train(text, given)
    with pytest.raises(TrainingError, match=r"0\.txt: is no folder"):
        train(text / "0.txt", given)
    with pytest.raises(TrainingError, match="there is no run to go on with"):
        train(tmp_path / "nothing", given, resume=True)
    with (
        state.locked(tmp_path / "run"),
        pytest.raises(TrainingError, match="another process is training there"),
    ):
        train(tmp_path / "run", {"steps": 8}, resume=True)
    assert contents(tmp_path / "run") == before and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("width", 32), ("layers", 2), ("heads", 4), ("context", 8), ("kind", "llama"), ("tokenizer", "bpe"),
        ("seed", 1), ("batch", 2), ("lr", 0.5), ("dropout", 0.3), ("stock", True), ("dtype", "bf16"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_run_are_refused(
    finished: tuple[Path, Path], name: str, value: Any
) -> None:
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(TrainingError, match=f"--{name}: {value}, but the run has .*; leave it out"):
        train(folder, {"steps": 8, name: value}, resume=True)
    assert contents(folder) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that nobody changes, and its text."""
    folder = tmp_path_factory.mktemp("finished")
    text = write_text(folder / "text")
    train(folder / "run", small(text))
    return folder / "run", text


def test_another_text_is_refused(text: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", small(text))
    before = contents(tmp_path / "run")
    moved = text.rename(tmp_path / "moved")
    train(tmp_path / "run", {"text": [moved], "steps": 6}, resume=True)  # the same, elsewhere
    with pytest.raises(FileNotFoundError, match="there is no"):
        train(tmp_path / "run", {"text": [text]}, resume=True)
    (moved / "1.txt").write_text("other")
    before["run.json"] = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(TrainingError, match="is not the text that the run began with"):
        train(tmp_path / "run", {"steps": 8}, resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "program, file",
    [
        ("lm", "model.safetensors"), ("lm", "optimizer.safetensors"), ("lm", "config.json"),
        ("mlm", "tokenizer_config.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused(
    text: Path, tmp_path: Path, program: str, file: str, how: str
) -> None:
    _, options = PROGRAMS[program]
    folder = train(tmp_path / "run", options(text, steps=2), program=program).checkpoint
    data = (folder / file).read_bytes()
    if how == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data[:-9] if how == "truncated" else b"x" + data[1:])
    before = contents(tmp_path / "run")
    found = {
        "truncated": r"\d+ of \d+ bytes",
        "changed": "not what was written",
        "missing": "missing",
    }
    with pytest.raises(TrainingError, match=f"{file}: {found[how]}; the checkpoint is damaged"):
        train(tmp_path / "run", {"steps": 8}, resume=True, program=program)
    assert contents(tmp_path / "run") == before


def test_what_belongs_to_others_is_refused(text: Path, tmp_path: Path) -> None:
    one = train(tmp_path / "one", small(text, steps=2)).checkpoint
    two = train(tmp_path / "two", small(text, steps=2, width=32)).checkpoint
    two.rename(one.with_name("checkpoint-00000003"))
    with pytest.raises(TrainingError, match="checkpoint-00000003: belongs to another run"):
        train(tmp_path / "one", {}, resume=True)
    for text_of_state, message in (
        ('{"format": 99}', "not written by this program"),
        ("{", "damaged, it cannot be read"),
        ("[]", "missing or damaged"),
    ):
        (one.with_name("checkpoint-00000003") / "state.json").write_text(text_of_state)
        with pytest.raises(TrainingError, match=message):
            train(tmp_path / "one", {}, resume=True)
    with pytest.raises(TrainingError, match=r"one: a run of `pyfuse train lm`"):
        train(tmp_path / "one", {}, resume=True, program="mlm")
    run = tmp_path / "one" / "run.json"
    stored = json.loads(run.read_text())
    for changed, message in (
        (stored | {"format": 2}, "not written by this program"),
        (stored | {"program": "chess"}, "a run of `pyfuse train chess`"),
        (stored | {"options": {}}, "begun by another version"),
        ({n: v for n, v in stored.items() if n != "text"}, "lacks a part"),
    ):
        run.write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match=message):
            train(tmp_path / "one", {}, resume=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    given = small(text, **DROPOUT)
    train(tmp_path / "whole", given)
    folder = tmp_path / "run"
    real = getattr(os, call)

    def full(*arguments: Any) -> Any:
        if (folder / "checkpoint-00000002").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(TrainingError, match=r"run: cannot write \(No space left on device\)"):
            train(folder, given)
    assert [p.name for p in folder.iterdir() if "checkpoint" in p.name] == ["checkpoint-00000002"]
    train(folder, {}, resume=True)
    assert rows(folder) == rows(tmp_path / "whole") and weights(folder) == weights(
        tmp_path / "whole"
    )


@every_program
def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(
    program: str, text: Path, tmp_path: Path
) -> None:
    """Not by a patch: the system itself refuses to write."""
    _, options = PROGRAMS[program]
    train(tmp_path / "run", options(text, steps=2), program=program)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = weights(tmp_path / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"run: cannot write \(File too large\)"):
            train(tmp_path / "run", {"steps": 4}, resume=True, program=program)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights(tmp_path / "run") == kept and not list((tmp_path / "run").glob(".*.partial"))
    assert train(tmp_path / "run", {"steps": 4}, resume=True, program=program).steps == 4
