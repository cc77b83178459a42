"""cvt of two numbers at a time: to and from .f16x2, .bf16x2, .e4m3x2 and .e5m2x2 (PTX ISA, "cvt").

Of two sources the first becomes the upper half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .opcode_case import Case, table
from .opcode_formats import FORMATS
from .opcode_reference import convert, ties
from .opcode_values import operands

One = Callable[[int], int]


def parts(value: int, bits: int) -> tuple[int, int]:
    """The upper and the lower one."""
    return value >> bits, value & ((1 << bits) - 1)


def equal_halves(name: str, relu: bool) -> Callable[..., bool]:
    """Any NaN of the format will do; with .relu only the canonical one, and zeros of any sign."""
    form = FORMATS[name]

    def same(got: int, want: int) -> bool:
        zeros = relu and (got | want) & (form.sign - 1) == 0
        return got == want or zeros or (not relu and form.is_nan(got) and form.is_nan(want))

    def accept(got: int, want: int, *_: int) -> bool:
        return all(map(same, parts(got, form.bits), parts(want, form.bits)))

    return accept


def joined(to: str, one: One) -> Callable[[int, int], int]:
    bits = FORMATS[to].bits
    return lambda a, b: one(a) << bits | one(b)


def packed(to: str, source: str, one: One) -> One:
    bits = FORMATS[source].bits
    return lambda a: joined(to, one)(*parts(a, bits))


def pairs_of(values: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Each value in both places, beside others."""
    return values, values[len(values) // 3 :] + values[: len(values) // 3]


def from_single() -> Iterator[Case]:
    for to, rounding in itertools.product(("f16", "bf16"), ("rn", "rz")):
        for relu, finite in itertools.product(("", ".relu"), ("", ".satfinite")):
            yield joined_case(
                to, f"cvt.{rounding}{relu}{finite}.{to}x2.f32", rounding, bool(relu), bool(finite)
            )
    for to, relu in itertools.product(("e4m3", "e5m2"), ("", ".relu")):
        yield joined_case(to, f"cvt.rn.satfinite{relu}.{to}x2.f32", "rn", bool(relu), True)


def joined_case(to: str, op: str, rounding: str, relu: bool, finite: bool) -> Case:
    def one(a: int) -> int:
        return convert(a, to, "f32", rounding, relu=relu, satfinite=finite)

    return Case(
        op,
        f"{to}x2",
        "f32 f32",
        joined(to, one),
        accept=equal_halves(to, relu),
        values=pairs_of(ties(to)),
    )


def to_bytes() -> Iterator[Case]:
    """Every f16."""
    every = tuple(a | (a * 40503 & 0xFFFF) << 16 for a in range(1 << 16))
    for to, relu in itertools.product(("e4m3", "e5m2"), ("", ".relu")):

        def one(a: int, to: str = to, relu: bool = bool(relu)) -> int:
            return convert(a, to, "f16", relu=relu, satfinite=True)

        yield Case(f"cvt.rn.satfinite{relu}.{to}x2.f16x2", f"{to}x2", "f16x2", packed(to, "f16", one),
                   accept=equal_halves(to, bool(relu)), values=(every[:: 1 if not relu else 7],))  # fmt: skip


def from_bytes() -> Iterator[Case]:
    """Every pair of codes."""
    for to, source in itertools.product(("f16", "bf16"), ("e4m3", "e5m2")):
        for relu in ("", ".relu") if to == "f16" else ("",):
            codes = [convert(a, to, source, relu=bool(relu)) for a in range(256)]
            yield Case(f"cvt.rn{relu}.{to}x2.{source}x2", f"{to}x2", f"{source}x2",
                       packed(to, source, codes.__getitem__),
                       accept=equal_halves(to, bool(relu)), values=(tuple(range(1 << 16)),),
                       target="sm_90a" if to == "f16" else "sm_120a")  # fmt: skip


def random_pairs() -> Iterator[Case]:
    """Bits that no table of ties would hold."""
    for to in ("f16", "bf16"):
        one = {
            "f16": lambda a: convert(a, "f16", "f32"),
            "bf16": lambda a: convert(a, "bf16", "f32"),
        }[to]
        yield Case(f"cvt.rn.{to}x2.f32", f"{to}x2", "f32 f32", joined(to, one), accept=equal_halves(to, False),
                   values=operands(("f32", "f32"), 500, 3000), note="random")  # fmt: skip


test_from_single = table(from_single())
test_to_bytes = table(to_bytes())
test_from_bytes = table(from_bytes())
test_random_pair = table(random_pairs())
