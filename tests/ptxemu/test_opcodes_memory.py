"""ld and st: every width, vectors, spaces, extension into wider registers, addresses (PTX ISA, "ld", "st").

A row of the tables is a type, the number of elements and the width of the registers. Each of 32 lanes reads its part of
a buffer of random bytes, at a place of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

import ptxemu

from .opcode_case import HEAD, Operand, aligned, carry
from .opcode_values import BITS

TYPES = (
    "b8",
    "u8",
    "s8",
    "b16",
    "u16",
    "s16",
    "b32",
    "u32",
    "s32",
    "f32",
    "b64",
    "u64",
    "s64",
    "f64",
)
LANES = 32


class Access(NamedTuple):
    """modifiers: what stands between ld or st and the type; space: where the lanes' buffers lie."""

    space: str
    modifiers: str
    type: str
    vector: int
    register: int
    target: str = "sm_90a"
    hint: bool = False

    def __str__(self) -> str:
        return f"{self.space}{self.modifiers}.{self.type}x{self.vector}-{self.register}"

    @property
    def bytes(self) -> int:
        return BITS[self.type] // 8 * self.vector

    @property
    def suffix(self) -> str:
        return "" if self.vector == 1 else f".v{self.vector}"

    @property
    def elements(self) -> str:
        names = [f"%v{i}" for i in range(self.vector)]
        return names[0] if self.vector == 1 else "{" + ", ".join(names) + "}"

    def instruction(self, name: str, place: str) -> str:
        op = f"{name}{self.modifiers}{self.suffix}.{self.type}"
        hint = ", %policy" if self.hint else ""
        return (
            f"{op} {self.elements}, [{place}]{hint};"
            if name == "ld"
            else f"{op} [{place}], {self.elements}{hint};"
        )


def shapes(modifiers: str, space: str) -> Iterator[Access]:
    for t in TYPES:
        for count in (1, 2, 4):
            if BITS[t] * count > 128:
                continue
            widths = [w for w in (16, 32, 64) if w >= BITS[t] and (t[0] != "f" or w == BITS[t])]
            for width in widths if count != 2 else widths[-1:]:
                yield Access(space, modifiers, t, count, width)


def accesses(hint_of: str) -> Iterator[Access]:
    """Loads (ld) or stores (st): all shapes in every space, and other modifiers with one shape each."""
    load = hint_of == "ld"
    for space in ("global", "shared", "local") + (("const", "param") if load else ()):
        yield from shapes(f".{space}", space)
    for space in ("global", "shared", "local"):
        for t, count, width in (("u8", 1, 32), ("s16", 2, 32), ("b32", 4, 32), ("f64", 2, 64)):
            yield Access(space, "", t, count, width)  # generic addresses
    yield from (
        Access("shared", f".shared::{m}", t, 1, 32)
        for m in ("cta", "cluster")
        for t in ("s8", "b32")
    )
    for m in (".weak.global", ".volatile.global", ".relaxed.gpu.global", ".relaxed.sys.global", ".volatile.shared",
              *((".global.nc", ".acquire.gpu.global", ".acquire.cta.shared", ".global.ca", ".global.cg", ".global.cs",
                 ".global.lu", ".global.cv", ".global.L1::evict_last", ".global.L1::no_allocate", ".global.L2::128B",
                 ".global.nc.L1::no_allocate.L2::256B") if load else
                (".release.gpu.global", ".release.cta.shared", ".global.wb", ".global.cg", ".global.cs", ".global.wt",
                 ".global.L1::evict_first"))):  # fmt: skip
        space = "shared" if "shared" in m else "global"
        yield Access(space, m, "u32", 1, 32)
        if "acquire" not in m and "release" not in m:
            yield Access(space, m, "b32", 4, 32)
    yield Access("global", ".global.L2::cache_hint", "b32", 4, 32, hint=True)
    yield Access("global", ".global", "b32", 8, 32, "sm_100a")
    yield Access("global", ".global", "b64", 4, 64, "sm_100a")


def kernel(a: Access, load: bool) -> str:
    """Copies bytes from `in` to the space, as far as that can be written; then ld and a plain store of the registers to
    `out`, or a plain load of the registers from `in`, st, and a copy of the bytes to `out`."""
    wide = a.register // 8
    size, total = a.bytes, a.bytes * LANES
    outside = {
        "const": f".const .align 32 .b8 data[{total}] = {{{', '.join(map(str, constant_bytes(total)))}}};\n"
    }
    inside = {
        "shared": f".shared .align 32 .b8 data[{total}];",
        "local": f".local .align 32 .b8 data[{size}];",
    }
    lines = [inside.get(a.space, ""), f".reg .b{a.register} %v<8>; .reg .b32 %i<4>, %s; .reg .b64 %at<8>, %policy;",
             ".reg .b16 %h; mov.u32 %i0, %tid.x; ld.param.u64 %at0, [out];", 
             "createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;"]  # fmt: skip
    if a.space != "param":
        lines.append("ld.param.u64 %at1, [in];")
    plain = "" if a.modifiers else "generic"
    lines += {"global": [f"mad.wide.u32 %at2, %i0, {size}, {'%at1' if load else '%at0'};"],
              "shared": [f"mov.u32 %s, data; mad.lo.u32 %s, %i0, {size}, %s; cvt.u64.u32 %at2, %s;"],
              "local": ["mov.u64 %at2, data;"], "const": [f"mov.u64 %at2, data; mad.wide.u32 %at2, %i0, {size}, %at2;"],
              "param": []}[a.space]  # fmt: skip
    own = "%s" if a.space == "shared" and not plain else "%at2"
    if plain and a.space != "global":
        lines.append(f"cvta.{a.space}.u64 %at2, %at2;")
    far = "%s" if a.space == "shared" else "%at3"
    lines += ["mov.u64 %at3, data;"] if a.space == "local" else []
    if load:
        if a.space in ("shared", "local"):
            lines += [f"mad.wide.u32 %at4, %i0, {size}, %at1;"]
            for i in range(size):
                lines += [f"ld.global.b8 %h, [%at4+{i}];", f"st.{a.space}.b8 [{far}+{i}], %h;"]
        if a.space == "param":
            for lane in range(LANES):
                lines += [
                    f"setp.eq.u32 %p, %i0, {lane};",
                    "@%p " + a.instruction("ld", f"in+{lane * size}"),
                ]
            lines.insert(1, ".reg .pred %p;")
        else:
            lines.append(a.instruction("ld", own))
        lines.append(f"mad.wide.u32 %at5, %i0, {wide * a.vector}, %at0;")
        lines += [f"st.global.b{a.register} [%at5+{i * wide}], %v{i};" for i in range(a.vector)]
    else:
        lines.append(f"mad.wide.u32 %at5, %i0, {wide * a.vector}, %at1;")
        lines += [f"ld.global.b{a.register} %v{i}, [%at5+{i * wide}];" for i in range(a.vector)]
        lines.append(a.instruction("st", own))
        if a.space in ("shared", "local"):
            lines += [f"mad.wide.u32 %at4, %i0, {size}, %at0;"]
            for i in range(size):
                lines += [f"ld.{a.space}.b8 %h, [{far}+{i}];", f"st.global.b8 [%at4+{i}], %h;"]
    source = f".param .align 32 .b8 in[{total}]" if a.space == "param" else ".param .u64 in"
    body = "\n".join(line for line in lines if line)
    return (HEAD.format(target=a.target) + outside.get(a.space, "")
            + f".visible .entry test(.param .u64 out, {source})\n{{\n{body}\nret;\n}}\n")  # fmt: skip


def constant_bytes(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def make_test(load: bool) -> Callable[[Access], None]:
    rows = list(accesses("ld" if load else "st"))

    @pytest.mark.parametrize("access", rows, ids=str)
    def test(access: Access) -> None:
        data = constant_bytes(access.bytes * LANES)
        operand = Operand(access.type, access.register)
        module = ptxemu.load(kernel(access, load))
        if load:
            elements = np.frombuffer(data, f"u{BITS[access.type] // 8}").tolist()
            out = aligned(np.zeros(len(elements), f"u{access.register // 8}"))
            argument = data if access.space == "param" else aligned(np.frombuffer(data, np.uint8))
            module.launch(block=LANES, args=[out, argument]).check()
            assert out.tolist() == operand.fill(elements)
        else:
            generator = random.Random(3)
            registers = [
                generator.getrandbits(access.register) for _ in range(access.vector * LANES)
            ]
            out = aligned(np.zeros(access.bytes * LANES, np.uint8))
            source = aligned(np.array(registers, f"u{access.register // 8}"))
            module.launch(block=LANES, args=[out, source]).check()
            mask = (1 << BITS[access.type]) - 1
            wanted = b"".join(
                (r & mask).to_bytes(BITS[access.type] // 8, "little") for r in registers
            )
            assert out.tobytes() == wanted

    carry(test, lambda: [kernel(row, load) for row in rows])
    return test


test_load = make_test(load=True)
test_store = make_test(load=False)
