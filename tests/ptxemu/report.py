"""What a launch found and counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class EmulationError(AssertionError):
    """A launch had findings; `report` holds them."""

    def __init__(self, report: Report, message: str) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at one instruction.

    kind: out-of-bounds, misaligned, uninitialised, race, async-unwaited, divergent-barrier, deadlock, trap or invalid
    (an instruction used as PTX does not allow). count: how often the same was seen there; the message tells of the
    first time.
    """

    kind: str
    message: str
    line: int
    source: str
    function: str
    count: int

    def __str__(self) -> str:
        place = f"{self.function}, PTX line {self.line}"
        source = f" ({self.source})" if self.source else ""
        again = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}: {self.message}\n    {place}{source}{again}"


@dataclass(frozen=True)
class Accesses:
    """How the memory accesses of one instruction fit the hardware.

    actual: wavefronts of a shared, sectors (32 bytes) of a global access, over all executions; ideal: the fewest that
    the same bytes could take. kind: the counter's name (lds, sts, ldsm, ldg, …).
    """

    kind: str
    line: int
    source: str
    executed: int
    actual: int
    ideal: int


_SHARED = frozenset({"lds", "sts", "ldsm", "stsm", "ldgsts"})


@dataclass
class Report:
    """counters: executed warp instructions by class (mma, mufu, fp32, int, lds, ldg, …), and the sums of `accesses`:
    shared_wavefronts, sectors and their _ideal; copied_sectors and their _ideal are those of cp.async. output: what the
    kernel printed. instructions: of all classes."""

    findings: list[Finding]
    counters: dict[str, int]
    accesses: list[Accesses]
    output: str = ""
    instructions: int = 0
    target: str = ""

    def check(self) -> Report:
        """Raise EmulationError if there are findings; else give the report itself."""
        if self.findings:
            text = "\n".join(map(str, self.findings[:20]))
            more = f"\n… and {len(self.findings) - 20} more" if len(self.findings) > 20 else ""
            count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
            raise EmulationError(self, f"{count}:\n{text}{more}")
        return self

    def kinds(self) -> set[str]:
        """The kinds of findings."""
        return {finding.kind for finding in self.findings}

    def conflicts(self, shared: bool = True) -> list[Accesses]:
        """Instructions with more wavefronts (shared: False: sectors) than ideal, the worst first."""
        wasteful = [
            a for a in self.accesses if (a.kind in _SHARED) == shared and a.actual > a.ideal
        ]
        return sorted(wasteful, key=lambda a: a.ideal - a.actual)


def make_report(raw: dict[str, object], target: str) -> Report:
    """From the extension's plain tuples."""
    accesses = [Accesses(*row) for row in _rows(raw["accesses"])]
    counters: dict[str, int] = dict(raw["counters"])  # type: ignore[call-overload]
    for name, shared in (("shared_wavefronts", True), ("sectors", False)):
        mine = [a for a in accesses if (a.kind in _SHARED) == shared]
        counters[name] = sum(a.actual for a in mine)
        counters[f"{name}_ideal"] = sum(a.ideal for a in mine)
    findings = [Finding(*row) for row in _rows(raw["findings"])]
    return Report(
        findings, counters, accesses, str(raw["output"]), int(str(raw["instructions"])), target
    )


def _rows(value: object) -> Iterable[tuple]:
    assert isinstance(value, list)
    return value
