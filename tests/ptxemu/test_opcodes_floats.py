"""Arithmetic of .f32 and .f64 in every rounding, against exact numbers (PTX ISA, "Floating-Point Instructions").

Single precision gives an unspecified NaN, double precision a NaN with one of the operands' payloads: any NaN will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import opcode_formats as formats
from .opcode_case import Case, table
from .opcode_formats import F32, F64, FORMATS, ROUNDINGS, Format
from .opcode_reference import OPERATIONS, Operation, by_magnitude, chosen, rounded


def arithmetic() -> Iterator[Case]:
    for name, (count, operation) in OPERATIONS.items():
        optional = name in ("add", "sub", "mul")
        for rounding in ["", *ROUNDINGS] if optional else ROUNDINGS:
            r = f".{rounding}" if rounding else ""
            for ftz in ("", ".ftz"):
                for sat in ("", ".sat") if count == 3 or optional else ("",):
                    expect = rounded(operation, F32, rounding or "rn", bool(ftz), bool(sat))
                    yield Case(f"{name}{r}{ftz}{sat}.f32", "f32", "f32 " * count, expect, nan="f32")
            yield Case(
                f"{name}{r}.f64",
                "f64",
                "f64 " * count,
                rounded(operation, F64, rounding or "rn"),
                nan="f64",
            )


def pairs() -> Iterator[Case]:
    """.f32x2: two results, one in each half of 64 bits."""
    for name in ("add", "sub", "mul", "fma"):
        count, operation = OPERATIONS[name]
        for rounding in ["", *ROUNDINGS] if count == 2 else ROUNDINGS:
            for ftz in ("", ".ftz"):
                one = rounded(operation, F32, rounding or "rn", bool(ftz))

                def both(*values: int, one: Callable[..., int] = one) -> int:
                    low, high = (one(*(v >> n & 0xFFFFFFFF for v in values)) for n in (0, 32))
                    return low | high << 32

                r = f".{rounding}" if rounding else ""
                yield Case(
                    f"{name}{r}{ftz}.f32x2",
                    "f32x2",
                    "f32x2 " * count,
                    both,
                    nan="f32x2",
                    target="sm_100a",
                )


def mixed() -> Iterator[Case]:
    """Operands of 16 bits and one of .f32: exact, and rounded once to .f32."""
    for half in ("f16", "bf16"):
        form = FORMATS[half]
        for name in ("add", "sub", "fma"):
            count, operation = OPERATIONS[name]
            for rounding in ["", *ROUNDINGS] if count == 2 else ROUNDINGS:

                def apply(
                    *bits: int,
                    form: Format = form,
                    op: Operation = operation,
                    r: str = rounding or "rn",
                ) -> int:
                    numbers = [formats.decode(b, form) for b in bits[:-1]] + [
                        formats.decode(bits[-1], F32)
                    ]
                    return formats.encode(op(*numbers, r), F32, r)

                r = f".{rounding}" if rounding else ""
                s = f"{half} " * (count - 1) + "f32"
                yield Case(f"{name}{r}.f32.{half}", "f32", s, apply, nan="f32", target="sm_100a")


def extremes() -> Iterator[Case]:
    for name in ("min", "max"):
        yield Case(
            f"{name}.f64",
            "f64",
            "f64 f64",
            lambda a, b, n=name: chosen(n, F64, False, a, b),
            nan="f64",
        )
        for ftz in ("", ".ftz"):
            for nan in ("", ".NaN"):
                # With .NaN the result is the canonical NaN, without it an unspecified one.
                any_nan = "" if nan else "f32"

                def apply(
                    *v: int, name: str = name, ftz: bool = bool(ftz), nan: bool = bool(nan)
                ) -> int:
                    return chosen(name, F32, nan, *(F32.flush(p) if ftz else p for p in v))

                def unsigned(
                    *v: int, name: str = name, ftz: bool = bool(ftz), nan: bool = bool(nan)
                ) -> int:
                    return by_magnitude(name, F32, nan, *(F32.flush(p) if ftz else p for p in v))

                yield Case(f"{name}{ftz}{nan}.f32", "f32", "f32 f32", apply, nan=any_nan)
                yield Case(
                    f"{name}{ftz}{nan}.f32",
                    "f32",
                    "f32 f32 f32",
                    apply,
                    nan=any_nan,
                    note="three",
                    target="sm_100a",
                )
                yield Case(
                    f"{name}{ftz}{nan}.xorsign.abs.f32", "f32", "f32 f32", unsigned, nan=any_nan
                )


def signs() -> Iterator[Case]:
    for t, form in (("f32", F32), ("f64", F64)):
        yield Case(f"abs.{t}", t, t, lambda a, f=form: a & ~f.sign, nan=t)
        yield Case(f"neg.{t}", t, t, lambda a, f=form: a ^ f.sign, nan=t)
        yield Case(
            f"copysign.{t}", t, f"{t} {t}", lambda a, b, f=form: (a & f.sign) | (b & ~f.sign)
        )
    yield Case("abs.ftz.f32", "f32", "f32", lambda a: F32.flush(a) & ~F32.sign, nan="f32")
    yield Case("neg.ftz.f32", "f32", "f32", lambda a: F32.flush(a) ^ F32.sign, nan="f32")


def properties() -> Iterator[Case]:
    for t, form in (("f32", F32), ("f64", F64)):
        tests: dict[str, Callable[[int, Format], bool]] = {
            "finite": lambda m, f: m < f.infinity,
            "infinite": lambda m, f: m == f.infinity,
            "number": lambda m, f: m <= f.infinity,
            "notanumber": lambda m, f: m > f.infinity,
            "normal": lambda m, f: (
                m == 0 or 1 << f.mantissa <= m < f.infinity
            ),  # zeros count as normal
            "subnormal": lambda m, f: 0 < m < 1 << f.mantissa,
        }
        for name, test in tests.items():
            yield Case(
                f"testp.{name}.{t}",
                "pred",
                t,
                lambda a, f=form, test=test: int(test(a & ~f.sign, f)),
            )


def constants() -> Iterator[Case]:
    """Floats as PTX writes them: bits, and decimal numbers, which are doubles."""
    for text, bits in {
        "0f3FC00000": 0x3FC00000,
        "0f80000000": 1 << 31,
        "1.5": 0x3FC00000,
        "-0.1": 0xBDCCCCCD,
    }.items():
        yield Case("add.f32", "f32", "f32", lambda a, k=bits: rounded(OPERATIONS["add"][1], F32)(a, k),
                   f"{{d}}, {{a}}, {text}", nan="f32", note=text)  # fmt: skip
    for text, bits in {
        "0d3FF8000000000000": 0x3FF8 << 48,
        "-2.0": 0xC000 << 48,
        "0.1": 0x3FB999999999999A,
    }.items():
        yield Case("mul.f64", "f64", "f64", lambda a, k=bits: rounded(OPERATIONS["mul"][1], F64)(a, k),
                   f"{{d}}, {{a}}, {text}", nan="f64", note=text)  # fmt: skip


test_arithmetic = table(arithmetic())
test_pair = table(pairs())
test_mixed = table(mixed())
test_extreme = table(extremes())
test_sign = table(signs())
test_property = table(properties())
test_constant = table(constants())
