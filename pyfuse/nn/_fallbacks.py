"""Who hears of a call of torch's that pyfuse ran, and of one that it handed back to torch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Calls:
    """Calls of torch's functions and modules: those run by pyfuse, and those left to torch, by (function, reason).

    A compiled graph (torch.compile) makes no calls of its own that could be counted.
    """

    run: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        total, left = self.run.total(), self.left.total()
        lines = [f"{total} calls run by pyfuse, {left} left to torch"]
        lines += [f"  {count:>8} {name}" for name, count in self.run.most_common()]
        lines += [
            f"  {count:>8} {name}, left to torch: {reason}"
            for (name, reason), count in self.left.most_common()
        ]
        return "\n".join(lines)


# The one that counts, while there is one: a global, since backward passes and data loaders have threads of their own.
counting: Calls | None = None
_inside = threading.local()


def ran(function: str) -> None:
    if not torch.compiler.is_compiling() and counting is not None:
        counting.run[function] += 1


def left(function: str, reason: str) -> None:
    if torch.compiler.is_compiling() or counting is None:
        return
    if not getattr(_inside, "one", False):
        counting.left[function, reason] += 1


@contextmanager
def left_as_a_whole(function: str, reason: str) -> Iterator[None]:
    """Count a module's call that torch's own code runs, but not what this then calls and has to leave as well."""
    left(function, reason)
    before = getattr(_inside, "one", False)
    _inside.one = True
    try:
        yield
    finally:
        _inside.one = before
