"""What the tests of training share: a small text, small options, runs in processes of their own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SMALL: dict[str, Any] = {
    "tokenizer": "bytes", "layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 4, "steps": 6, "warmup": 2,
    "save_every": 2, "eval_every": 3, "eval_windows": 5, "device": "cpu", "threads": 1, "lr": 0.01,
}  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# What depends on the clock.
CLOCK = ("tokens_per_second", "seconds")


def write_text(folder: Path, documents: int = 6) -> Path:
    """A folder of files that are easy to predict in parts."""
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        lines = (f"the {i}th file says: {j} and {j * j}, then ä and €\n" for j in range(20))
        (folder / f"{i}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def small(text: Path, **more: Any) -> dict[str, Any]:
    return SMALL | {"text": [text]} | more


def small_mlm(text: Path, **more: Any) -> dict[str, Any]:
    """The same for `pyfuse train mlm`."""
    own = {n: v for n, v in SMALL.items() if n != "tokenizer"}
    return own | {"text": [text], "vocabulary": 280} | more


def as_arguments(options: dict[str, Any]) -> list[str]:
    """On the command line."""
    arguments: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        arguments += ["--" + name.strip("_").replace("_", "-"), *map(str, values)]
    return arguments


def command(folder: Path, options: dict[str, Any], *more: str, program: str = "lm") -> list[str]:
    return [
        sys.executable, "-m", "pyfuse", "train", program, "--out", str(folder), *more, *as_arguments(options),
    ]  # fmt: skip


class Job(NamedTuple):
    """A run in a folder. ends: after so many steps, as if somebody had ended it."""

    program: str
    folder: Path
    options: dict[str, Any]
    resume: bool = False
    ends: int = -1


def in_processes(count: int, jobs: list[Job]) -> None:
    """Runs one after another, each in all processes that one torchrun starts. FOLDER-RANK.json: how many numbers each
    of them holds."""
    text = json.dumps(jobs, default=str)
    script = Path(__file__).with_name("training_jobs.py")
    done = run([*TORCHRUN, str(count), str(script), text])
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "passive"}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment(), timeout=200, check=False
    )


def rows(folder: Path) -> list[dict[str, str]]:
    """log.csv without what depends on the clock."""
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def losses(folder: Path, kind: str = "train") -> list[float]:
    """Of the rows of log.csv of this kind."""
    return [float(row["loss"]) for row in rows(folder) if row["kind"] == kind]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
