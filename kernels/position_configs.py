"""Launches of the rotary embedding and of the embedding sum, as plain data: (sizes, bytes of an element, GPU) -> tiles.

No figure here is a measured time. They follow from the hardware's limits: 65536 registers of a multiprocessor, at most
255 of a thread; 16 bytes that a lane reads at once; and enough bytes under way for the memory's latency, some 32 KiB
for each multiprocessor. tests/test_triton_position.py holds them to no spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

from pyfuse.kernels.configs import Arch, block, triton_options

# Of a large chip. The order of sums may depend on sizes and on the architecture, not on the chip that runs them.
MULTIPROCESSORS = 132


def lanes(arch: Arch) -> int:
    """Threads of a warp."""
    return 64 if isinstance(arch, str) else 32


# The rotary embedding -----------------------------------------------------------------------------

# Bytes of each half of the heads that a lane has under way: two accesses. With 32 programs of a warp on a
# multiprocessor that makes 64 KiB.
TURN_LANE = 32
# A program's own work (its token's row, its angles) is small against so many bytes read.
TURN_BYTES = 8192
# With fewer programs for each multiprocessor, the heads of a token are shared out.
TURN_PROGRAMS = 8


@dataclass(frozen=True)
class Turn:
    """heads_each: of a program; splits: programs of a token; each: tokens of a program. unit: elements that strides are
    counted in, neighbours that are read together. options: of the kernel, HEADS at a time, and of the compiler."""

    heads_each: int
    splits: int
    each: int
    unit: int
    options: dict[str, Any]


@lru_cache(maxsize=1024)
def turn(
    tokens: int,
    heads: int,
    d: int,
    r: int,
    size: int,
    unit: int,
    interleaved: bool,
    inplace: bool,
    arch: Arch,
) -> Turn:
    """heads: of all tensors turned together; d: head size, of which r are turned; size: bytes of an element; unit: what
    divides all strides, and 16 bytes."""
    pairs, copy = block(r // 2, 1), block(d - r, 1) if r < d else 0
    widest, lane = max(pairs, copy // 2), TURN_LANE // size
    warps = min(max(widest // (lane * lanes(arch)), 1), 8)
    together = max(warps * lanes(arch) * lane // widest, 1)
    # No more heads than there are, but work for every lane: one that repeats another's would race with it in place.
    together = min(together, max(block(heads, 1), warps * lanes(arch) // pairs))
    programs = TURN_PROGRAMS * MULTIPROCESSORS
    splits = min(-(-programs // tokens), -(-heads // together))
    heads_each = -(-heads // (splits * together)) * together
    each = max(1, min(TURN_BYTES // (heads * d * size), tokens // programs))
    if not interleaved:
        unit = gcd(unit, r // 2)  # where the second half begins
    options = {
        "D": d,
        "R": r,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "COPY": 0 if inplace else copy,
        "HEADS": together,
        "UNIT": unit,
    }
    return Turn(heads_each, -(-heads // heads_each), each, unit, options | triton_options(warps))


# The embedding sum --------------------------------------------------------------------------------

# Columns of a lane: with the norm's parameters about 130 registers, so that 16 warps of a multiprocessor have three
# rows each under way: 96 KiB of 1024 columns. Half as many in float32; and with a sinusoid, which takes registers.
GATHER_LANE = 32
GATHER_WARPS = 16
# Without a norm, a row is shared out to programs of so many columns.
STRETCH = 1024
# 16 warps with 32 columns a lane have all registers, without the norm's parameters; wider rows are gone through twice.
WIDEST = 16384
WIDE = 4096


@dataclass(frozen=True)
class Gather:
    """rows: tokens of a tile; stretches: tiles of a row, if programs share it; most: programs for each stretch. wide: a
    row has more columns than a tile, and its norm goes through it twice. options: of the kernel and of the compiler."""

    rows: int
    stretches: int
    most: int
    options: dict[str, Any]
    wide: bool = False

    def programs(self, tokens: int, longest: int = 1 << 31) -> int:
        """longest: tokens that a program may have."""
        enough = min(-(-tokens // self.rows), max(self.most, -(-tokens // longest)))
        return enough * self.stretches


def tile_options(d: int, columns: int, unit: int, warps: int) -> dict[str, Any]:
    return {"D": d, "BLOCK_D": columns, "UNIT": unit} | triton_options(warps)


def wide_options(d: int, columns: int, unit: int, warps: int, arch: Arch) -> dict[str, Any]:
    """With registers to spare, said aloud: the assembler would rather spill one or two to fit more programs."""
    limit = {} if isinstance(arch, str) else {"maxnreg": 255}
    return tile_options(d, columns, unit, warps) | limit


@lru_cache(maxsize=256)
def gather(d: int, size: int, unit: int, norm: bool, sinusoidal: bool, arch: Arch) -> Gather:
    """d: columns of a table; size: bytes of an element; unit: elements that strides are counted in. HOLD: the norm's
    parameters stay in registers from token to token."""
    columns, threads = block(d), lanes(arch)
    lane = GATHER_LANE if size == 2 and not sinusoidal else GATHER_LANE // 2
    if norm and columns > (WIDEST // 2 if sinusoidal else WIDEST):
        options = wide_options(d, WIDE, unit, 2 * WIDE // GATHER_LANE // threads, arch)
        return Gather(1, 1, 4 * MULTIPROCESSORS, options, wide=True)
    if columns == WIDEST:
        lane = GATHER_LANE
    if not norm and columns > STRETCH:
        columns = stretch(d)
    tile = max(columns, lane * threads)
    warps, stretches = tile // (lane * threads), -(-d // columns)
    most = max(1, GATHER_WARPS * MULTIPROCESSORS // (warps * stretches))
    rows = tile // columns
    options = tile_options(d, columns, unit, warps) | {"ROWS": rows, "HOLD": columns < WIDEST}
    return Gather(rows, stretches, most, options)


def stretch(d: int) -> int:
    """What divides the row, so that no lane is idle; not shorter, since every stretch reads the tokens' ids."""
    return next((columns for columns in (STRETCH, 512) if d % columns == 0), STRETCH)


# Its gradient -------------------------------------------------------------------------------------

# Columns of a lane: of dy, of e, of the norm's weight and of two sums.
BACKWARD_LANE = 16
BACKWARD_WARPS = 12
BACKWARD_WIDEST = 4096
BACKWARD_WIDE = 1024
# Neighbours that a lane takes: 16 bytes of what it writes, float32.
BACKWARD_UNIT = 4
# A program adds up the norm's gradients of so many tokens one after the other: of more, float32's rounding would show.
BACKWARD_TOKENS = 128


@lru_cache(maxsize=256)
def gather_backward(d: int, unit: int, arch: Arch) -> Gather:
    columns, threads = block(d), lanes(arch)
    if columns > BACKWARD_WIDEST:
        options = wide_options(d, BACKWARD_WIDE, unit, 128 // threads, arch)
        return Gather(1, 1, 8 * MULTIPROCESSORS, options, wide=True)
    tile = max(columns, BACKWARD_LANE * threads)
    warps, rows = tile // (BACKWARD_LANE * threads), tile // columns
    most = max(1, BACKWARD_WARPS * MULTIPROCESSORS // warps)
    return Gather(rows, 1, most, tile_options(d, columns, unit, warps) | {"ROWS": rows})


@lru_cache(maxsize=256)
def norm_sums(d: int, unit: int, arch: Arch) -> Gather:
    """The sums of the norm's gradients of wide rows: 8 columns of a lane."""
    columns = stretch(d)
    stretches = -(-d // columns)
    options = wide_options(d, columns, unit, columns // (8 * lanes(arch)), arch)
    return Gather(1, stretches, 32, options | {"ROWS": 1, "STRETCHES": stretches})


# Elements of a lane: 128 bytes (bfloat16) under way; dropout's random numbers halve it.
SUMS_LANE = 64
# A chunk of 64 rows makes 2 in float32 for the next launch: a tenth of the traffic.
SUMS_CHUNK = 64


@dataclass(frozen=True)
class Sums:
    """chunk: rows that a program adds up, ROWS at a time; stretches: tiles of a row. unit, options: as above."""

    chunk: int
    stretches: int
    unit: int
    options: dict[str, Any]


@lru_cache(maxsize=256)
def row_sums(d: int, unit: int, dropout: bool, arch: Arch) -> Sums:
    """A tile is as wide as a warp, so that a lane has whole columns of it and no sum crosses lanes. unit: what divides
    the stride, and 16 bytes."""
    threads = lanes(arch)
    columns = min(block(d), next((c for c in (8, 4) if d % (c * threads) == 0), 8) * threads)
    rows = min((SUMS_LANE // 2 if dropout else SUMS_LANE) * threads // columns, SUMS_CHUNK)
    unit = min(unit, max(columns // threads, 1))
    options = tile_options(d, columns, unit, 1) | {"ROWS": rows, "CHUNK": SUMS_CHUNK}
    return Sums(SUMS_CHUNK, -(-d // columns), unit, options)
