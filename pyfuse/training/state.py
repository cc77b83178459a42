"""Checkpoints: folders that are whole or not there.

    RUN/run.json                       what the run is: its options, its tokenizer, the SHA-256 of its text
    RUN/checkpoint-00000100/           model, optimizer and state.json, which lists their sizes and SHA-256

A checkpoint is written under a hidden name, forced to disk, and renamed; only then is the one before it removed. No
file is a pickle, which could run any code when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pyfuse.training.errors import TrainingError, disk_errors

RUN, STATE = "run.json", "state.json"
FORMAT = 1
_PREFIX = "checkpoint-"
# What a run that ended before it had begun may leave.
_NO_MATTER = {".lock"}


def write_file(path: Path, data: bytes) -> None:
    """Replace a file in one go; what was there stays if that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        try:
            _write(partial, data)
            os.replace(partial, path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force what was appended to disk."""
    with disk_errors(path.parent), path.open("rb") as file:
        os.fsync(file.fileno())


def write_checkpoint(
    run: Path, state: Mapping[str, Any], files: Mapping[str, Callable[[], bytes]]
) -> Path:
    """Write the checkpoint of step state["step"], then remove all others.

    files: the contents by name, each made when it is its turn, so that memory holds one of them at a time.
    """
    final = run / f"{_PREFIX}{state['step']:08d}"
    partial = run / f".{final.name}.partial"
    with disk_errors(run):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            listed = {}
            for name, content in files.items():
                data = content()
                _write(partial / name, data)
                listed[name] = [len(data), hashlib.sha256(data).hexdigest()]
            text = json.dumps({"format": FORMAT, **state, "files": listed}, indent=1)
            _write(partial / STATE, text.encode() + b"\n")
            _sync_folder(partial)
            os.replace(partial, final)
            _sync_folder(run)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for other in checkpoints(run):
        if other != final:
            shutil.rmtree(other)
    return final


def sweep(run: Path) -> None:
    """Remove what a run that was ended while it wrote has left. Under the lock only."""
    for left in run.glob(".*.partial"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    return sorted(p for p in run.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdecimal())


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all as they were written. TrainingError: they are not."""
    state = _read_json(folder / STATE)
    if state.get("format") != FORMAT or not isinstance(state.get("files"), dict):
        raise TrainingError(f"{folder / STATE}: not written by this program (format {FORMAT})")
    for name, (size, sha256) in state["files"].items():
        data = (folder / name).read_bytes() if (folder / name).is_file() else None
        if data is None or len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            found = "missing" if data is None else f"{len(data)} of {size} bytes"
            if data is not None and len(data) == size:
                found = "not what was written"
            raise TrainingError(
                f"{folder / name}: {found}; the checkpoint is damaged, and nothing was changed: "
                "restore it from a copy, or begin anew with another --out"
            )
    return state


def read_run(folder: Path) -> dict[str, Any]:
    """run.json. TrainingError: the folder holds no run."""
    if not (folder / RUN).is_file():
        raise TrainingError(
            f"{folder}: there is no run to go on with (no {RUN}); leave --resume out"
        )
    run = _read_json(folder / RUN)
    if run.get("format") != FORMAT:
        raise TrainingError(f"{folder / RUN}: not written by this program (format {FORMAT})")
    return run


def refuse_used(folder: Path) -> None:
    """TrainingError: something is there that a new run would overwrite."""
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: is no folder")
    if (folder / RUN).exists():
        raise TrainingError(
            f"{folder}: holds a run already; go on with it by --resume, or choose another --out"
        )
    names = {p.name for p in folder.iterdir()} - _NO_MATTER if folder.is_dir() else set()
    if names := {n for n in names if not n.endswith(".partial")}:
        raise TrainingError(
            f"{folder}: is not empty ({min(names)}), and holds no run; choose another --out"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock is the system's own, so that one that dies lets go of it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"{folder}: another process is training there") from None
    try:
        yield
    finally:
        lock.release()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        found = None
    except ValueError as error:
        raise TrainingError(f"{path}: damaged, it cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{path}: missing or damaged; nothing was changed")
    return found


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
