"""How attention over a cache is launched, as plain data: (rows, head sizes, bytes of an element, GPU) -> Plan.

No figure here is a measured time. Decoding takes as long as the cache takes to come from memory: a multiprocessor needs
some 32 KiB of it under way at any moment, and no step that waits for it. The sizes follow from that and from the shared
memory and registers that there are; tests/test_triton_decode.py holds them to no spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyfuse.kernels.configs import Arch, Tiles, block, family, triton_options

# What a program of the merging kernel loads at a time: 128 bytes of each of 32 splits, 32 numbers to a thread of its
# one warp; no sum passes through shared memory.
COLUMNS, SPLITS = 32, 32
# Columns of float32 queries and keys that are multiplied at a time: their three parts need registers.
CHUNK = 64


@dataclass(frozen=True)
class Plan:
    """Constants and Triton's options of both kernels.

    A program of the first has block_m rows; each row has merge_programs of the second."""

    block_m: int
    options: dict[str, Any]
    merge: dict[str, Any]
    merge_programs: int


def tiles(rows: int, d: int, size: int, arch: Arch, paged: bool, extras: bool) -> Tiles:
    """rows: queries times heads of a group; d: the larger head size, a power of 2.

    extras: softcap or ALiBi, whose steps need registers."""
    kind, d, rows = family(arch), max(d, 64), block(rows)
    stages = 2 if kind == "cdna" else 3
    if paged:
        stages = 2 * stages - 1  # half of them wait for the table, half for the page
    if size == 4:  # three bfloat16 parts of each factor
        rows, stages = min(rows, 32 if d == 64 else 16), min(stages, 3)
        few = kind == "cdna" or (d == 64 and rows == 16)
        return Tiles(rows, 32 if d == 64 else 16, 4 if few else 8, stages)
    large = kind in ("ampere", "hopper", "blackwell")
    keys = (8192 if large else 4096) // d  # 64 or 32 KiB under way
    if rows == 16:
        return Tiles(16, min(keys, 64) if extras else keys, 4, stages)
    if rows == 32 or extras or d > 128:
        return Tiles(32, min(keys, 32 if kind == "cdna" else 64), 8, stages)
    if kind in ("hopper", "blackwell"):  # products of 64 rows read keys in shared memory
        return Tiles(64, 64, 4 if d == 64 else 8, stages)
    return Tiles(64, 32, 4 if d == 64 else 8, stages)


@lru_cache(maxsize=1024)
def plan(
    rows: int,
    d: int,
    dv: int,
    size: int,
    arch: Arch,
    page_size: int | None,
    unit: int,
    fold: bool,
    precision: str,
    least: int,
) -> Plan:
    """page_size: None for a cache in one piece; unit: elements that strides are counted in; fold: whether scores need
    nothing but their scale; least: keys that a share has at least, a multiple of every BLOCK_N."""
    block_d, block_dv = block(d), block(dv)
    chosen = tiles(rows, max(block_d, block_dv), size, arch, page_size is not None, not fold)
    constants = {
        "D": d,
        "Dv": dv,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "CHUNK": min(block_d, CHUNK) if size == 4 else block_d,
        "LEAST": least,
        "UNIT": unit,
        "FOLD": fold,
        "WHOLE": page_size is None or page_size % chosen.block_n == 0,
        "PRECISION": precision,
    }
    merge = {
        "Dv": dv,
        "COLUMNS": COLUMNS,
        "SPLITS": SPLITS,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "LEAST": least,
    }
    if chosen.warps == 4 and not isinstance(arch, str):
        # Two such programs have room for 255 registers to a thread; left to itself the assembler spills to fit in more.
        constants["maxnreg"] = 255
    return Plan(
        chosen.block_m, constants | chosen.options, merge | triton_options(1), -(-dv // COLUMNS)
    )
