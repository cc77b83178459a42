"""Approximate functions, within the errors that PTX states (PTX ISA, "Floating-Point Instructions": div to tanh).

The exact functions are the C library's in double precision, whose own error is far below those bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import opcode_formats as formats
from .opcode_case import Case, table
from .opcode_formats import BF16, F16, F32, F64, Format

PI = math.pi


def guarded(function: Callable[..., float]) -> Callable[..., float]:
    """Outside of the domain: NaN; too large: infinity."""

    def apply(*x: float) -> float:
        try:
            return function(*x)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return apply


def reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def logarithm(x: float) -> float:
    return -math.inf if x == 0 else math.log2(x)


def quotient(x: float, y: float) -> float:
    """|y| above 2**126 gives a zero, or NaN for an infinite x."""
    if 2.0**126 < abs(y) < math.inf:
        return x * math.copysign(0.0, y)
    return full_quotient(x, y)


def full_quotient(x: float, y: float) -> float:
    if y == 0:
        return (
            math.nan
            if x == 0 or math.isnan(x)
            else math.copysign(math.inf, x) * math.copysign(1, y)
        )
    return x / y


@dataclass(frozen=True)
class Near:
    """How far a result may be from the exact one: relative, absolute, or in units of the last place.
    within: the operands for which that is said. ftz: subnormal operands and results become zeros."""

    form: Format
    exact: Callable[..., float]
    relative: float = 0
    absolute: float = 0
    ulp: float = 0
    ftz: bool = False
    within: Callable[..., bool] = lambda *_: True

    def value_of(self, *patterns: int) -> float:
        return self.exact(*self._numbers(*patterns))

    def _numbers(self, *patterns: int) -> list[float]:
        flushed = [self.form.flush(p) if self.ftz else p for p in patterns]
        return [formats.value(formats.decode(p, self.form)) for p in flushed]

    def nearest(self, *patterns: int) -> int:
        x = self.value_of(*patterns)
        bits = formats.encode(x if x == 0 or not math.isfinite(x) else ratio(x), self.form)
        return self.form.flush(bits) if self.ftz else bits

    def accepts(self, got: int, want: int, *patterns: int) -> bool:
        if not self.within(*self._numbers(*patterns)):
            return True
        exact, number = self.value_of(*patterns), formats.value(formats.decode(got, self.form))
        if not math.isfinite(exact):
            return self.form.is_nan(got) and self.form.is_nan(want)
        smallest = math.ldexp(1.0, 1 - self.form.bias)
        if self.ftz and abs(exact) < smallest * (1 + 2 * self.relative) and number == 0:
            return True
        exponent = max(math.frexp(exact)[1] - 1, 1 - self.form.bias)
        step = math.ldexp(1.0, exponent - self.form.mantissa)
        half_subnormal = math.ldexp(0.5, 1 - self.form.bias - self.form.mantissa)
        if math.isinf(number):
            number = math.ldexp(math.copysign(1, number), self.form.bias + 1)
        return abs(number - exact) <= max(
            self.relative * abs(exact), self.absolute, self.ulp * step, half_subnormal
        )


def ratio(x: float) -> formats.Number:
    """A double as an exact number."""
    numerator, denominator = x.as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def case(op: str, name: str, near: Near, count: int = 1) -> Case:
    return Case(op, name, f"{name} " * count, near.nearest, nan=name, accept=near.accepts)


def single() -> Iterator[Case]:
    for ftz in (False, True):
        f = ".ftz" if ftz else ""
        sine, cosine = guarded(math.sin), guarded(math.cos)
        for name, near in {
            "rcp": Near(F32, reciprocal, ulp=1, ftz=ftz),
            "sqrt": Near(F32, guarded(math.sqrt), relative=2**-23, ftz=ftz),
            "rsqrt": Near(
                F32, guarded(lambda x: reciprocal(math.sqrt(x))), relative=2**-22.9, ftz=ftz
            ),
            "ex2": Near(F32, guarded(lambda x: 2.0**x), ulp=2, ftz=ftz),
            "lg2": Near(
                F32, guarded(logarithm), relative=2**-22, ftz=ftz, within=lambda x: not 0.5 < x < 2
            ),
            "sin": Near(
                F32,
                sine,
                absolute=2**-20.5,
                ftz=ftz,
                within=lambda x: not 2 * PI < abs(x) < math.inf,
            ),
            "cos": Near(
                F32,
                cosine,
                absolute=2**-20.5,
                ftz=ftz,
                within=lambda x: not 2 * PI < abs(x) < math.inf,
            ),
        }.items():
            yield case(f"{name}.approx{f}.f32", "f32", near)
        for name, near in {
            "div.approx": Near(
                F32, quotient, ulp=2, ftz=ftz, within=lambda x, y: y == 0 or abs(y) >= 2.0**-126
            ),
            "div.full": Near(F32, full_quotient, ulp=2, ftz=ftz),
        }.items():
            yield case(f"{name}{f}.f32", "f32", near, 2)
    yield case("tanh.approx.f32", "f32", Near(F32, math.tanh, relative=2**-11))


def elsewhere() -> Iterator[Case]:
    """Where the error is stated otherwise: near 1 for lg2, far from 0 for sin and cos."""
    near = Near(F32, guarded(logarithm), absolute=2**-22, within=lambda x: 0.5 < x < 2)
    yield Case("lg2.approx.f32", "f32", "f32", near.nearest, nan="f32", accept=near.accepts,
               values=(tuple(range(0x3F000001, 0x40000000, 9901)),), note="near one")  # fmt: skip
    for name, exact in (("sin", guarded(math.sin)), ("cos", guarded(math.cos))):
        near = Near(F32, exact, absolute=2**-14.7, within=lambda x: abs(x) <= 100 * PI)
        yield Case(f"{name}.approx.f32", "f32", "f32", near.nearest, nan="f32", accept=near.accepts,
                   values=(tuple(range(0x40C90FDB, 0x439D1463, 9901)),), note="far")  # fmt: skip
    for name, exact, start in (
        ("ex2", guarded(lambda x: 2.0**x), 0xC3160000),
        ("tanh", math.tanh, 0x3A800000),
    ):
        near = Near(
            F32, exact, ulp=2 if name == "ex2" else 0, relative=2**-11 if name == "tanh" else 0
        )
        values = tuple(range(start, start + 0x2000000, 16411)) if name == "tanh" else _exponents()
        yield Case(f"{name}.approx.f32", "f32", "f32", near.nearest, nan="f32", accept=near.accepts,
                   values=(values,), note="range")  # fmt: skip


def _exponents() -> tuple[int, ...]:
    """From -152 to 130 in steps that are no power of two: results subnormal, normal and infinite."""
    return tuple(formats.encode(ratio(-152 + i * 0.1371), F32) for i in range(2057))


def double() -> Iterator[Case]:
    """Of the .ftz forms only the upper 32 bits count and are given; their error is called gross and not bounded."""
    rsqrt = guarded(lambda x: reciprocal(math.sqrt(x)))
    for op, exact in (("rcp", reciprocal), ("rsqrt", rsqrt)):
        near = Near(F64, exact, relative=2**-19, ftz=True)

        def upper(a: int, near: Near = near) -> int:
            bits = near.nearest(a >> 32 << 32)
            return 0x7FFFFFFF00000000 if F64.is_nan(bits) else bits >> 32 << 32

        def accepts(got: int, want: int, a: int, near: Near = near) -> bool:
            return (
                got & 0xFFFFFFFF == 0
                and math.isfinite(near.value_of(a))
                and near.accepts(got, want, a >> 32 << 32)
            )

        yield Case(f"{op}.approx.ftz.f64", "f64", "f64", upper, accept=accepts)
    yield case("rsqrt.approx.f64", "f64", Near(F64, rsqrt, relative=2**-50))


def halves() -> Iterator[Case]:
    """ex2 within a relative, tanh within an absolute error."""
    ex2 = guarded(lambda x: 2.0**x)
    for op, half, near in (
        ("tanh.approx", "f16", Near(F16, math.tanh, absolute=2**-10.987)),
        ("tanh.approx", "bf16", Near(BF16, math.tanh, absolute=2**-8)),
        ("ex2.approx", "f16", Near(F16, ex2, relative=2**-9.9)),
        ("ex2.approx.ftz", "bf16", Near(BF16, ex2, relative=2**-7, ftz=True)),
    ):
        yield case(f"{op}.{half}", half, near)

        def both(a: int, n: Near = near) -> int:
            return n.nearest(a & 0xFFFF) | n.nearest(a >> 16) << 16

        def accepts(got: int, want: int, a: int, n: Near = near) -> bool:
            parts = [tuple(v >> shift & 0xFFFF for v in (got, want, a)) for shift in (0, 16)]
            return all(g == w or n.accepts(g, w, x) for g, w, x in parts)

        yield Case(f"{op}.{half}x2", f"{half}x2", f"{half}x2", both, accept=accepts)


test_single = table(single())
test_elsewhere = table(elsewhere())
test_double = table(double())
test_half = table(halves())
