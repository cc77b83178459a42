"""mma.sync in every shape and type (PTX ISA, "Matrix Fragments for mma").

Small integers first: every sum is exact, so that order and rounding, which PTX leaves open, cannot show. Then numbers
of all sizes, within the error of sums in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

import ptxemu

from . import opcode_formats as formats
from .opcode_case import HEAD, carry
from .opcode_formats import FORMATS

Place = Callable[[int, int], tuple[int, int]]  # of element i of a lane: row and column
TILES = 6
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "f64": 64}


class Shape(NamedTuple):
    """Lane l is thread l % 4 of group l // 4."""

    m: int
    k: int
    bits: int

    def a(self, lane: int, i: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        if self.bits == 64:
            return (group, thread) if self.m == 8 else (group + 8 * (i % 2), thread + 4 * (i // 2))
        per = 32 // self.bits  # elements of a register
        register, part = divmod(i, per)
        return group + 8 * (register % 2), thread * per + part + 4 * per * (register // 2)

    def b(self, lane: int, i: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        if self.bits == 64:
            return thread + 4 * i, group
        per = 32 // self.bits
        register, part = divmod(i, per)
        return thread * per + part + 4 * per * register, group

    def c(self, lane: int, i: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        return group + 8 * (i // 2), 2 * thread + i % 2


class Product(NamedTuple):
    shape: Shape
    a: str
    b: str
    d: str
    saturate: bool = False
    target: str = "sm_90a"

    def __str__(self) -> str:
        m, k, _ = self.shape
        finite = ".satfinite" if self.saturate else ""
        return f"mma.sync.aligned.m{m}n8k{k}.row.col{finite}.{self.d}.{self.a}.{self.b}.{self.d}"

    def counts(self) -> tuple[int, int, int]:
        """Registers of A, B and of C or D."""
        m, k, bits = self.shape
        word = max(bits, 32)
        return (
            m * k * bits // word // 32,
            8 * k * bits // word // 32,
            m * 8 // 32 // (2 if self.d == "f16" else 1),
        )

    def ptx(self) -> str:
        na, nb, nd = self.counts()
        word, result = max(self.shape.bits, 32), 64 if self.d == "f64" else 32
        kind, names = ("f64" if word == 64 else "b32"), {}
        lines = []
        for name, count, size in (
            ("a", na, word),
            ("b", nb, word),
            ("c", nd, result),
            ("d", nd, result),
        ):
            names[name] = "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"
            lines += [f".reg .{kind if size == word else f'b{size}'} %{name}<{count}>;",
                      f"ld.param.u64 %p{name}, [{name}];",
                      f"mad.wide.u32 %p{name}, %i, {count * size // 8}, %p{name};"]  # fmt: skip
            if name != "d":
                lines += [
                    f"ld.global.b{size} %{name}{i}, [%p{name}+{i * size // 8}];"
                    for i in range(count)
                ]
        lines.append(f"{self} {names['d']}, {names['a']}, {names['b']}, {names['c']};")
        lines += [f"st.global.b{result} [%pd+{i * result // 8}], %d{i};" for i in range(nd)]
        body = "\n".join(lines)
        return (
            HEAD.format(target=self.target)
            + f"""
.visible .entry test(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d)
{{
.reg .b64 %pa, %pb, %pc, %pd; .reg .b32 %i, %w, %n;
mov.u32 %i, %tid.x; mov.u32 %w, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.u32 %i, %w, %n, %i;
{body}
ret;
}}
"""
        )


def products() -> list[Product]:
    rows = [Product(Shape(16, k, 16), t, t, "f32") for t in ("f16", "bf16") for k in (8, 16)]
    rows += [Product(Shape(16, k, 16), "f16", "f16", "f16") for k in (8, 16)]
    rows += [Product(Shape(16, k, 32), "tf32", "tf32", "f32") for k in (4, 8)]
    rows += [
        Product(Shape(16, 32, 8), a, b, "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")
    ]
    rows += [Product(Shape(16, 16, 8), a, a, "f32", target="sm_120a") for a in ("e4m3", "e5m2")]
    rows += [
        Product(Shape(16, k, 8), a, a, "f16", target="sm_120a")
        for a in ("e4m3", "e5m2")
        for k in (16, 32)
    ]
    rows += [
        Product(Shape(16, k, 8), a, b, "s32", saturate)
        for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8") for saturate in (False, True)
    ]  # fmt: skip
    return rows + [
        Product(Shape(m, k, 64), "f64", "f64", "f64")
        for m, k in ((8, 4), (16, 4), (16, 8), (16, 16))
    ]


def encoded(values: np.ndarray, name: str) -> np.ndarray:
    """As bit patterns of the type. The lower 13 bits of a tf32 are no part of it: here they are random."""
    if name in ("s8", "u8", "s32"):
        return values.astype(np.int64).astype(f"u{4 if name == 's32' else 1}")
    form = FORMATS[name]
    flat = [formats.encode(number(v), form) for v in values.ravel().tolist()]
    bits = np.array(flat, f"u{form.bits // 8}").reshape(values.shape)
    if name == "tf32":
        bits |= np.random.default_rng(1).integers(0, 1 << 13, values.shape, np.uint32)
    return bits


def number(value: float) -> formats.Number:
    if value == 0 or not np.isfinite(value):
        return float(value)
    numerator, denominator = float(value).as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def decoded(bits: np.ndarray, name: str) -> np.ndarray:
    if name == "s32":
        return bits.view(np.int32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[name]).astype(
        np.float64
    )


def to_fragments(matrices: np.ndarray, place: Place, registers: int, bits: int) -> np.ndarray:
    """[tiles, rows, columns] bit patterns to [tiles, lane, element]."""
    count = registers * max(bits, 32) // bits
    return np.array(
        [[[tile[place(lane, i)] for i in range(count)] for lane in range(32)] for tile in matrices],
        matrices.dtype,
    )


def multiply(row: Product, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a [tiles, m, k], b [tiles, k, 8], c [tiles, m, 8] as bit patterns; d likewise."""
    na, nb, nd = row.counts()
    s = row.shape
    result = {"f16": 16, "f64": 64}.get(row.d, 32)
    fa, fb = to_fragments(a, s.a, na, s.bits), to_fragments(b, s.b, nb, s.bits)
    fc = to_fragments(c, s.c, nd, result)
    fd = np.zeros_like(fc)
    ptxemu.load(row.ptx()).launch(grid=len(a), block=32, args=[fa, fb, fc, fd]).check()
    d = np.zeros_like(c)
    for tile in range(len(d)):
        for lane in range(32):
            for i in range(fd.shape[2]):
                place, column = s.c(lane, i)
                d[tile, place, column] = fd[tile, lane, i]
    return d


def draw(row: Product, low: int, high: int, result: int) -> list[np.ndarray]:
    """Random integers, within what the types hold."""
    generator = np.random.default_rng(11)
    m, k, _ = row.shape
    a, b = (generator.integers(0 if t == "u8" else low, high, (TILES, *size), endpoint=True)
            for t, size in ((row.a, (m, k)), (row.b, (k, 8))))  # fmt: skip
    return [a, b, generator.integers(-result, result, (TILES, m, 8), endpoint=True)]


PRODUCTS = products()
by_product = pytest.mark.parametrize("row", PRODUCTS, ids=str)


@by_product
def test_exact(row: Product) -> None:
    small = row.d == "f16"
    a, b, c = draw(row, -4, 4, 100) if row.d != "s32" else draw(row, -128, 127, 1 << 30)
    if "u8" in (row.a, row.b):
        a, b = ((v * 2 + 1 if t == "u8" else v) for v, t in ((a, row.a), (b, row.b)))  # up to 255
    if row.d != "s32" and not small:
        c = c * 64 + 0.5
    d = multiply(row, encoded(a, row.a), encoded(b, row.b), encoded(c, row.d))
    wanted = np.einsum("tmk,tkn->tmn", a.astype(np.float64), b.astype(np.float64)) + c
    assert np.array_equal(decoded(d, row.d), wanted)


@by_product
def test_all_sizes(row: Product) -> None:
    if row.d == "s32":  # sums that leave the range: they wrap around, or stop at its ends
        a, b, _ = draw(row, -128, 127, 0)
        c = np.random.default_rng(3).choice(
            [-(2**31), 2**31 - 1, 2**31 - 100, -(2**31) + 100], (TILES, 16, 8)
        )
        exact = np.einsum("tmk,tkn->tmn", a, b) + c
        wanted = (
            np.clip(exact, -(2**31), 2**31 - 1) if row.saturate else (exact + 2**31) % 2**32 - 2**31
        )
        d = multiply(row, encoded(a, row.a), encoded(b, row.b), encoded(c, row.d))
        assert np.array_equal(decoded(d, row.d), wanted)
        return
    generator = np.random.default_rng(5)
    m, k, _ = row.shape
    scale = 4 if row.d == "f16" else 64
    a, b, c = (encoded(generator.standard_normal((TILES, *size)) * scale, t)
               for t, size in ((row.a, (m, k)), (row.b, (k, 8)), (row.d, (m, 8))))  # fmt: skip
    d = decoded(multiply(row, a, b, c), row.d)
    x, y, z = (np.vectorize(lambda v, t=t: formats.value(formats.decode(int(v), FORMATS[t])))(bits)
               for bits, t in ((upper(a, row.a), row.a), (upper(b, row.b), row.b), (c, row.d)))  # fmt: skip
    sizes = np.einsum("tmk,tkn->tmn", abs(x), abs(y)) + abs(z)
    step = {"f16": 2**-11, "f32": 2**-23, "f64": 2**-53}[row.d]
    assert np.all(abs(d - (np.einsum("tmk,tkn->tmn", x, y) + z)) <= (k + 1) * step * sizes)
    assert np.any(d != np.round(d))


def upper(bits: np.ndarray, name: str) -> np.ndarray:
    """Without the bits that a tf32 does not have."""
    return bits & np.uint32(0xFFFFE000) if name == "tf32" else bits


@pytest.mark.parametrize("row", [p for p in PRODUCTS if p.d in ("f32", "f64")], ids=str)
def test_infinity_and_nan(row: Product) -> None:
    """Each stays in its own row and column."""
    m, k, _ = row.shape
    a, b, c = np.ones((1, m, k)), np.ones((1, k, 8)), np.zeros((1, m, 8))
    bad = np.nan
    a[0, 3, k - 1], b[0, 1, 5], c[0, 7, 0], c[0, 7, 1] = bad, bad, np.inf, -np.inf
    d = decoded(multiply(row, encoded(a, row.a), encoded(b, row.b), encoded(c, row.d)), row.d)[0]
    wanted = np.full((m, 8), float(k))
    wanted[7, 0], wanted[7, 1] = np.inf, -np.inf
    wanted[3, :], wanted[:, 5] = np.nan, np.nan
    assert np.array_equal(d, wanted, equal_nan=True)


carry(test_exact, lambda: [row.ptx() for row in PRODUCTS])
