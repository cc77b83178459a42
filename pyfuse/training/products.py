"""Which matrix product is the fastest is measured, and the products differ in their last bits: a run that goes on in a
new process has to take those that it began with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pyfuse.backends import cpu_matmul


class Products:
    """The ways taken so far, to be saved and given again."""

    def __init__(self, saved: list[list[Any]] | None = None) -> None:
        self.ways: dict[cpu_matmul.Key, cpu_matmul.Way] = {
            tuple(key): way for *key, way in saved or []
        }

    def saved(self) -> list[list[Any]]:
        """For JSON."""
        return [[*key, way] for key, way in sorted(self.ways.items())]

    def kept(self) -> AbstractContextManager[None]:
        """Within: what is known is not measured, what is measured becomes known."""
        return cpu_matmul.remembering(self.ways)
