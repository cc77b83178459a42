"""Comparisons and selections (PTX ISA, "Comparison and Selection Instructions").

Of two floats of which one is NaN the comparisons eq … ge are all false, equ … geu all true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import opcode_formats as formats
from .opcode_case import Case, table
from .opcode_formats import FORMATS, Format
from .opcode_values import operands

ORDERED: dict[str, Callable[[int], bool]] = {
    "eq": lambda o: o == 0, "ne": lambda o: o != 0, "lt": lambda o: o < 0,
    "le": lambda o: o <= 0, "gt": lambda o: o > 0, "ge": lambda o: o >= 0,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMPARISONS = [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]
COMBINE: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip
INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
Test = Callable[[int, int], int]


def of_integers(name: str) -> Test:
    test = ORDERED[UNSIGNED.get(name, name)]
    return lambda a, b: int(test((a > b) - (a < b)))


def of_floats(name: str, form: Format, ftz: bool = False) -> Test:
    def test(a: int, b: int) -> int:
        x, y = (formats.decode(form.flush(v) if ftz else v, form) for v in (a, b))
        order = formats.compare(x, y)
        if name in ("num", "nan"):
            return int((order is None) == (name == "nan"))
        if order is None:
            return int(len(name) == 3)
        return int(ORDERED[name[:2]](order))

    return test


def comparisons() -> Iterator[tuple[str, str, str, Test]]:
    """Comparison, .ftz, type and what it does."""
    for t in INTEGERS:
        names = [*ORDERED, *(UNSIGNED if t[0] == "u" else ())]
        yield from ((name, "", t, of_integers(name)) for name in names)
    for t in ("b16", "b32", "b64"):
        yield from ((name, "", t, of_integers(name)) for name in ("eq", "ne"))
    for t in ("f16", "bf16", "f32", "f64"):
        for ftz in ("", ".ftz") if t in ("f16", "f32") else ("",):
            yield from (
                (name, ftz, t, of_floats(name, FORMATS[t], bool(ftz))) for name in COMPARISONS
            )


def few(*names: str) -> tuple[tuple[int, ...], ...]:
    return operands(names, 400, 150)


def to_predicates() -> Iterator[Case]:
    for i, (name, ftz, t, test) in enumerate(comparisons()):
        yield Case(f"setp.{name}{ftz}.{t}", "pred", f"{t} {t}", test, values=few(t, t))
        combined, combine = list(COMBINE.items())[i % 3]
        op, s = f"setp.{name}.{combined}{ftz}.{t}", f"{t} {t} pred"
        if t in ("f16", "bf16"):  # one result only
            yield Case(op, "pred", s, lambda a, b, c, f=test, k=combine: k(f(a, b), 1 - c), "{d}, {a}, {b}, !{c}",
                       values=few(t, t, "pred"))  # fmt: skip
            continue
        yield Case(op, "pred pred", s, lambda a, b, c, f=test, k=combine: (k(f(a, b), 1 - c), k(1 - f(a, b), 1 - c)),
                   "{d}|{e}, {a}, {b}, !{c}", values=few(t, t, "pred"))  # fmt: skip
    for combined, combine in COMBINE.items():
        yield Case(f"setp.ge.{combined}.s32", "pred pred", "s32 s32 pred",
                   lambda a, b, c, k=combine: (k(int(a >= b), c), k(int(a < b), c)), "{d}|{e}, {a}, {b}, {c}",
                   note="plain")  # fmt: skip
    test = of_integers("lt")
    yield Case("setp.lt.s32", "pred", "s32 s32", test, "{d}|_, {a}, {b}", note="first of two")
    yield Case(
        "setp.lt.s32",
        "pred",
        "s32 s32",
        lambda a, b: 1 - test(a, b),
        "_|{d}, {a}, {b}",
        note="second of two",
    )
    yield Case("setp.gt.s32", "pred", "s32", lambda a: int(a > -7), "{d}, {a}, -7", note="constant")


def halves(name: str, half: str, ftz: bool) -> Callable[[int, int], tuple[int, int]]:
    test = of_floats(name, FORMATS[half], ftz)
    return lambda a, b: (test(a & 0xFFFF, b & 0xFFFF), test(a >> 16, b >> 16))


def packed() -> Iterator[Case]:
    for half, one in (("f16", 0x3C00), ("bf16", 0x3F80)):
        t = f"{half}x2"
        for name in COMPARISONS:
            for ftz in ("", ".ftz") if half == "f16" else ("",):
                both = halves(name, half, bool(ftz))
                yield Case(
                    f"setp.{name}{ftz}.{t}",
                    "pred pred",
                    f"{t} {t}",
                    both,
                    "{d}|{e}, {a}, {b}",
                    values=few(t, t),
                )
                yield Case(f"setp.{name}.xor{ftz}.{t}", "pred pred", f"{t} {t} pred",
                           lambda a, b, c, f=both: tuple(v ^ c ^ 1 for v in f(a, b)), "{d}|{e}, {a}, {b}, !{c}",
                           values=few(t, t, "pred"))  # fmt: skip
                yield Case(f"set.{name}{ftz}.{t}.{t}", "b32", f"{t} {t}",
                           lambda a, b, f=both, k=one: sum(k * v << 16 * i for i, v in enumerate(f(a, b))),
                           values=few(t, t))  # fmt: skip


def to_numbers() -> Iterator[Case]:
    """Truth is 1.0, or all ones as an integer."""
    truth = {
        "u32": -1,
        "s32": -1,
        "f32": 0x3F800000,
        "u16": -1,
        "s16": -1,
        "f16": 0x3C00,
        "bf16": 0x3F80,
    }
    for i, (name, ftz, t, test) in enumerate(comparisons()):
        types = ("u16", "s16", "u32", "s32", t) if t in ("f16", "bf16") else ("u32", "s32", "f32")
        to = types[i % len(types)]
        yield Case(
            f"set.{name}{ftz}.{to}.{t}",
            to,
            f"{t} {t}",
            lambda a, b, f=test, k=truth[to]: k * f(a, b),
            values=few(t, t),
        )
        combined, combine = list(COMBINE.items())[i % 3]
        yield Case(f"set.{name}.{combined}{ftz}.u32.{t}", "u32", f"{t} {t} pred",
                   lambda a, b, c, f=test, k=combine: -k(f(a, b), 1 - c), "{d}, {a}, {b}, !{c}",
                   values=few(t, t, "pred"))  # fmt: skip


def selections() -> Iterator[Case]:
    for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
        yield Case(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, c: a if c else b)
        yield Case(f"slct.{t}.s32", t, f"{t} {t} s32", lambda a, b, c: a if c >= 0 else b)
        for ftz in ("", ".ftz"):

            def chosen(a: int, b: int, c: int, ftz: str = ftz) -> int:
                return a if of_floats("ge", FORMATS["f32"], bool(ftz))(c, 0) else b

            yield Case(f"slct{ftz}.{t}.f32", t, f"{t} {t} f32", chosen)


test_to_predicate = table(to_predicates())
test_packed = table(packed())
test_to_number = table(to_numbers())
test_selection = table(selections())
