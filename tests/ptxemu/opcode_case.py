"""Tests of one PTX instruction at a time, in tables.

A `Case` is an instruction and a function of Python numbers that says what it must give. `table` makes a test of each:
a kernel loads one set of operands per thread, executes the instruction twice (in all lanes, and under a predicate that
some lanes fail) and stores the results, which must agree bit for bit with the function's.

What does not fit that form is a `program`: PTX text and the function that runs it and looks at the results. Both keep
their PTX where test_opcodes_coverage.py finds it.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import ptxemu

from .opcode_formats import FORMATS
from .opcode_values import BITS, operands

HEAD = ".version 8.8\n.target {target}\n.address_size 64\n"
_MARK = 0x5A5A5A5A5A5A5A5A
_BLOCK = 96
Test = Callable[[], None]


@dataclass(frozen=True)
class Operand:
    """A type, and the bits of the register that holds it: "s8:32" is an s8 in a register of 32 bits."""

    type: str
    register: int

    @staticmethod
    def parse(text: str) -> Operand:
        name, _, register = text.partition(":")
        return Operand(name, int(register) if register else max(BITS[name], 16))

    @property
    def bits(self) -> int:
        return BITS[self.type]

    @property
    def signed(self) -> bool:
        return self.type[0] == "s" and "x" not in self.type

    def read(self, patterns: Iterable[int]) -> list[int]:
        """A register's bits as the operand's values: signed types as signed numbers, all others as their bits."""
        mask, sign = (1 << self.bits) - 1, 1 << (self.bits - 1)
        if self.signed:
            return [((v & mask) ^ sign) - sign for v in patterns]
        return [v & mask for v in patterns] if self.register > self.bits else list(patterns)

    def fill(self, values: Iterable[int]) -> list[int]:
        """Results as the register's bits: extended with their sign, or with zeros."""
        mask, sign = (1 << self.bits) - 1, 1 << (self.bits - 1)
        if self.signed and self.register > self.bits:
            all_of_it = (1 << self.register) - 1
            return [(((v & mask) ^ sign) - sign) & all_of_it for v in values]
        return [v & mask for v in values]


@dataclass(frozen=True)
class Case:
    """op: opcode with its modifiers. d, s: types of the results and of the sources, separated by blanks.
    expect: of the sources' values, gives the result or a tuple of results, as numbers or bit patterns.
    form: the operands as written; {d} {e} stand for results, {a} {b} {c} {f} for sources.
    nan: name of a floating-point type all of whose NaNs are as good as one another; x2 for halves.
    accept: of a result, what was expected and the sources, where not one bit pattern alone is right.
    values: the sources, in place of `operands`. note: tells cases of one opcode apart.
    target: what the instruction needs."""

    op: str
    d: str
    s: str
    expect: Callable[..., Any]
    form: str = ""
    nan: str = ""
    accept: Callable[..., bool] | None = None
    values: tuple[tuple[int, ...], ...] | None = None
    target: str = "sm_90a"
    note: str = ""

    def __str__(self) -> str:
        return f"{self.op}{'-' if self.note else ''}{self.note}"

    @functools.cached_property
    def results(self) -> tuple[Operand, ...]:
        return tuple(map(Operand.parse, self.d.split()))

    @functools.cached_property
    def sources(self) -> tuple[Operand, ...]:
        return tuple(map(Operand.parse, self.s.split()))

    @property
    def masked(self) -> bool:
        """Whether it is tried under a predicate too: where it is one instruction."""
        return ";" not in self.form

    @property
    def instruction(self) -> str:
        form = self.form or ", ".join(
            [f"{{{n}}}" for n in "de"[: len(self.results)]]
            + [f"{{{n}}}" for n in "abcf"[: len(self.sources)]]
        )
        names = {"d": "%d0", "e": "%d1", "a": "%s0", "b": "%s1", "c": "%s2", "f": "%s3"}
        return f"{self.op} {form.format(**names)};"

    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The sources' registers, one list each; what lies above a narrow value is random."""
        columns = self.values or operands(tuple(o.type for o in self.sources))
        generator = random.Random(self.op)
        filled = []
        for column, o in zip(columns, self.sources, strict=True):
            above = o.register - o.bits if o.type != "pred" else 0
            filled.append(
                [v | generator.getrandbits(above) << o.bits if above else v for v in column]
            )
        return tuple(map(tuple, filled))

    def expected(self, columns: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each result's register in every thread."""
        values = [o.read(column) for o, column in zip(self.sources, columns, strict=True)]
        rows = list(map(self.expect, *values))
        outs = list(zip(*rows, strict=True)) if len(self.results) > 1 else [rows]
        return [o.fill(out) for o, out in zip(self.results, outs, strict=True)]


def kernel_of(case: Case) -> str:
    """The PTX: parameters out0.., masked0.. (the same under a predicate), in0.., and the number of threads."""
    d, s = case.results, case.sources
    outs = [f"out{i}" for i in range(len(d))] + [f"masked{i}" for i in range(len(d)) if case.masked]
    ins = [f"in{i}" for i in range(len(s))]
    body = [".reg .pred %live, %some;", ".reg .b32 %i<4>, %t;", ".reg .b64 %at<3>;"]
    body += [_declare(f"%d{i}", o) + " " + _declare(f"%m{i}", o) for i, o in enumerate(d)]
    body += [_declare(f"%s{i}", o) for i, o in enumerate(s)]
    body += ["mov.u32 %i0, %ctaid.x;", "mov.u32 %i1, %ntid.x;", "mov.u32 %i2, %tid.x;",
             "mad.lo.u32 %i0, %i0, %i1, %i2;", "ld.param.u32 %i1, [n];", "setp.ge.u32 %live, %i0, %i1;",
             "@%live ret;"]  # fmt: skip
    for i, o in enumerate(s):
        body += _address(f"in{i}", o) + (
            ["ld.global.b32 %t, [%at2];", f"setp.ne.b32 %s{i}, %t, 0;"]
            if o.type == "pred"
            else [f"ld.global.b{o.register} %s{i}, [%at2];"]
        )
    body.append(case.instruction)
    if case.masked:
        for i, o in enumerate(d):
            body.append(
                f"setp.eq.u32 %m{i}, 0, 0;"
                if o.type == "pred"
                else f"mov.b{o.register} %m{i}, {_marker(o)};"
            )
        masked = re.sub(r"%d(\d)", r"%m\1", case.instruction)
        body += ["and.b32 %t, %i0, 5;", "setp.ne.u32 %some, %t, 0;", f"@%some {masked}"]
    for i, o in enumerate(d):
        body += _store(f"out{i}", f"%d{i}", o)
        if case.masked:
            body += _store(f"masked{i}", f"%m{i}", o)
    parameters = ", ".join([f".param .u64 {name}" for name in outs + ins] + [".param .u32 n"])
    lines = "\n".join(body)
    return (
        HEAD.format(target=case.target)
        + f".visible .entry test({parameters})\n{{\n{lines}\nret;\n}}\n"
    )


def _declare(name: str, o: Operand) -> str:
    return f".reg .{'pred' if o.type == 'pred' else f'b{o.register}'} {name};"


def _marker(o: Operand) -> int:
    return _MARK & ((1 << o.register) - 1)


def _address(parameter: str, o: Operand) -> list[str]:
    size = 4 if o.type == "pred" else o.register // 8
    return [
        f"ld.param.u64 %at0, [{parameter}];",
        f"mul.wide.u32 %at1, %i0, {size};",
        "add.u64 %at2, %at0, %at1;",
    ]


def _store(parameter: str, register: str, o: Operand) -> list[str]:
    if o.type == "pred":
        return [
            *_address(parameter, o),
            f"selp.u32 %t, 1, 0, {register};",
            "st.global.b32 [%at2], %t;",
        ]
    return [*_address(parameter, o), f"st.global.b{o.register} [%at2], {register};"]


def _dtype(o: Operand) -> Any:
    return np.uint32 if o.type == "pred" else np.dtype(f"u{o.register // 8}")


def check(case: Case) -> None:
    """Run the case's kernel, and compare."""
    columns = case.columns()
    count = len(columns[0])
    ins = [np.array(column, _dtype(o)) for column, o in zip(columns, case.sources, strict=True)]
    outs = [np.zeros(count, _dtype(o)) for o in case.results]
    masked = [np.zeros(count, _dtype(o)) for o in case.results if case.masked]
    module = ptxemu.load(kernel_of(case))
    module.launch("test", -(-count // _BLOCK), _BLOCK, [*outs, *masked, *ins, count]).check()
    everywhere = np.ones(count, bool)
    some = (np.arange(count) & 5) != 0
    for operand, expected, out in zip(case.results, case.expected(columns), outs, strict=True):
        wanted = np.array(expected, out.dtype)
        assert len(wanted) == count
        _compare(case, columns, operand, out, wanted, everywhere)
        if case.masked:
            mark = 1 if operand.type == "pred" else _marker(operand)
            _compare(
                case,
                columns,
                operand,
                masked.pop(0),
                np.where(some, wanted, out.dtype.type(mark)),
                some,
            )


def _compare(
    case: Case, columns: Sequence[Sequence[int]], operand: Operand, out: np.ndarray, wanted: np.ndarray,
    active: np.ndarray,
) -> None:  # fmt: skip
    for i in np.flatnonzero(out != wanted).tolist():
        got, want = int(out[i]), int(wanted[i])
        if active[i] and case.nan and _same_nan(case.nan, got, want):
            continue
        if active[i] and case.accept is not None:
            sources = [
                o.read([column[i]])[0] for o, column in zip(case.sources, columns, strict=True)
            ]
            if case.accept(*operand.read([got, want]), *sources):
                continue
        shown = ", ".join(hex(column[i]) for column in columns)
        where = "" if active.all() else " under a predicate" if active[i] else " switched off"
        raise AssertionError(
            f"{case.instruction} gives {got:#x} for {shown}{where} (thread {i}), not {want:#x}"
        )


def _same_nan(name: str, got: int, want: int) -> bool:
    form = FORMATS[name.removesuffix("x2")]
    mask = (1 << form.bits) - 1
    shifts = (0, form.bits) if name.endswith("x2") else (0,)
    parts = [((got >> n) & mask, (want >> n) & mask) for n in shifts]
    return all(a == b or (form.is_nan(a) and form.is_nan(b)) for a, b in parts)


def carry(test: Callable[..., None], texts: Callable[[], list[str]]) -> None:
    """Give a test the PTX that it executes."""
    test.texts = texts  # type: ignore[attr-defined]


def table(cases: Iterable[Case]) -> Callable[[Case], None]:
    """A test of each case."""
    rows = list(cases)

    @pytest.mark.parametrize("case", rows, ids=str)
    def test(case: Case) -> None:
        check(case)

    carry(test, lambda: [kernel_of(case) for case in rows])
    return test


def program(text: str, target: str = "sm_90a") -> Callable[[Callable[[ptxemu.Module], None]], Test]:
    """A test that is given a module of this PTX."""
    ptx = HEAD.format(target=target) + text

    def decorate(look: Callable[[ptxemu.Module], None]) -> Test:
        def test() -> None:
            look(ptxemu.load(ptx))

        test.__name__, test.__doc__ = look.__name__, look.__doc__
        carry(test, lambda: [ptx])
        return test

    return decorate


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 32 bytes."""
    room = np.empty(array.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 32
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
