"""How the loss's kernel is launched, as plain data: (vocabulary, bytes of an element, GPU) -> Tiles.

No figure here is a measured time. They follow from the hardware's limits: 16 bytes that a lane reads at once, and some
32 KiB under way for each multiprocessor; tests/test_triton_loss.py holds the kernel to no spill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from pyfuse.kernels.configs import Arch, block, triton_options
from pyfuse.kernels.position_configs import lanes

LANE = 32  # bytes of a row that a lane has under way: two accesses
# Threads of a row. 256: with 64 registers each, four rows are under way on a multiprocessor, 32 KiB.
THREADS = 256
# Registers of a thread, said aloud for half precisions with label smoothing or a softcap: the assembler would rather
# spill one or two to fit a third row on a multiprocessor.
REGISTERS = 128


@dataclass(frozen=True)
class Tiles:
    """columns: of a row at a time; warps: of a program; registers: of a thread at most, None for what it takes."""

    columns: int
    warps: int
    registers: int | None = None

    @cached_property
    def options(self) -> dict[str, Any]:
        """What a launch says of them; not to be changed."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return triton_options(self.warps) | {"BLOCK_V": self.columns} | limit


@lru_cache(maxsize=1024)
def shipped(vocabulary: int, size: int, arch: Arch, extras: bool) -> Tiles:
    """size: bytes of an element of the logits; extras: label smoothing or a softcap."""
    each, warp = LANE // size, lanes(arch)
    threads = max(warp, min(block(vocabulary, each) // each, THREADS))
    registers = REGISTERS if extras and size == 2 and isinstance(arch, int) else None
    return Tiles(threads * each, threads // warp, registers)


def candidates(vocabulary: int, size: int, arch: Arch, extras: bool) -> list[Tiles]:
    """What autotuning tries: the shipped tiles first, then others with more or fewer columns and warps."""
    first = shipped(vocabulary, size, arch, extras)
    near = [
        replace(first, columns=columns, warps=warps)
        for columns in (first.columns // 2, first.columns, 2 * first.columns)
        for warps in (first.warps // 2, first.warps, 2 * first.warps)
        if warps and columns >= warps * lanes(arch)
    ]
    return list(dict.fromkeys((first, *near)))
