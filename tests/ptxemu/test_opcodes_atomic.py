"""atom and red: every operation and type, each lane at an address of its own, then all at one (PTX ISA, "atom")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

import ptxemu

from .opcode_case import HEAD, Operand, aligned, carry, program
from .opcode_formats import FORMATS
from .opcode_reference import OPERATIONS, chosen, in_halves, rounded
from .opcode_values import BITS, operands

THREADS = 64
Update = Callable[..., int]


def updates(name: str, t: str, space: str) -> Update:
    """What becomes of the old value, by the operand (and a second one for cas)."""
    form = FORMATS.get(t.removesuffix("x2"))
    if form is not None:
        one: Update
        if name == "add":  # of .f32 only in global memory subnormals are flushed
            one = rounded(OPERATIONS["add"][1], form, ftz=t == "f32" and "shared" not in space)
        else:
            one = partial(chosen, name, form, False)
        return in_halves(one) if t.endswith("x2") else one
    plain: dict[str, Update] = {
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "exch": lambda a, b: b,
        "add": lambda a, b: a + b, "min": min, "max": max, "cas": lambda a, b, c: c if a == b else a,
        "inc": lambda a, b: 0 if a >= b else a + 1, "dec": lambda a, b: b if a == 0 or a > b else a - 1,
    }  # fmt: skip
    return plain[name]


class Atomic(NamedTuple):
    name: str
    modifiers: str  # between atom and the operation
    op: str
    type: str
    vector: int = 1

    def __str__(self) -> str:
        return f"{self.name}{self.modifiers}.{self.op}{f'.v{self.vector}' if self.vector > 1 else ''}.{self.type}"

    @property
    def space(self) -> str:
        return next((s for s in ("shared", "global") if f".{s}" in self.modifiers), "generic")

    def ptx(self) -> str:
        """Parameters: memory, changed in place, what it was, and the operands, one array for each."""
        n, size, b = self.vector, BITS[self.type] // 8, f"b{BITS[self.type]}"
        sources = "bc" if self.op == "cas" else "b"
        lines = [f".reg .b{8 * size} {', '.join(f'%{v}{i}' for v in 'xbc' for i in range(n))};"]
        lines += [
            f"ld.global.b{8 * size} %{v}{i}, [%{v}+{i * size}];" for v in sources for i in range(n)
        ]
        at, shared = "%memory", self.space != "global" and "global" not in self.modifiers
        if shared:
            lines += [f"ld.global.{b} %x{i}, [%memory+{i * size}]; st.shared.{b} [%s+{i * size}], %x{i};"
                      for i in range(n)]  # fmt: skip
            at = "%s" if self.space != "generic" else "%g"
        places = [", ".join(f"%{v}{i}" for i in range(n)) for v in ("x", *sources)]
        places = [p if n == 1 else f"{{{p}}}" for p in places]
        vector = f".v{n}" if n > 1 else ""
        noftz = (
            ".noftz"
            if "16" in self.type
            and self.op in ("add", "min", "max")
            and self.type[0] in "fb"
            and self.op != "cas"
            else ""
        )
        op = f"{self.name}{self.modifiers}.{self.op}{noftz}{vector}.{self.type}"
        old = f"{places[0]}, " if self.name == "atom" else ""
        lines.append(f"{op} {old}[{at}], {', '.join(places[1:])};")
        if self.name == "atom":
            lines += [f"st.global.b{8 * size} [%old+{i * size}], %x{i};" for i in range(n)]
        if shared:
            lines += [f"ld.shared.{b} %x{i}, [%s+{i * size}]; st.global.{b} [%memory+{i * size}], %x{i};"
                      for i in range(n)]  # fmt: skip
        names = ("memory", "old", "b", "c")
        parameters = ", ".join(f".param .u64 {name}" for name in names)
        places_of = "\n".join(
            f"ld.param.u64 %{m}, [{m}]; mad.wide.u32 %{m}, %i0, {n * size}, %{m};" for m in names
        )
        body = "\n".join(lines)
        return (
            HEAD.format(target="sm_90a")
            + f"""
.visible .entry test({parameters})
{{
.shared .align 16 .b8 tile[{THREADS * n * size}];
.reg .b64 {", ".join(f"%{m}" for m in names)}, %g; .reg .b32 %i<4>, %s;
mov.u32 %i0, %ctaid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
mov.u32 %s, tile; mad.lo.u32 %s, %i2, {n * size}, %s; cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g;
{places_of}
{body}
ret;
}}
"""
        )


SPACES = (".global", ".shared", "")
# What orders stands before the space or behind it; red has no .acquire.
ORDERED = {
    "atom": (
        ".global.gpu.acq_rel",
        ".acq_rel.cta.shared",
        ".acquire.sys.global",
        ".release.cluster.shared::cta",
    ),
    "red": (
        ".global.gpu.relaxed",
        ".release.cta.shared",
        ".relaxed.sys.global",
        ".release.cluster.shared::cta",
    ),
}
TYPED = {
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"), "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"), "inc": ("u32",), "dec": ("u32",),
    "min": ("u32", "s32", "u64", "s64"), "max": ("u32", "s32", "u64", "s64"),
}  # fmt: skip


def rows() -> Iterator[Atomic]:
    number = 0
    for name in ("atom", "red"):
        for op, types in TYPED.items():
            if name == "red" and op in ("exch", "cas"):
                continue
            for t in types:
                yield from (
                    Atomic(name, space, op, t) for space in (*SPACES, ORDERED[name][number % 4])
                )
                number += 1
        yield from (Atomic(name, ".global", "add", "f32", n) for n in (2, 4))
        for op in ("add", "min", "max"):
            yield from (
                Atomic(name, ".global", op, t, n) for t in ("f16", "bf16") for n in (2, 4, 8)
            )
            yield from (
                Atomic(name, ".global", op, t, n) for t in ("f16x2", "bf16x2") for n in (2, 4)
            )


ROWS = list(rows())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_alone(row: Atomic) -> None:
    """Each lane has its own place: the old value comes back, the new one is there."""
    operand = Operand(row.type, BITS[row.type])
    count = 3 if row.op == "cas" else 2
    columns = list(operands((row.type,) * count, 500, 300))
    if row.op == "cas":  # half of the comparisons succeed
        columns[1] = tuple(
            a if i & 1 else b for i, (a, b) in enumerate(zip(*columns[:2], strict=True))
        )
    total = len(columns[0]) // (THREADS * row.vector) * THREADS * row.vector
    memory, *sources = (
        aligned(np.array(column[:total], f"u{BITS[row.type] // 8}")) for column in columns
    )
    old = aligned(np.zeros_like(memory))
    before = memory.tolist()
    sources += [sources[-1]] * (2 - len(sources))
    module = ptxemu.load(row.ptx())
    module.launch("test", total // row.vector // THREADS, THREADS, [memory, old, *sources]).check()
    if row.name == "atom":
        assert old.tolist() == before
    values = [operand.read(column[:total]) for column in columns]
    wanted = operand.fill(
        map(updates(row.op, row.type, row.space if row.space != "generic" else "shared"), *values)
    )
    form = FORMATS.get(row.type.removesuffix("x2"))
    for got, want, *seen in zip(memory.tolist(), wanted, *columns, strict=False):
        shifts = (0, 16) if row.type.endswith("x2") else (0,)
        same = form is not None and all(
            got >> n & (2 * form.sign - 1) == want >> n & (2 * form.sign - 1)
            or (
                form.is_nan(got >> n & (2 * form.sign - 1))
                and form.is_nan(want >> n & (2 * form.sign - 1))
            )
            for n in shifts
        )
        assert got == want or same, f"{row} {list(map(hex, seen))}: {got:#x}, not {want:#x}"


carry(test_alone, lambda: [row.ptx() for row in ROWS])


@program(
    """
.visible .entry test(.param .u64 sums, .param .u64 olds)
{
.shared .align 4 .b32 count;
.reg .b64 %sums, %olds; .reg .b32 %i<4>, %v, %s; .reg .pred %p;
ld.param.u64 %sums, [sums]; ld.param.u64 %olds, [olds];
mov.u32 %i0, %ctaid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
mad.wide.u32 %olds, %i0, 16, %olds;
mov.u32 %s, count;
setp.eq.u32 %p, %i2, 0;
@%p st.shared.b32 [%s], 0;
bar.sync 0;
atom.global.add.u32 %v, [%sums], 1; st.global.b32 [%olds], %v;
atom.global.exch.b32 %v, [%sums+4], %i0; st.global.b32 [%olds+4], %v;
atom.global.inc.u32 %v, [%sums+8], 6; st.global.b32 [%olds+8], %v;
atom.shared.add.u32 %v, [%s], 3; st.global.b32 [%olds+12], %v;
red.global.max.s32 [%sums+12], %i0;
red.global.xor.b32 [%sums+16], %i0;
add.u32 %v, %i0, 1;
and.b32 %v, %v, 1;
setp.eq.u32 %p, %v, 0;
@%p red.global.add.f32 [%sums+20], 0f3F800000;
SPIN:
atom.global.cas.b32 %v, [%sums+24], 0, 1;
setp.ne.u32 %p, %v, 0;
@%p bra SPIN;
ld.volatile.global.b32 %v, [%sums+28];
add.u32 %v, %v, %i0;
st.volatile.global.b32 [%sums+28], %v;
atom.global.exch.b32 %v, [%sums+24], 0;
ret;
}
"""
)
def test_all_at_one_address(module: ptxemu.Module) -> None:
    """Whatever the order, each sees another old value, and nothing is lost; a lock lets lanes in one by one."""
    threads = 2 * 70
    orders = set()
    for seed in range(3):
        sums = np.array([0, 1 << 20, 0, -5, 0, 0, 0, 0], np.int32)
        olds = np.zeros((threads, 4), np.uint32)
        module.launch("test", 2, 70, [sums, olds], seed=seed).check()
        assert sorted(olds[:, 0].tolist()) == list(range(threads))
        assert sorted([*olds[:, 1].tolist(), int(sums[1])]) == [*range(threads), 1 << 20]
        assert sorted(olds[:, 2].tolist()) == sorted(i % 7 for i in range(threads))
        assert (
            sorted(olds[:70, 3].tolist()) == sorted(olds[70:, 3].tolist()) == list(range(0, 210, 3))
        )
        assert sums[[0, 2, 3, 4]].tolist() == [
            threads,
            threads % 7,
            threads - 1,
            int(np.bitwise_xor.reduce(np.arange(threads))),
        ]
        assert sums[5:].view(np.float32)[0] == threads / 2
        assert sums[7] == sum(range(threads))
        orders.add(tuple(olds[:, 0].tolist()))
    assert len(orders) == 3  # the seed decides the order
