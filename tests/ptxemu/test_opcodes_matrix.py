"""ldmatrix, stmatrix and movmatrix (PTX ISA, "Warp Level Matrix Instructions").

Of a tile of 8 rows of 8 elements, lane l holds the elements 2 * (l % 4) and the next one of row l / 4.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest

import ptxemu

from .opcode_case import HEAD, aligned, carry

ROOM = 64  # rows of 16 bytes in shared memory


class Tiles(NamedTuple):
    """address: 32 or 64 bits wide, and a constant that is part of it."""

    name: str
    tiles: int
    trans: bool
    address: int = 32
    offset: int = 0

    @property
    def op(self) -> str:
        trans = ".trans" if self.trans else ""
        space = "shared::cta" if self.offset else "shared"
        return f"{self.name}.sync.aligned.m8n8.x{self.tiles}{trans}.{space}.b16"

    def __str__(self) -> str:
        return f"{self.op}-{self.address}{self.offset:+}"

    def ptx(self) -> str:
        """in: the shared memory (a load's), or four registers for each lane; rows: the row that each lane names."""
        registers = "{" + ", ".join(f"%v{i}" for i in range(self.tiles)) + "}"
        place = (
            f"[{'%s' if self.address == 32 else '%a'}{f'+{-self.offset}' if self.offset else ''}]"
        )
        fill = "\n".join(
            f"ld.global.b32 %t, [%in+{4 * i}]; st.shared.b32 [%all+{4 * i}], %t;"
            for i in range(ROOM * 4)
        )
        back = "\n".join(
            f"ld.shared.b32 %t, [%all+{4 * i}]; st.global.b32 [%out+{4 * i}], %t;"
            for i in range(ROOM * 4)
        )
        lane = "mad.wide.u32 %{0}, %i, 16, %{0};"
        if self.name == "ldmatrix":
            work = f"""setp.ne.u32 %p, %i, 0; @%p bra FILLED;
{fill}
FILLED: bar.sync 0;
mov.u32 %v0, 0; mov.u32 %v1, 0; mov.u32 %v2, 0; mov.u32 %v3, 0;
{self.op} {registers}, {place};
{lane.format("out")} st.global.v4.b32 [%out], {{%v0, %v1, %v2, %v3}};"""
        else:
            work = f"""mov.u32 %t, 0; setp.ne.u32 %p, %i, 0; @%p bra FILLED;
{fill}
FILLED: bar.sync 0;
ld.param.u64 %a2, [registers]; {lane.format("a2")} ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%a2];
{self.op} {place}, {registers};
bar.sync 0; @%p bra DONE;
{back}
DONE:"""
        return (
            HEAD.format(target="sm_90a")
            + f"""
.visible .entry test(.param .u64 in, .param .u64 rows, .param .u64 registers, .param .u64 out)
{{
.shared .align 16 .b8 tile[{16 * ROOM}];
.reg .b64 %in, %rows, %out, %a, %a2; .reg .b32 %i, %s, %all, %t, %v<4>; .reg .pred %p;
ld.param.u64 %in, [in]; ld.param.u64 %rows, [rows]; ld.param.u64 %out, [out];
mov.u32 %i, %tid.x; mov.u32 %all, tile;
mad.wide.u32 %rows, %i, 4, %rows; ld.global.b32 %t, [%rows];
mad.lo.u32 %s, %t, 16, %all; add.s32 %s, %s, {self.offset}; cvt.u64.u32 %a, %s;
{work}
ret;
}}
"""
        )


ROWS = [
    Tiles(name, count, trans, *more)
    for name in ("ldmatrix", "stmatrix") for count in (1, 2, 4) for trans in (False, True)
    for more in ((32, 0), (64, 0), (32, 48))
]  # fmt: skip


def element(tile: np.ndarray, lane: int, i: int, trans: bool) -> tuple[int, int]:
    row, column = lane // 4, 2 * (lane % 4) + i
    return (column, row) if trans else (row, column)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tiles(row: Tiles) -> None:
    """Lanes 8 t to 8 t + 7 name the rows of tile t, in any order; what the others name is not looked at."""
    generator = random.Random(str(row))
    memory = np.array([generator.getrandbits(16) for _ in range(8 * ROOM)], np.uint16).reshape(
        ROOM, 8
    )
    places = generator.sample(range(ROOM), 8 * row.tiles)
    rows = np.array([*places, *[1 << 20] * (32 - len(places))], np.uint32)
    registers = np.array([generator.getrandbits(32) for _ in range(128)], np.uint32)
    out = aligned(np.zeros(128 if row.name == "ldmatrix" else 4 * ROOM, np.uint32))
    ptxemu.load(row.ptx()).launch(
        block=32, args=[aligned(memory), rows, aligned(registers), out]
    ).check()
    if row.name == "ldmatrix":
        for lane in range(32):
            for t in range(4):
                tile = (
                    memory[places[8 * t : 8 * t + 8]]
                    if t < row.tiles
                    else np.zeros((8, 8), np.uint16)
                )
                low, high = (int(tile[element(tile, lane, i, row.trans)]) for i in (0, 1))
                assert out[4 * lane + t] == low | high << 16
        return
    wanted = memory.copy()
    for lane in range(32):
        for t in range(row.tiles):
            for i in (0, 1):
                at, column = element(wanted, lane, i, row.trans)
                wanted[places[8 * t + at], column] = int(registers[4 * lane + t]) >> 16 * i & 0xFFFF
    assert np.array_equal(out.view(np.uint16).reshape(ROOM, 8), wanted)


MOVMATRIX = (
    HEAD.format(target="sm_90a")
    + """
.visible .entry test(.param .u64 in, .param .u64 out)
{
.reg .b64 %in, %out; .reg .b32 %i, %v, %w;
ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
mov.u32 %i, %tid.x; mad.wide.u32 %in, %i, 4, %in; mad.wide.u32 %out, %i, 4, %out;
ld.global.b32 %v, [%in];
movmatrix.sync.aligned.m8n8.trans.b16 %w, %v;
st.global.b32 [%out], %w;
ret;
}
"""
)


def test_movmatrix() -> None:
    tile = np.random.default_rng(1).integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    out = np.zeros((8, 8), np.uint16)
    ptxemu.load(MOVMATRIX).launch(block=32, args=[tile, out]).check()
    assert np.array_equal(out, tile.T)


carry(test_tiles, lambda: [row.ptx() for row in ROWS])
carry(test_movmatrix, lambda: [MOVMATRIX])
