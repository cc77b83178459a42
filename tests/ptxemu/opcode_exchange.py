"""Instructions by which the lanes of a warp exchange values, executed by all of them and by some.

A reference takes the members' lanes and a list of values for each source, and gives each member's results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import ptxemu

from .opcode_case import HEAD

FULL = 0xFFFFFFFF
MASKS = (FULL, 0x0F0F5A5A, 1 << 13, 0x80000001, 0x7FFFFFFF)
WARPS = 40
Results = dict[int, tuple[int, ...]]
Reference = Callable[..., Results]


class Exchange(NamedTuple):
    """form: the operands; {d}, {p}: a number and a predicate as results, {a} {b} {c}: sources, {q}: a predicate from
    {a}'s lowest bit, {m}: the members. values: makes the sources of a warp, by its members."""

    op: str
    form: str
    reference: Reference
    values: Callable[[random.Random, list[int]], Sequence[Sequence[int]]]
    bits: int = 32
    target: str = "sm_90a"

    def __str__(self) -> str:
        return f"{self.op} {self.form}"

    def ptx(self) -> str:
        n = self.bits
        operands = self.form.format(d="%d", p="%p", a="%a", b="%b", c="%c", q="%q", m="%mask")
        return (
            HEAD.format(target=self.target)
            + f"""
.visible .entry test(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out, .param .u32 mask)
{{
.reg .b64 %at<4>; .reg .b{n} %a; .reg .b32 %b, %c, %d, %mask, %i<4>, %v; .reg .pred %p, %q, %member;
mov.u32 %i0, %ctaid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
ld.param.u64 %at0, [a]; mad.wide.u32 %at0, %i0, {n // 8}, %at0; ld.global.b{n} %a, [%at0];
ld.param.u64 %at1, [b]; mad.wide.u32 %at1, %i0, 4, %at1; ld.global.b32 %b, [%at1];
ld.param.u64 %at2, [c]; mad.wide.u32 %at2, %i0, 4, %at2; ld.global.b32 %c, [%at2];
ld.param.u64 %at3, [out]; mad.wide.u32 %at3, %i0, 8, %at3; ld.param.u32 %mask, [mask];
mov.u32 %i3, %laneid; shr.u32 %v, %mask, %i3; and.b32 %v, %v, 1; setp.eq.u32 %member, %v, 1;
cvt.u32.u{n} %v, %a; and.b32 %v, %v, 1; setp.eq.u32 %q, %v, 1;
mov.u32 %d, 0x5A5A5A5A; setp.eq.u32 %p, %i0, %i0;
@%member {self.op} {operands};
selp.u32 %v, 1, 0, %p;
st.global.v2.b32 [%at3], {{%d, %v}};
ret;
}}
"""
        )


def check(row: Exchange, masks: Sequence[int] = MASKS) -> None:
    """Lanes that are no members keep what they had."""
    module = ptxemu.load(row.ptx())
    generator = random.Random(row.op)
    for mask in masks:
        members = [lane for lane in range(32) if mask >> lane & 1]
        warps = [row.values(generator, members) for _ in range(WARPS)]
        columns = [
            [v for warp in warps for v in warp[i]] if i < len(warps[0]) else [0] * 32 * WARPS
            for i in range(3)
        ]
        arrays = [
            np.array(c, f"u{row.bits // 8}" if i == 0 else np.uint32) for i, c in enumerate(columns)
        ]
        out = np.zeros((32 * WARPS, 2), np.uint32)
        module.launch("test", WARPS // 2, 64, [*arrays, out, mask]).check()
        for number, warp in enumerate(warps):
            got = out[32 * number : 32 * number + 32].tolist()
            results = row.reference(members, *warp)
            for lane in range(32):
                d, p = [*results.get(lane, ()), None, None][:2]
                wanted = [0x5A5A5A5A if d is None else d & FULL, 1 if p is None else int(p)]
                assert got[lane] == wanted, (
                    f"{row}, members {mask:#x}, lane {lane} of {[list(map(hex, w)) for w in warp]}"
                )
