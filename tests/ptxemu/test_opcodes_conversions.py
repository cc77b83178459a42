"""cvt between every pair of number types, in every rounding (PTX ISA, "cvt").

Registers are wider than the types here and there: what lies above a source is ignored, a result is extended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from . import opcode_formats as formats
from .opcode_case import Case, table
from .opcode_formats import BF16, F16, FORMATS, ROUNDINGS
from .opcode_reference import WHOLE, convert, ties
from .opcode_values import BITS, operands

INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
SIZES = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def limits(name: str) -> tuple[int, int]:
    bits = BITS[name]
    return (-1 << (bits - 1), (1 << (bits - 1)) - 1) if name[0] == "s" else (0, (1 << bits) - 1)


def clamp(value: int, name: str) -> int:
    low, high = limits(name)
    return min(max(value, low), high)


def registers() -> Iterator[Callable[[str], str]]:
    """Ways to choose a register for an integer: its own width, or a wider one, in turn."""
    yield from itertools.cycle(
        (lambda t: t, lambda t: f"{t}:{max(BITS[t], 32)}", lambda t: f"{t}:64")
    )


def between_integers() -> Iterator[Case]:
    width = registers()
    for to, source in itertools.product(INTEGERS, INTEGERS):
        d, s = next(width)(to), next(width)(source)
        yield Case(f"cvt.{to}.{source}", d, s, lambda a: a, note=f"{d} {s}")
        (low, high), (least, most) = limits(to), limits(source)
        if least < low or most > high:
            yield Case(
                f"cvt.sat.{to}.{source}", s if to == source else d, s, lambda a, t=to: clamp(a, t)
            )


def to_integer(a: int, to: str, source: str, rounding: str, ftz: bool) -> int:
    """Clamped to the type's range. NaN gives 0, but of or to 64 bits the integer with only its top bit set."""
    form = FORMATS[source]
    x = formats.decode(form.flush(a) if ftz else a, form)
    if isinstance(x, float) and math.isnan(x):
        return 1 << (BITS[to] - 1) if source == "f64" or to in ("s64", "u64") else 0
    x = formats.to_integral(x, rounding)
    if isinstance(x, float):
        return 0 if x == 0 else limits(to)[x > 0]
    return clamp(x[0] << x[1], to)


def from_floats() -> Iterator[Case]:
    width = registers()
    for to, source in itertools.product(INTEGERS, FLOATS):
        brain = source == "bf16"  # exact widths, of 16 bits and more
        for rounding in () if brain and BITS[to] == 8 else WHOLE:
            for ftz in ("", ".ftz") if source == "f32" else ("",):
                for sat in ("", ".sat") if rounding == "rzi" and not brain else ("",):
                    yield Case(f"cvt.{rounding}{ftz}{sat}.{to}.{source}", to if brain else next(width)(to), source,
                               lambda a, t=to, s=source, r=rounding, z=bool(ftz): to_integer(a, t, s, r, z),
                               values=operands((source,), 900, 250))  # fmt: skip


def to_floats() -> Iterator[Case]:
    width = registers()
    for to, source in itertools.product(FLOATS, INTEGERS):
        for rounding in () if to == "bf16" and BITS[source] == 8 else ROUNDINGS:
            for sat in ("", ".sat") if rounding == "rn" and to in ("f32", "f64", "f16") else ("",):

                def expect(
                    a: int,
                    f: formats.Format = FORMATS[to],
                    r: str = rounding,
                    sat: bool = bool(sat),
                ) -> int:
                    x: formats.Number = (a, 0) if a else 0.0
                    return formats.encode(formats.saturate(x) if sat else x, f, r)

                yield Case(
                    f"cvt.{rounding}{sat}.{to}.{source}",
                    to,
                    source if to == "bf16" else next(width)(source),
                    expect,
                )


def between_floats() -> Iterator[Case]:
    for to, source in itertools.product(FLOATS, FLOATS):
        if SIZES[to] < SIZES[source]:
            roundings: tuple[str, ...] = ROUNDINGS
        elif to == source:
            roundings = ("", *WHOLE)
        else:
            roundings = ROUNDINGS if SIZES[to] == 16 else ("",)
        flushes = ("", ".ftz") if "f32" in (to, source) else ("",)
        for rounding, ftz in itertools.product(roundings, flushes):
            for sat in ("", ".sat") if to != "bf16" and source != "bf16" else ("",):
                r = f".{rounding}" if rounding else ""
                yield Case(f"cvt{r}{ftz}{sat}.{to}.{source}", to, source,
                           lambda a, v=(to, source, rounding or "rn", bool(ftz), bool(sat)): convert(a, *v), nan=to,
                           values=operands((source,), 900, 1000))  # fmt: skip


def same_zero(bits: int) -> Callable[..., bool]:
    """.relu says nothing of a zero's sign."""
    mask = (1 << (bits - 1)) - 1
    return lambda got, want, *_: (got | want) & mask == 0


def to_short() -> Iterator[Case]:
    """From .f32 with .relu and .satfinite; NaN becomes the canonical one with .relu."""
    for to, rounding in itertools.product(("f16", "bf16", "tf32"), ("rn", "rz", "rna")):
        if (rounding == "rna") != (to == "tf32") and rounding == "rna":
            continue
        for relu, finite in itertools.product(
            ("", ".relu") if rounding != "rna" else ("",), ("", ".satfinite")
        ):
            order = f"{finite}{relu}" if to == "tf32" else f"{relu}{finite}"
            target = "sm_100a" if to == "tf32" and finite and rounding != "rna" else "sm_90a"
            yield Case(f"cvt.{rounding}{order}.{to}.f32", to, "f32",
                       lambda a, v=(to, "f32", rounding, False, False, bool(relu), bool(finite)): convert(a, *v),
                       nan=to,
                       accept=same_zero(16 if to != "tf32" else 32) if relu else None, target=target,
                       values=(ties(to),))  # fmt: skip


def exhaustive() -> Iterator[Case]:
    """Every f16 and every bf16, into wider types."""
    everything = (tuple(range(1 << 16)),)
    for source, to in itertools.product(("f16", "bf16"), ("f32", "f64")):
        yield Case(f"cvt.{to}.{source}", to, source, lambda a, v=(to, source): convert(a, *v), nan=to,
                   values=everything, note="all")  # fmt: skip
    yield Case("cvt.rn.f16.bf16", "f16", "bf16", lambda a: formats.encode(formats.decode(a, BF16), F16), nan="f16",
               values=everything, note="all")  # fmt: skip
    yield Case("cvt.bf16.f16", "bf16", "f16", lambda a: formats.encode(formats.decode(a, F16), BF16), nan="bf16",
               values=everything, note="all")  # fmt: skip


test_between_integers = table(between_integers())
test_from_float = table(from_floats())
test_to_float = table(to_floats())
test_between_floats = table(between_floats())
test_to_short = table(to_short())
test_exhaustive = table(exhaustive())
