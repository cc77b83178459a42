"""Logic, shifts and bit fields, bit by bit (PTX ISA, "Logic and Shift Instructions", bfe, bfi, bfind, fns, …)."""

from __future__ import annotations

from collections.abc import Iterator

from .opcode_case import Case, table
from .opcode_values import BITS


def bit(value: int, at: int) -> int:
    return value >> at & 1


def ones(count: int) -> int:
    return (1 << count) - 1


def logic() -> Iterator[Case]:
    for t in ("b16", "b32", "b64", "pred"):
        yield Case(f"and.{t}", t, f"{t} {t}", lambda a, b: a & b)
        yield Case(f"or.{t}", t, f"{t} {t}", lambda a, b: a | b)
        yield Case(f"xor.{t}", t, f"{t} {t}", lambda a, b: a ^ b)
        yield Case(f"not.{t}", t, t, lambda a: ~a)
        if t != "pred":
            yield Case(f"cnot.{t}", t, t, lambda a: int(a == 0))
    for table_of_bits in (0x00, 0x01, 0x96, 0xE8, 0xCA, 0x80, 0xFE, 0xFF, 0x1B, 0x40):

        def lop3(a: int, b: int, c: int, k: int = table_of_bits) -> int:
            return sum(bit(k, bit(a, i) << 2 | bit(b, i) << 1 | bit(c, i)) << i for i in range(32))

        yield Case("lop3.b32", "b32", "b32 b32 b32", lop3, f"{{d}}, {{a}}, {{b}}, {{c}}, {table_of_bits}",
                   note=hex(table_of_bits))  # fmt: skip


def shifts() -> Iterator[Case]:
    for n in (16, 32, 64):
        yield Case(f"shl.b{n}", f"b{n}", f"b{n} count", lambda a, k, n=n: a << k if k < n else 0)
        for kind in "bus":
            t = f"{kind}{n}"
            yield Case(f"shr.{t}", t, f"{t} count", lambda a, k, n=n: a >> min(k, n))
    for mode, amount in (("clamp", lambda k: min(k, 32)), ("wrap", lambda k: k & 31)):
        s = "b32 b32 count"
        yield Case(
            f"shf.l.{mode}.b32", "b32", s, lambda a, b, k, f=amount: ((b << 32 | a) << f(k)) >> 32
        )
        yield Case(f"shf.r.{mode}.b32", "b32", s, lambda a, b, k, f=amount: (b << 32 | a) >> f(k))


def counts() -> Iterator[Case]:
    for n in (32, 64):
        yield Case(f"popc.b{n}", "u32", f"b{n}", lambda a: a.bit_count())
        yield Case(f"clz.b{n}", "u32", f"b{n}", lambda a, n=n: n - a.bit_length())
        yield Case(f"brev.b{n}", f"b{n}", f"b{n}", lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))
        for t in (f"u{n}", f"s{n}"):
            yield Case(f"bfind.{t}", "u32", t, lambda a: (~a if a < 0 else a).bit_length() - 1)
            yield Case(
                f"bfind.shiftamt.{t}", "u32", t, lambda a, n=n: shift_amount(~a if a < 0 else a, n)
            )


def shift_amount(a: int, n: int) -> int:
    return n - a.bit_length() if a else -1


def fields() -> Iterator[Case]:
    for t in ("u32", "u64", "s32", "s64"):

        def extract(a: int, position: int, length: int, t: str = t) -> int:
            n, p, size = BITS[t], position & 255, length & 255
            sign = bit(a, min(p + size - 1, n - 1)) if t[0] == "s" and size else 0
            return sum((bit(a, p + i) if i < size and p + i < n else sign) << i for i in range(n))

        yield Case(f"bfe.{t}", t, f"{t} count count", extract)
    for n in (32, 64):

        def insert(a: int, b: int, position: int, length: int, n: int = n) -> int:
            p, size = position & 255, length & 255
            mask = (ones(size) << p) & ones(n)
            return (b & ~mask) | ((a << p) & mask)

        yield Case(f"bfi.b{n}", f"b{n}", f"b{n} b{n} count count", insert)
    yield Case(
        "bmsk.clamp.b32", "b32", "count count", lambda a, b: ones(min(b, 32)) << a if a < 32 else 0
    )
    yield Case("bmsk.wrap.b32", "b32", "count count", lambda a, b: ones(b & 31) << (a & 31))


def permutations() -> Iterator[Case]:
    def take(a: int, b: int, selectors: list[int]) -> int:
        result = 0
        for i, selector in enumerate(selectors):
            byte = (b << 32 | a) >> 8 * (selector & 7) & 255
            if selector & 8:
                byte = 255 * (byte >> 7)
            result |= byte << 8 * i
        return result

    s = "b32 b32 b32"
    yield Case(
        "prmt.b32", "b32", s, lambda a, b, c: take(a, b, [c >> 4 * i & 15 for i in range(4)])
    )
    yield Case(
        "prmt.b32",
        "b32",
        "b32 b32",
        lambda a, b: take(a, b, [2, 15, 4, 9]),
        "{d}, {a}, {b}, 0x94F2",
        note="constant",
    )
    # From the tables of the modes: by the two lowest bits of c, the bytes from the lowest to the highest.
    modes = {
        "f4e": ([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]),
        "b4e": ([0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]),
        "rc8": ([0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]),
        "ecl": ([0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]),
        "ecr": ([0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]),
        "rc16": ([0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]),
    }
    for mode, rows in modes.items():
        yield Case(f"prmt.b32.{mode}", "b32", s, lambda a, b, c, rows=rows: take(a, b, rows[c & 3]))


test_logic = table(logic())
test_shift = table(shifts())
test_count = table(counts())
test_field = table(fields())
test_permutation = table(permutations())
