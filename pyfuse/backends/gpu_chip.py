"""What is known of a GPU by its architecture alone, where a launch may not depend on the chip at hand."""

from __future__ import annotations

# Multiprocessors (AMD: compute units) of the largest chip of a kind. On a smaller one some blocks run after the others:
# their number, and with it the order of sums, must depend on sizes and architecture alone.
MULTIPROCESSORS: dict[int | str, int] = {
    80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 103: 160, 120: 188, 121: 48,
    "gfx90a": 110, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
USUAL = 128


def multiprocessors(arch: int | str) -> int:
    return MULTIPROCESSORS.get(arch, USUAL)
