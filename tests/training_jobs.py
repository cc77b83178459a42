"""Runs of `pyfuse.training` in the processes of a torchrun: see `training_cases.in_processes`."""

from __future__ import annotations

import importlib
import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pyfuse.training import curves
from pyfuse.training.loop import Trainer

PATHS = ("text", "from_")


class Ended(Exception):
    """As if the process had been ended, but for the next job."""


def main(jobs: list[list[Any]]) -> None:
    curves.draw = lambda *_, **__: None  # it takes longer than all else
    # One group for all jobs: torchrun's store knows each process once.
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    one_step = Trainer._one_step
    for program, folder, given, resume, ends in jobs:
        out = Path(folder)
        for name in PATHS:
            if name in given:
                value = given[name]
                given[name] = [Path(v) for v in value] if isinstance(value, list) else Path(value)

        def step(trainer: Trainer, ends: int = ends, out: Path = out) -> None:
            if trainer.step == ends:
                raise Ended
            one_step(trainer)
            note = out.with_name(f"{out.name}-{trainer.world.rank}.json")
            note.write_text(json.dumps(held(trainer)))

        Trainer._one_step = step  # type: ignore[method-assign]
        run = importlib.import_module(f"pyfuse.training.{program}").run
        with suppress(Ended):
            run(out, given, resume=resume, speak=io.StringIO())
        dist.barrier()


def held(trainer: Trainer) -> dict[str, int]:
    """Numbers that this process has between two steps."""
    learner, states = trainer.parallel.learner, trainer.optimizer.state.values()
    return {
        "parameters": sum(local(p).numel() for p in learner.parameters()),
        "optimizer": sum(local(t).numel() for state in states for t in state.values() if t.dim()),
        "model": sum(p.numel() for p in trainer.model.parameters()),
        "gradients": sum(local(p.grad).numel() for p in learner.parameters() if p.grad is not None),
    }


def local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
