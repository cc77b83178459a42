"""Which run a folder holds, and whether what is to go on belongs to it.

run.json has the program, its options, and what identifies its material; a checkpoint has a hash of what of these
cannot change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyfuse.training import state
from pyfuse.training.errors import TrainingError
from pyfuse.training.options import RunOptions, resumed

Stored = Mapping[str, Any]  # run.json
Identity = Mapping[str, str]  # of the material, by the names that run.json has for its parts
Some = TypeVar("Some", bound=RunOptions)


def begun(
    folder: Path, program: str, kind: type[Some], parts: tuple[str, ...], given: Mapping[str, Any]
) -> tuple[Some, Stored]:
    """The options of the run that the folder holds, with those given, and its run.json. parts: of the identity.

    TrainingError: no run, one of another program, or one that contradicts what is given.
    """
    stored = state.read_run(folder)
    if stored.get("program") != program:
        raise TrainingError(f"{folder}: a run of `pyfuse train {stored.get('program')}`")
    if not {"options", *parts} <= stored.keys():
        raise TrainingError(f"{folder / state.RUN}: damaged, it lacks a part; nothing was changed")
    return resumed(kind, stored["options"], given), stored


def claim(
    stack: ExitStack, folder: Path, program: str, options: RunOptions, material: Identity, *, new: bool
) -> None:  # fmt: skip
    """Lock the folder, until the stack ends, and write what the run is: from here on it is there, and can go on."""
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(state.locked(folder))
    if new:
        state.refuse_used(folder)
    state.sweep(folder)
    described = {
        "format": state.FORMAT,
        "program": program,
        "options": options.stored(),
        **material,
    }
    state.write_file(folder / state.RUN, json.dumps(described, indent=1).encode() + b"\n")


def hashed(options: RunOptions, material: Identity) -> str:
    """What a checkpoint and its run have in common."""
    fixed = json.dumps([options.fixed(), *material.values()], sort_keys=True)
    return hashlib.sha256(fixed.encode()).hexdigest()


class Begin(NamedTuple):
    """A checkpoint to go on from, and its state.json."""

    folder: Path
    state: dict[str, Any]


def last_checkpoint(folder: Path, options: RunOptions, material: Identity) -> Begin | None:
    """None before the first one. TrainingError: it is damaged, of another run, or beyond --steps."""
    found = state.checkpoints(folder)
    if not found:
        return None
    kept = state.read_checkpoint(found[-1])
    if kept["run"] != hashed(options, material):
        raise TrainingError(f"{found[-1]}: belongs to another run; nothing was changed")
    if kept["step"] > options.steps:
        raise TrainingError(
            f"--steps: {options.steps}, but the run has made {kept['step']} steps already"
        )
    return Begin(found[-1], kept)
