"""Timing of peers in turns, with its spread: the median of the rounds and where the middle 60 % of them lie.

Machines drift, so what is compared runs in the same round, every second round in reverse order, and a figure
is made of each round's own values (a ratio of the two times, a share of the peak of that moment) before the
median is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Rounds = dict[str, list[float]]  # label -> its value in every round


@dataclass(frozen=True)
class Spread:
    """The median of some values, and their 20th and 80th percentiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            raise ValueError("values: got none, needs at least one")
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        )

    def holds(self, value: float) -> bool:
        """Whether that value lies within the noise of the median."""
        return self.low <= value <= self.high


def in_turns(runs: Mapping[str, Callable[[], float]], *, budget: float, least: int = 7) -> Rounds:
    """What each run returns (its own seconds), round by round until `budget` seconds are over.

    least: rounds that are made in any case. A run below 20 ms is made twice and the second is taken, so that it finds
    the caches as it leaves them itself, not as its peer does.
    """
    values: Rounds = {label: [] for label in runs}
    start = time.perf_counter()
    number = 0
    while number < least or time.perf_counter() - start < budget:
        for label in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            value = runs[label]()
            values[label].append(runs[label]() if value < 0.02 else value)
        number += 1
    return values


def ratio(rounds: Rounds, over: str, under: str) -> Spread:
    """How many times as long `over` takes as `under`."""
    return Spread.of(a / b for a, b in zip(rounds[over], rounds[under], strict=True))
