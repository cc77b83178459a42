"""Arithmetic of .f16 and .bf16, alone and in pairs (PTX ISA, "Half Precision Floating-Point Instructions").

Any NaN will do where PTX does not name the canonical one, 0x7fff.
"""

from __future__ import annotations

from collections.abc import Iterator

from .opcode_case import Case, table
from .opcode_formats import FORMATS, Format
from .opcode_reference import OPERATIONS, Bits, by_magnitude, chosen, in_halves, rounded


def alone_and_packed(op: str, half: str, count: int, one: Bits, nan: bool = True) -> Iterator[Case]:
    """`op` has a {t} for the type."""
    yield Case(op.format(t=half), half, f"{half} " * count, one, nan=half if nan else "")
    packed = f"{half}x2"
    yield Case(
        op.format(t=packed), packed, f"{packed} " * count, in_halves(one), nan=packed if nan else ""
    )


def relu(one: Bits, form: Format) -> Bits:
    """Zero in place of what is negative, the canonical NaN for NaN."""

    def apply(*patterns: int) -> int:
        bits = one(*patterns)
        return form.nan if form.is_nan(bits) else 0 if bits & form.sign else bits

    return apply


def any_zero(got: int, want: int, *_: int) -> bool:
    """.relu says nothing of the sign of a zero."""
    return (got | want) & 0x7FFF == 0


def any_zeros(got: int, want: int, *_: int) -> bool:
    halves = [(got >> n & 0xFFFF, want >> n & 0xFFFF) for n in (0, 16)]
    return all(a == b or any_zero(a, b) for a, b in halves)


def arithmetic() -> Iterator[Case]:
    for half in ("f16", "bf16"):
        form = FORMATS[half]
        for name in ("add", "sub", "mul", "fma"):
            count, operation = OPERATIONS[name]
            for r in ("", ".rn") if count == 2 else (".rn",):
                for ftz in ("", ".ftz") if half == "f16" else ("",):
                    for sat in ("", ".sat") if half == "f16" else ("",):
                        one = rounded(operation, form, "rn", bool(ftz), bool(sat))
                        yield from alone_and_packed(f"{name}{r}{ftz}{sat}.{{t}}", half, count, one)
                    if count == 3:
                        one = relu(rounded(operation, form, "rn", bool(ftz)), form)
                        yield Case(
                            f"fma.rn{ftz}.relu.{half}", half, f"{half} " * 3, one, accept=any_zero
                        )
                        packed = f"{half}x2"
                        yield Case(
                            f"fma.rn{ftz}.relu.{packed}",
                            packed,
                            f"{packed} " * 3,
                            in_halves(one),
                            accept=any_zeros,
                        )


def extremes() -> Iterator[Case]:
    for half in ("f16", "bf16"):
        form = FORMATS[half]
        for name in ("min", "max"):
            for ftz in ("", ".ftz") if half == "f16" else ("",):
                for nan in ("", ".NaN"):

                    def one(
                        a: int,
                        b: int,
                        f: Format = form,
                        n: str = name,
                        z: bool = bool(ftz),
                        k: bool = bool(nan),
                    ) -> int:
                        return chosen(n, f, k, *(f.flush(v) if z else v for v in (a, b)))

                    def unsigned(
                        a: int,
                        b: int,
                        f: Format = form,
                        n: str = name,
                        z: bool = bool(ftz),
                        k: bool = bool(nan),
                    ) -> int:
                        return by_magnitude(n, f, k, *(f.flush(v) if z else v for v in (a, b)))

                    yield from alone_and_packed(
                        f"{name}{ftz}{nan}.{{t}}", half, 2, one, nan=not nan
                    )
                    yield from alone_and_packed(
                        f"{name}{ftz}{nan}.xorsign.abs.{{t}}", half, 2, unsigned, nan=not nan
                    )


def signs() -> Iterator[Case]:
    for half in ("f16", "bf16"):
        f = FORMATS[half]
        yield from alone_and_packed("abs.{t}", half, 1, lambda a: a & 0x7FFF)
        yield from alone_and_packed("neg.{t}", half, 1, lambda a: a ^ 0x8000)
        if half == "f16":
            yield from alone_and_packed("abs.ftz.{t}", half, 1, lambda a, f=f: f.flush(a) & 0x7FFF)
            yield from alone_and_packed("neg.ftz.{t}", half, 1, lambda a, f=f: f.flush(a) ^ 0x8000)


test_arithmetic = table(arithmetic())
test_extreme = table(extremes())
test_sign = table(signs())
