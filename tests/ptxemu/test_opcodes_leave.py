"""The end of threads, traps, labels, and what does nothing (PTX ISA, "Control Flow", "Miscellaneous Instructions")."""

from __future__ import annotations

import numpy as np

import ptxemu

from .opcode_case import program
from .opcode_flow import HEADER, run


@program(
    HEADER
    + """
st.global.b32 [%out], 1;
setp.lt.u32 %p0, %x0, 300;
@%p0 ret;
st.global.b32 [%out], 2;
setp.lt.u32 %p1, %x0, 600;
@%p1 exit;
bar.sync 0;
st.global.b32 [%out], 3;
setp.lt.u32 %p2, %x0, 800;
@!%p2 bra LAST;
exit;
LAST:
activemask.b32 %m0;
popc.b32 %m0, %m0;
st.global.b32 [%out], %m0;
}
"""
)
def test_lanes_that_leave(module: ptxemu.Module) -> None:
    """Those that have left count for no barrier, and the end of the body is a return."""
    values, out = run(module)
    for first in range(0, 200, 100):
        for start in range(first, first + 100, 32):
            warp = values[start : min(start + 32, first + 100)]
            left = sum(x >= 800 for x in warp)
            wanted = [1 if x < 300 else 2 if x < 600 else 3 if x < 800 else left for x in warp]
            assert out[start : start + len(warp)] == wanted


@program(
    HEADER
    + """
setp.eq.u32 %p0, %x0, %x0;
@!%p0 bra NEVER;
{ bra LABEL; add.u32 %x0, %x0, 1; LABEL: add.u32 %x0, %x0, 2; }
{ bra LABEL; add.u32 %x0, %x0, 4; LABEL: add.u32 %x0, %x0, 8; }
st.global.b32 [%out], %x0;
ret;
NEVER:
trap;
}
"""
)
def test_labels_have_scopes(module: ptxemu.Module) -> None:
    values, out = run(module)
    assert out == [x + 10 for x in values]


@program(
    HEADER
    + """
setp.ne.u32 %p0, %i0, 70;
@%p0 bra FINE;
trap;
FINE:
st.global.b32 [%out], %x0;
ret;
}
"""
)
def test_trap(module: ptxemu.Module) -> None:
    """A finding that names the lane; a breakpoint would be none."""
    values = np.arange(100, dtype=np.uint32)
    report = module.launch(block=100, args=[values, np.zeros(100, np.uint32)])
    assert report.kinds() == {"trap"}
    assert "warp 2, lane 6" in report.findings[0].message


@program(HEADER + "brkpt;\npmevent 3;\npmevent.mask 5;\nst.global.b32 [%out], %x0;\nret;\n}\n")
def test_what_does_nothing(module: ptxemu.Module) -> None:
    values, out = run(module)
    assert out == values
