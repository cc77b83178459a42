"""What accelerate() did to a model: the receipt, which can also take it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from pyfuse.hf.state import remove

if TYPE_CHECKING:
    from rich.table import Table


class AccuracyError(RuntimeError):
    """The accelerated model's logits were past the accuracy rule; the model has been restored."""


class Tally:
    """Counts of patched modules, and of skipped ones by reason, for each kind of module."""

    def __init__(self) -> None:
        self.patched: Counter[str] = Counter()
        self.skipped: dict[str, Counter[str]] = {}

    def add(self, kind: str, reason: str | None, count: int = 1) -> None:
        """reason None: patched."""
        if reason is None:
            self.patched[kind] += count
        else:
            self.skipped.setdefault(kind, Counter())[reason] += count


@dataclass
class Receipt:
    """The result of :func:`pyfuse.accelerate`. As a context manager it undoes on leaving.

    patched: kind of module -> how many run on pyfuse.
    skipped: kind of module -> {reason: how many were left as they are}.
    max_error, budget: the logit error of the probe batch that is nearest to its budget, and that
      budget: twice stock's own error plus 2 ulp. Absolute; None without verify.
    errors: the same for each probe batch.
    speedups: case -> time of the stock model / time of the accelerated one, interleaved, best of
      rounds: a quick look at small cases, not a benchmark. speedup: the smallest of them; None
      without verify.
    memory_bytes: what the packed weights cost in addition to the model.
    """

    model: nn.Module = field(repr=False)
    name: str
    patched: Mapping[str, int]
    skipped: Mapping[str, Mapping[str, int]]
    memory_bytes: int = 0
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    speedups: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    undone: bool = False

    @property
    def _worst(self) -> tuple[float, float] | None:
        return max(
            self.errors.values(), key=lambda pair: pair[0] / max(pair[1], 1e-300), default=None
        )

    @property
    def max_error(self) -> float | None:
        return None if self._worst is None else self._worst[0]

    @property
    def budget(self) -> float | None:
        return None if self._worst is None else self._worst[1]

    @property
    def speedup(self) -> float | None:
        return min(self.speedups.values(), default=None)

    def undo(self) -> None:
        """Restore the model as it was before accelerate(); further calls do nothing."""
        if not self.undone:
            remove(self.model)
            self.undone = True

    def __enter__(self) -> Receipt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def rows(self) -> list[tuple[str, str, str]]:
        """(kind, patched, skipped: why) for each kind of module."""
        kinds = list(dict.fromkeys((*self.patched, *self.skipped)))
        return [
            (
                kind,
                str(self.patched.get(kind, 0)),
                "\n".join(f"{count}: {why}" for why, count in self.skipped.get(kind, {}).items()),
            )
            for kind in kinds
        ]

    def summary(self) -> list[str]:
        """The lines under the table."""
        lines = []
        for probe, (error, budget) in self.errors.items():
            lines.append(f"logit error, {probe}: {error:.1e} (allowed {budget:.1e})")
        for case, speedup in self.speedups.items():
            lines.append(f"speed, {case}: {speedup:.2f} x stock")
        if self.memory_bytes:
            lines.append(f"packed weights: {self.memory_bytes / 2**20:.0f} MiB more memory")
        lines += self.notes
        if self.undone:
            lines.append("undone: the model is as it was")
        return lines

    def __str__(self) -> str:
        rows = [("module", "patched", "skipped"), *self.rows()]
        kinds, counts = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"pyfuse.accelerate({self.name})"]
        for kind, count, why in rows:
            first, *rest = why.split("\n")
            lines.append(f"  {kind:{kinds}}  {count:>{counts}}  {first}".rstrip())
            lines += [f"  {'':{kinds}}  {'':{counts}}  {line}" for line in rest]
        return "\n".join([*lines, *(f"  {line}" for line in self.summary())])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"pyfuse.accelerate({self.name})", caption="\n".join(self.summary()))
        table.add_column("module")
        table.add_column("patched", justify="right")
        table.add_column("skipped: why")
        for row in self.rows():
            table.add_row(*row)
        return table

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.name,
            "patched": dict(self.patched),
            "skipped": {kind: dict(reasons) for kind, reasons in self.skipped.items()},
            "max_error": self.max_error,
            "budget": self.budget,
            "errors": {probe: list(pair) for probe, pair in self.errors.items()},
            "speedups": dict(self.speedups),
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
        }
