"""Which of several ways to compute the same is the fastest on this machine: a matter of measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

MIN_ROUNDS, STILL_ROUNDS, MAX_ROUNDS = 3, 4, 60


def take_turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Best milliseconds of each call, run in turns until none of them has got faster for a while.

    On a quiet machine that is soon; on one that others use too, it takes as many rounds as it needs, up to
    `seconds` (or three rounds, if these take longer).
    """
    best = dict.fromkeys(calls, float("inf"))
    began, still = time.perf_counter(), 0
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and (still >= STILL_ROUNDS or time.perf_counter() - began > seconds):
            break
        still += 1
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            ms = (time.perf_counter() - start) * 1e3
            if ms < 0.98 * best[way]:
                still = 0
            best[way] = min(best[way], ms)
    return best


def winner(milliseconds: Mapping[str, float], worth_it: float) -> str:
    """The fastest way; ``torch``, which is one of them, unless that takes less than `worth_it` of its time."""
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return fastest if milliseconds[fastest] < worth_it * milliseconds["torch"] else "torch"
