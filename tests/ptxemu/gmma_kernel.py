"""Kernels that multiply with wgmma: any operands against numpy, and small ones whose parts a test may change."""

from __future__ import annotations

import numpy as np
import torch

from ptxemu import sm90
from ptxemu.checkers import Result, words
from ptxemu.gmma import BYTES, Array, Layout, accumulators, codes, fragment
from ptxemu.sm90 import FENCE

# x: an image of n bytes of shared memory, and behind it A's registers; y: those of D, before and after.
LOAD_IMAGE = """
mov.u32 r0, buffer;
mad.lo.u32 r0, tid, 16, r0;
mul.wide.u32 d0, tid, 16;
add.s64 d0, x, d0;
mov.u32 r1, 0;
LOAD:
ld.global.v4.u32 {r4, r5, r6, r7}, [d0];
st.shared.v4.u32 [r0], {r4, r5, r6, r7};
add.s64 d0, d0, 2048;
add.u32 r0, r0, 2048;
add.u32 r1, r1, 2048;
setp.lt.u32 p0, r1, n;
@p0 bra LOAD;
setp.eq.u32 p1, n, 0;
setp.ne.u32 p2, n, 0;
mov.u32 r0, buffer;
shr.u32 r0, r0, 4;
cvt.u64.u32 d0, r0;
cvt.u64.u32 d1, n;
add.s64 d1, x, d1;
mul.wide.u32 d2, tid, 4;
add.s64 d1, d1, d2;
add.s64 d2, y, d2;
fence.proxy.async.shared::cta;
bar.sync 0;
"""


def registers(count: int, first: int = 0) -> str:
    """D."""
    return "{" + ", ".join(f"c{first + i}" for i in range(count)) + "}"


def _steps(
    kinds: str, n: int, k: int, left: Layout | None, right: Layout, scale_d: str, end: str
) -> str:
    """One product after another along k. Those of A from registers, r10 and on, wait for the one before."""
    d_kind, a_kind, _ = kinds.split(".", 3)[-3:]
    size = BYTES[a_kind]
    d = registers(n // (4 if d_kind == "f16" else 2))
    text = ""
    for step, first in enumerate(range(0, k, 32 // size)):
        text += f"add.u64 d4, d0, {right.descriptor(size, first):#x};\n"
        if left is not None:
            text += f"add.u64 d3, d0, {left.descriptor(size, first):#x};\n"
        else:
            text += "wgmma.wait_group.sync.aligned 0;\n"
            text += "".join(
                f"ld.global.u32 r{10 + i}, [d1+{512 * (4 * step + i)}];\n" for i in range(4)
            )
        a = "d3" if left is not None else "{r10, r11, r12, r13}"
        text += f"""wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{32 // size}.{kinds} {d}, {a}, d4, {"1" if step else scale_d}{end};
        wgmma.commit_group.sync.aligned;
        """
    return text + "wgmma.wait_group.sync.aligned 0;\n"


def multiply(
    kinds: str,
    a: Array,
    b: Array,
    left: Layout | None,
    right: Layout,
    *,
    before: Array | None = None,
    scale_d: str = "1",
    signs: tuple[int, int] = (1, 1),
) -> Array:
    """The registers of D = before + A Bᵀ in the emulator; kinds: "f32.bf16.bf16" (D, A, B), "satfinite." may precede.
    A [64, k] and B [n, k] are values; A without a layout comes from registers."""
    d_kind, a_kind, b_kind = kinds.split(".")[-3:]
    size, n, k = BYTES[a_kind], len(b), a.shape[1]
    image = np.full(1 << 16, 0xFF, np.uint8)
    right.store(image, codes(b_kind, b))
    data = [image]
    if left is not None:
        left.store(image, codes(a_kind, a))
    else:
        bits = codes(a_kind, a).reshape(64, -1, 32 // size)
        data += [
            fragment(np.ascontiguousarray(bits[:, i])).view(np.uint8).ravel()
            for i in range(bits.shape[1])
        ]
    end = "" if d_kind == "s32" else f", {signs[0]}, {signs[1]}"
    if size == 2:
        end += "".join(f", {int(m.major == 'MN')}" for m in (left, right) if m is not None)
    start = accumulators(np.zeros((64, n)) if before is None else before, d_kind)
    body = LOAD_IMAGE + "".join(f"ld.global.u32 c{i}, [d2+{512 * i}];\n" for i in range(len(start)))
    body += _steps(kinds, n, k, left, right, scale_d, end)
    body += "".join(f"st.global.u32 [d2+{512 * i}], c{i};\n" for i in range(len(start)))
    y = torch.from_numpy(start.view(np.int32).copy())
    x = torch.from_numpy(np.concatenate(data))
    sm90.run(body, x, y, len(image), block=128, shared=1 << 16, accumulators=len(start)).clean()
    return y.numpy().view(np.uint32)


# ---- products of 64 x 16 by 16 x 8, bf16, without swizzle: A at byte 0, B at byte 2048, all ones

ARRIVE, COMMIT, MEET = (
    "wgmma.fence.sync.aligned;\n",
    "wgmma.commit_group.sync.aligned;\n",
    "bar.sync 0;\n",
)
PROXY = FENCE + "\n"


def wait_group(left: int = 0) -> str:
    return f"wgmma.wait_group.sync.aligned {left};\n"


def mma(first: int = 0, a: str = "d3", scale: str = "1", mark: str = "") -> str:
    """D in registers c[first] and on."""
    majors = "0" if a.startswith("{") else "0, 0"
    opcode = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    return f"{opcode} {registers(4, first)}, {a}, d4, {scale}, 1, 1, {majors};{mark and f' // {mark}'}\n"


def zero(first: int = 0) -> str:
    """Computed, as copies of registers are let pass."""
    return "".join(f"add.u32 c{first + i}, n, 0;\n" for i in range(4))


# Of 8 x 8 elements along k 128 bytes apart (LBO), along the rows 256 (SBO).
DESCRIPTORS = """
mov.u32 r1, buffer;
shr.u32 r1, r1, 4;
cvt.u64.u32 d2, r1;
add.u64 d3, d2, 0x1000080000;
add.u64 d4, d2, 0x1000080080;
mov.b32 r4, 0x3f803f80;
mad.lo.u32 r0, tid, 12, own;
"""
STORE_A = "st.shared.v4.u32 [r0], {r4, r4, r4, r4}; // plain\n"
STORE_B = "st.shared.v4.u32 [r0+2048], {r4, r4, r4, r4};\n"
OPERANDS = DESCRIPTORS + STORE_A + STORE_B + PROXY + MEET
OUT = """
mul.wide.u32 d0, tid, 4;
add.s64 d0, x, d0;
st.global.u32 [d0], c0;
"""
BODY = OPERANDS + zero() + ARRIVE + mma() + COMMIT + wait_group() + OUT


def each_seed(body: str, block: int = 128) -> list[Result]:
    """x: the first accumulator of each thread."""
    return [sm90.run(body, words(block), block=block, seed=seed) for seed in range(3)]


def clean(body: str, expected: float = 16.0) -> None:
    for result in each_seed(body):
        assert (result.clean().x.view(torch.float32) == expected).all()


def fails(body: str, *message: str, kind: str = "async-unwaited") -> None:
    for result in each_seed(body):
        result.only(kind, *message)
