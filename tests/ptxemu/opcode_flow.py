"""Kernels whose threads each read a number and write one, by whatever way the control flow of a test takes."""

from __future__ import annotations

import numpy as np

import ptxemu

HEADER = """
.visible .entry test(.param .u64 in, .param .u64 out)
{
.reg .b64 %in, %out, %a; .reg .b32 %i<4>, %x<10>, %m<4>; .reg .pred %p<8>;
ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
mov.u32 %i0, %ctaid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
mad.wide.u32 %in, %i0, 4, %in; mad.wide.u32 %out, %i0, 4, %out;
ld.global.b32 %x0, [%in];
"""


def run(module: ptxemu.Module, count: int = 200, high: int = 1000) -> tuple[list[int], list[int]]:
    """The inputs, random, and what the threads wrote."""
    values = np.random.default_rng(5).integers(0, high, count).astype(np.uint32)
    out = np.full(count, 0xFFFF, np.uint32)
    for seed in range(2):
        module.launch(grid=2, block=count // 2, args=[values, out], seed=seed).check()
    return values.tolist(), out.tolist()
