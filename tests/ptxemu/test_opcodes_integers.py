"""Integer arithmetic, against Python's integers (PTX ISA, "Integer Arithmetic Instructions").

Every result is kept to its type's width by the table itself, so that sums and products here need no wrapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .opcode_case import Case, table
from .opcode_values import BITS

TYPES = ("u16", "u32", "u64", "s16", "s32", "s64")
Two = Callable[[int, int], int]


def clamp(value: int, name: str = "s32") -> int:
    """Into the range of a type."""
    bits = BITS[name]
    low, high = (
        (-1 << (bits - 1), (1 << (bits - 1)) - 1) if name[0] == "s" else (0, (1 << bits) - 1)
    )
    return min(max(value, low), high)


def quotient(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def by_zero(got: int, want: int, a: int, b: int) -> bool:
    """PTX leaves what a division by zero gives to the machine."""
    return b == 0


def halves(operation: Two, signed: bool) -> Two:
    """Both halves of 32 bits by themselves."""

    def part(value: int, shift: int) -> int:
        half = value >> shift & 0xFFFF
        return half - 0x10000 if signed and half >> 15 else half

    def both(a: int, b: int) -> int:
        low, high = (operation(part(a, n), part(b, n)) & 0xFFFF for n in (0, 16))
        return low | high << 16

    return both


def sums() -> Iterator[Case]:
    for t in TYPES:
        yield Case(f"add.{t}", t, f"{t} {t}", lambda a, b: a + b)
        yield Case(f"sub.{t}", t, f"{t} {t}", lambda a, b: a - b)
        yield Case(f"sad.{t}", t, f"{t} {t} {t}", lambda a, b, c: c + abs(a - b))
        yield Case(f"min.{t}", t, f"{t} {t}", min)
        yield Case(f"max.{t}", t, f"{t} {t}", max)
        yield Case(f"div.{t}", t, f"{t} {t}", quotient, accept=by_zero)
        yield Case(f"rem.{t}", t, f"{t} {t}", lambda a, b: a - quotient(a, b) * b, accept=by_zero)
    for t in ("s16", "s32", "s64"):
        yield Case(f"abs.{t}", t, t, abs)
        yield Case(f"neg.{t}", t, t, lambda a: -a)
    yield Case("add.sat.s32", "s32", "s32 s32", lambda a, b: clamp(a + b))
    yield Case("sub.sat.s32", "s32", "s32 s32", lambda a, b: clamp(a - b))
    yield Case("min.relu.s32", "s32", "s32 s32", lambda a, b: max(min(a, b), 0))
    yield Case("max.relu.s32", "s32", "s32 s32", lambda a, b: max(a, b, 0))


def pairs() -> Iterator[Case]:
    for t in ("u16x2", "s16x2"):
        signed = t[0] == "s"
        yield Case(f"add.{t}", t, "b32 b32", halves(lambda a, b: a + b, signed))
        for name, extreme in (("min", min), ("max", max)):
            yield Case(f"{name}.{t}", t, f"{'b32'} {'b32'}", halves(extreme, signed))
    yield Case("min.relu.s16x2", "b32", "b32 b32", halves(lambda a, b: max(min(a, b), 0), True))
    yield Case("max.relu.s16x2", "b32", "b32 b32", halves(lambda a, b: max(a, b, 0), True))


def products() -> Iterator[Case]:
    for t in TYPES:
        n = BITS[t]
        yield Case(f"mul.lo.{t}", t, f"{t} {t}", lambda a, b: a * b)
        yield Case(f"mul.hi.{t}", t, f"{t} {t}", lambda a, b, n=n: a * b >> n)
        yield Case(f"mad.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c: a * b + c)
        yield Case(f"mad.hi.{t}", t, f"{t} {t} {t}", lambda a, b, c, n=n: (a * b >> n) + c)
        if n < 64:
            wide = f"{t[0]}{2 * n}"
            yield Case(f"mul.wide.{t}", wide, f"{t} {t}", lambda a, b: a * b)
            yield Case(f"mad.wide.{t}", wide, f"{t} {t} {wide}", lambda a, b, c: a * b + c)
    yield Case("mad.hi.sat.s32", "s32", "s32 s32 s32", lambda a, b, c: clamp((a * b >> 32) + c))
    for t in ("u32", "s32"):
        yield Case(f"mul24.lo.{t}", t, f"{t} {t}", lambda a, b, t=t: low24(a, t) * low24(b, t))
        yield Case(
            f"mul24.hi.{t}", t, f"{t} {t}", lambda a, b, t=t: low24(a, t) * low24(b, t) >> 16
        )
        yield Case(
            f"mad24.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c, t=t: low24(a, t) * low24(b, t) + c
        )
        yield Case(
            f"mad24.hi.{t}",
            t,
            f"{t} {t} {t}",
            lambda a, b, c, t=t: (low24(a, t) * low24(b, t) >> 16) + c,
        )


def low24(value: int, name: str) -> int:
    low = value & 0xFFFFFF
    return low - 0x1000000 if name[0] == "s" and low >> 23 else low


def signed_part(value: int, shift: int, bits: int, name: str) -> int:
    part = value >> shift & ((1 << bits) - 1)
    return part - (1 << bits) if name[0] == "s" and part >> (bits - 1) else part


def dot_products() -> Iterator[Case]:
    for ta in ("u32", "s32"):
        for tb in ("u32", "s32"):

            def dp4a(a: int, b: int, c: int, ta: str = ta, tb: str = tb) -> int:
                return c + sum(
                    signed_part(a, 8 * i, 8, ta) * signed_part(b, 8 * i, 8, tb) for i in range(4)
                )

            def dp2a(a: int, b: int, c: int, first: int, ta: str = ta, tb: str = tb) -> int:
                return c + sum(
                    signed_part(a, 16 * i, 16, ta) * signed_part(b, 8 * (i + first), 8, tb)
                    for i in range(2)
                )

            tc = "u32" if ta == tb == "u32" else "s32"
            s = f"b32 b32 {tc}"
            yield Case(f"dp4a.{ta}.{tb}", tc, s, dp4a)
            yield Case(f"dp2a.lo.{ta}.{tb}", tc, s, lambda a, b, c, f=dp2a: f(a, b, c, 0))
            yield Case(f"dp2a.hi.{ta}.{tb}", tc, s, lambda a, b, c, f=dp2a: f(a, b, c, 2))


def carries() -> Iterator[Case]:
    """The carry comes from a first sum, is used by the second, and shows in a third."""
    for t in ("u32", "s32", "u64", "s64"):
        n, s = BITS[t], f"u{t[1:]}"
        four = f"{s} {s} {s} {s}"

        def added(a: int, b: int, c: int, f: int, n: int = n) -> tuple[int, int]:
            second = c + f + (a + b >> n)
            return second, second >> n

        def taken(a: int, b: int, c: int, f: int, n: int = n) -> tuple[int, int]:
            second = c - f - (a < b)
            return second, -(second < 0)

        yield Case(f"add.cc.{t}", f"{s} {s}", four, added,
                   f"{{d}}, {{a}}, {{b}}; addc.cc.{t} {{d}}, {{c}}, {{f}}; addc.{t} {{e}}, 0, 0")  # fmt: skip
        yield Case(f"sub.cc.{t}", f"{s} {s}", four, taken,
                   f"{{d}}, {{a}}, {{b}}; subc.cc.{t} {{d}}, {{c}}, {{f}}; subc.{t} {{e}}, 0, 0")  # fmt: skip
        for part in ("lo", "hi"):

            def chained(
                a: int, b: int, c: int, f: int, t: str = t, part: str = part
            ) -> tuple[int, int]:
                n = BITS[t]
                x, y = signed_part(a, 0, n, t), signed_part(b, 0, n, t)
                product = (x * y if part == "lo" else x * y >> n) & ((1 << n) - 1)
                second = product + f + (product + c >> n)
                return second, second >> n

            yield Case(f"mad.{part}.cc.{t}", f"{s} {s}", four, lambda *v, f=chained: (f(*v)[0], 0),
                       f"{{d}}, {{a}}, {{b}}, {{c}}; madc.{part}.{t} {{d}}, {{a}}, {{b}}, {{f}}; "
                       f"mov.b{n} {{e}}, 0")  # fmt: skip
            yield Case(f"mad.{part}.cc.{t}", f"{s} {s}", four, chained,
                       f"{{d}}, {{a}}, {{b}}, {{c}}; madc.{part}.cc.{t} {{d}}, {{a}}, {{b}}, {{f}}; "
                       f"addc.{t} {{e}}, 0, 0", note="chain")  # fmt: skip


def constants() -> Iterator[Case]:
    """Every way to write a number."""
    for text, number in {
        "-5": -5, "0x80000000": 1 << 31, "0xFFFFFFFFU": 0xFFFFFFFF, "0b1011": 11, "017": 15, "4000000000U": 4000000000,
        "-0x10": -16, "0": 0, "-2147483648": -(1 << 31), "WARP_SZ": 32,
    }.items():  # fmt: skip
        yield Case(
            "add.u32", "u32", "u32", lambda a, k=number: a + k, f"{{d}}, {{a}}, {text}", note=text
        )
        yield Case(
            "sub.s64", "s64", "s64", lambda a, k=number: k - a, f"{{d}}, {text}, {{a}}", note=text
        )
    yield Case("mul.wide.s32", "s64", "s32", lambda a: a * -3, "{d}, {a}, -3", note="-3")
    yield Case("mul.wide.u16", "u32", "u16", lambda a: a * 65533, "{d}, {a}, -3", note="-3")
    yield Case("add.s16", "s16", "s16", lambda a: a - 1, "{d}, {a}, -1", note="-1")


test_sum = table(sums())
test_pair = table(pairs())
test_product = table(products())
test_dot_product = table(dot_products())
test_carry = table(carries())
test_constant = table(constants())
