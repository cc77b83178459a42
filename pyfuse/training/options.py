"""Options of a run: a field each, with what the command line says about it, its limits, and whether it may change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyfuse.training.errors import TrainingError

PARALLEL = ("ddp", "fsdp")  # see parallel.py
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Some = TypeVar("Some", bound="RunOptions")


def option(
    default: Any, text: str, *, metavar: str | None = None, least: float | None = None, below: float | None = None,
    choices: tuple[str, ...] = (), free: bool = False,
) -> Any:  # fmt: skip
    """text: for the help. least, below: least ≤ value < below. free: may be another when a run goes on."""
    return field(
        default=default,
        metadata={
            "text": text, "metavar": metavar, "least": least, "below": below, "choices": choices, "free": free,
        },
    )  # fmt: skip


def flag(name: str) -> str:
    """The option on the command line: --weight-decay of weight_decay."""
    return "--" + name.strip("_").replace("_", "-")


@dataclass(frozen=True)
class RunOptions:
    """Those of every kind of training."""

    steps: int = option(500, "updates of the parameters in all", metavar="N", least=1, free=True)
    batch: int = option(16, "sequences at a time, of all processes together", metavar="N", least=1)
    accumulate: int = option(
        1, "batches whose gradients are added up for one step", metavar="N", least=1
    )
    lr: float = option(1e-3, "largest learning rate", metavar="X", least=0.0)
    warmup: int = option(
        50, "steps in which the learning rate rises; then a cosine to a tenth", metavar="N", least=0
    )
    weight_decay: float = option(0.1, "AdamW's, of matrices only", metavar="X", least=0.0)
    clip: float = option(
        1.0, "largest norm of the gradient, which is scaled down to it; 0 for any", metavar="X", least=0.0
    )  # fmt: skip
    dtype: str = option(
        "fp32",
        "of matrix products (autocast), parameters are float32; bf16 is slow on CPUs that lack it",
        choices=tuple(DTYPES),
    )
    recompute: bool = option(
        False, "keep less for the backward pass, and compute it again: less memory, more time", free=True
    )  # fmt: skip
    stock: bool = option(
        False, "plain torch instead of pyfuse's operations, to compare: same weights, same batches"
    )
    deterministic: bool = option(
        False,
        "two runs are the same bit by bit: no measurement decides which products are the fastest "
        "(a run that goes on takes those that it began with, in any case)",
    )
    seed: int = option(0, "of initial weights, order and dropout", metavar="N", least=0)
    threads: int | None = option(
        None, "CPU threads (default: physical cores); the bits depend on it", metavar="N", least=1, free=True
    )  # fmt: skip
    device: str | None = option(
        None, "what computes (default: cuda where torch finds a GPU)", choices=("cpu", "cuda"), free=True
    )  # fmt: skip
    parallel: str = option(
        "ddp",
        "what several processes hold: each all of the model (ddp), or each a part of it, of its gradients and of the "
        "optimizer's state (fsdp)",
        choices=PARALLEL,
        free=True,
    )
    save_every: int = option(
        100, "steps between two checkpoints; 0 for one at the end", metavar="N", least=0, free=True
    )
    eval_every: int = option(
        50, "steps between two evaluations; 0 for first and last", metavar="N", least=0, free=True
    )

    def check(self) -> None:
        """ValueError: a value beyond its limits."""
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            choices, least, below = limits["choices"], limits["least"], limits["below"]
            if choices and value is not None and value not in choices:
                raise ValueError(
                    f"{flag(f.name)}: got {value!r}, needs one of {', '.join(choices)}"
                )
            if value is None or least is None:
                continue
            if not least <= value < (math.inf if below is None else below):
                needs = f"at least {least:g}" + ("" if below is None else f" and below {below:g}")
                raise ValueError(f"{flag(f.name)}: got {value:g}, needs {needs}")

    def check_together(self, given: Iterable[str]) -> None:
        """ValueError: an option that another one makes useless. given: the names of those that somebody chose."""

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def fixed(self) -> dict[str, Any]:
        """Those that make the run what it is."""
        stored = self.stored()
        return {f.name: stored[f.name] for f in fields(self) if not f.metadata["free"]}


def resumed(kind: type[Some], stored: Mapping[str, Any], given: Mapping[str, Any]) -> Some:
    """The options of a run that goes on. TrainingError: one is given that cannot change, and differs."""
    known = {f.name for f in fields(kind)}
    if stored.keys() != known:
        raise TrainingError(
            f"the run was begun by another version (options {sorted(stored.keys() ^ known)})"
        )
    before = replace(kind(), **{n: _paths(kind, n, v) for n, v in stored.items()})
    after = replace(before, **given)
    for name, value in after.fixed().items():
        if value != stored[name]:
            raise TrainingError(
                f"{flag(name)}: {value}, but the run has {stored[name]}; leave it out, or begin anew with another --out"
            )
    return after


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _paths(kind: type[RunOptions], name: str, value: Any) -> Any:
    """Back from JSON."""
    declared = next(str(f.type) for f in fields(kind) if f.name == name)
    if "Path" not in declared or value is None:
        return value
    return [Path(v) for v in value] if isinstance(value, list) else Path(value)
