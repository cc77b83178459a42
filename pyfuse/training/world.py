"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pyfuse.training.errors import TrainingError

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size`. Only the first one writes and speaks."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that WORLD_SIZE and torchrun's other variables describe; alone without them.

    Each process has a GPU of its own where device is "cuda".
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(torch.device(device))
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes with torchrun"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(torch.device(device), dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
