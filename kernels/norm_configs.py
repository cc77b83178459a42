"""How the norms' kernels are launched, as plain data: (row size, bytes of an element, GPU) -> Plan.

No figure here comes from a measured time. They follow from what hardware states (65536 registers of a multiprocessor,
16 bytes that a lane reads at once) and from what the assembler makes of the kernels: tests/test_triton_norm.py holds
each kind of tile to no spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

from pyfuse.kernels.configs import Arch, block, triton_options

from pyfuse.backends.gpu_chip import multiprocessors

REGISTERS, AMD_REGISTERS = 65536, 131072  # of 32 bits, of a multiprocessor

# Elements of a tile per thread: in bfloat16 two 16-byte loads that are under way.
PER_THREAD = 16
# Registers of a thread for these elements of z, weight and bias (40 to 98 are used), and in the backward of z, dy,
# weight and two sums (80 to 162). As many programs start as then run at once, and the assembler may use all that they
# leave: left alone it spills a few for the sake of more programs. Bare: without residual and dropout, and in the
# backward without dz.
BARE_LAYER, BARE_RMS, FORWARD = 80, 64, 128
BARE_BACKWARD, BACKWARD = 128, 168
# The least elements of a tile: below, a program takes several rows. In the backward each program writes one more row
# of sums in float32 for the parameters, so there are few programs with large tiles.
FORWARD_TILE, BACKWARD_TILE = 2048, 4096
# Addresses of each row of which a lane has elements take registers: lanes that read few neighbours have fewer elements.
ROWS_OF_LANE = 4
# Up to here a row stays in registers. 8192: 16 elements for each of 512 threads. 16384: 32 for each of 512, with
# LayerNorm's weight and bias read again for each row. 32768: 32 for each of 1024, that have 64 registers each; these do
# for a bare row, and not in what the assembler makes of it for sm_100 and sm_120.
HELD, FORWARD_ROW, BARE_ROW, BACKWARD_ROW = 8192, 16384, 32768, 8192
BARE_ARCHS = (80, 86, 87, 89, 90)
DROPOUT_ROW = 4096  # the backward with random numbers: the 128 registers that each of 512 threads has are not enough
# Wider rows: columns of a stretch, threads and their registers.
STRETCH, WIDE_THREADS, WIDE_FORWARD, WIDE_BACKWARD = 2048, 256, 80, 104
# Their parameters' gradients: rows and columns of a tile, registers.
SUM_ROWS, SUM_COLUMNS, SUMS = 8, 512, 128
# A program adds so many tiles to its sums where there are that many; with more the rounding of float32 would show.
MOST_TILES = 128
# The sums of all programs are added in tiles of 64 programs x 32 columns, 128 bytes of each.
ADDED_PROGRAMS, ADDED_COLUMNS = 64, 32


@dataclass(frozen=True)
class Plan:
    """rows: of a tile. most: programs, if there are rows for so many; more only if else one had over `chain` tiles.
    wide: rows have more columns than a tile. unit: elements that one lane reads together."""

    rows: int
    most: int
    wide: bool
    unit: int
    options: dict[str, Any]  # of the kernel and of the compiler, not to be changed
    chain: int = 1 << 62

    def programs(self, rows: int) -> int:
        tiles = -(-rows // self.rows)
        return min(tiles, max(self.most, -(-tiles // self.chain)))


def unit_of(d: int, align: int, size: int) -> int:
    """Elements that a lane reads together: 16 bytes of the widest tensor, fewer where rows begin anywhere."""
    return gcd(16 // size, d, align)


def rows_of(columns: int, tile: int, unit: int) -> int:
    """Rows of a tile of at most so many elements."""
    neighbours = max(unit, columns * PER_THREAD // tile)  # of a row in a lane
    return max(1, tile // columns * min(PER_THREAD, ROWS_OF_LANE * neighbours) // PER_THREAD)


def budget(threads: int, need: int, arch: Arch) -> tuple[int, dict[str, Any]]:
    """(programs that run at once, options) where each of so many threads needs so many registers."""
    amd = isinstance(arch, str)
    at_once = max(1, (AMD_REGISTERS if amd else REGISTERS) // (threads * need))
    programs = at_once * multiprocessors(arch)
    if amd:  # warps of 64 lanes, and no such option
        return programs, triton_options(threads // 64)
    spare = min(255, REGISTERS // (threads * at_once) // 8 * 8)
    return programs, triton_options(threads // 32) | {"maxnreg": spare}


@lru_cache(maxsize=1024)
def forward(
    d: int, align: int, size: int, parameter_size: int, arch: Arch, casting: str | None, bare: bool
) -> Plan:
    """align: what divides the strides of rows, in elements; size: bytes of an element in the widest tensor of rows;
    parameter_size: in weight and bias; casting: None for LayerNorm."""
    columns = block(d, 4)
    wide = columns > (BARE_ROW if bare and arch in BARE_ARCHS else FORWARD_ROW)
    hold = columns <= (HELD if casting is None else FORWARD_ROW)
    unit = unit_of(d, align, size if hold else max(size, parameter_size))
    options: dict[str, Any] = {"D": d, "UNIT": unit}
    if casting is not None:
        options["CASTING"] = casting
    if wide:
        most, more = budget(WIDE_THREADS, WIDE_FORWARD, arch)
        return Plan(1, most, True, unit, options | {"BLOCK_D": STRETCH} | more)
    tile = max(columns, FORWARD_TILE)
    rows, threads = rows_of(columns, tile, unit), tile // PER_THREAD
    need = (BARE_LAYER if casting is None else BARE_RMS) if bare else FORWARD
    if columns > HELD:
        threads, need = threads // 2, REGISTERS // (threads // 2)
    most, more = budget(threads, need, arch)
    options |= {"BLOCK_D": columns, "ROWS": rows, "HOLD": hold} | more
    return Plan(rows, most, False, unit, options)


@lru_cache(maxsize=1024)
def backward(
    d: int,
    align: int,
    size: int,
    parameter_size: int,
    arch: Arch,
    casting: str | None,
    bare: bool,
    dropout: bool,
    drop: bool,
) -> Plan:
    """dropout: there is some; drop: z is still to be made by it."""
    columns = block(d, 4)
    wide = columns > (DROPOUT_ROW if dropout else BACKWARD_ROW)
    unit = unit_of(d, align, max(size, parameter_size) if wide else size)
    options: dict[str, Any] = {"D": d, "UNIT": unit, "DROP": drop}
    if casting is not None:
        options["CASTING"] = casting
    if wide:
        most, more = budget(WIDE_THREADS, WIDE_BACKWARD, arch)
        return Plan(1, most, True, unit, options | {"BLOCK_D": STRETCH} | more)
    tile = max(columns, BACKWARD_TILE)
    need = BARE_BACKWARD if bare or (casting is not None and not dropout) else BACKWARD
    most, more = budget(tile // PER_THREAD, need, arch)
    rows = rows_of(columns, tile, unit)
    options |= {"BLOCK_D": columns, "ROWS": rows} | more
    return Plan(rows, most, False, unit, options, MOST_TILES)


@lru_cache(maxsize=1024)
def parameter_sums(d: int, align: int, size: int, arch: Arch, drop: bool) -> Plan:
    """Of wide rows: each program has SUM_COLUMNS columns."""
    unit = unit_of(d, align, size)
    programs, more = budget(SUM_ROWS * SUM_COLUMNS // PER_THREAD, SUMS, arch)
    options = {"D": d, "BLOCK_D": SUM_COLUMNS, "ROWS": SUM_ROWS, "UNIT": unit, "DROP": drop} | more
    return Plan(SUM_ROWS, -(-programs // -(-d // SUM_COLUMNS)), True, unit, options, MOST_TILES)


@lru_cache(maxsize=1024)
def add_programs(d: int, arch: Arch) -> Plan:
    """Their grid is `most`."""
    _, more = budget(ADDED_PROGRAMS * ADDED_COLUMNS // PER_THREAD, FORWARD, arch)
    options = {"D": d, "BLOCK_P": ADDED_PROGRAMS, "BLOCK_D": ADDED_COLUMNS} | more
    return Plan(ADDED_PROGRAMS, -(-d // ADDED_COLUMNS), False, 1, options)


@lru_cache(maxsize=1024)
def elementwise(d: int, align: int, size: int, arch: Arch) -> Plan:
    """Dropout, which sums nothing: a program has one tile, and programs share a row that is wider."""
    columns = min(block(d, 4), FORWARD_TILE)
    unit = unit_of(d, align, size)
    options = {
        "D": d,
        "BLOCK_D": columns,
        "ROWS": rows_of(columns, FORWARD_TILE, unit),
        "STRETCHES": -(-d // columns),
        "UNIT": unit,
    }
    warps = FORWARD_TILE // PER_THREAD // (64 if isinstance(arch, str) else 32)
    return Plan(options["ROWS"], 0, False, unit, options | triton_options(warps))
