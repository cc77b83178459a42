"""How tensor cores add in float32 (src/ops/tensor_core.h): bit for bit what an H100 gave, and where Ampere differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptxemu

from .test_opcodes_mma import Product, Shape, multiply

# Operands as the registers of each lane hold them, random numbers of nine binades; "d": what the NVIDIA H100 80GB HBM3
# made of them (driver 580.159).
H100 = Path(__file__).with_name("h100_products.npz")
SHAPES = {"tf32": Shape(16, 8, 32), "bf16": Shape(16, 16, 16), "f16": Shape(16, 16, 16)}


@pytest.mark.parametrize("name", SHAPES)
def test_products_are_an_h100s(name: str) -> None:
    with np.load(H100) as recorded:
        a, b, c, d = (recorded[f"{name}_{part}"] for part in "abcd")
    result = np.zeros_like(d)
    program = Product(SHAPES[name], name, name, "f32").ptx()
    ptxemu.load(program).launch(grid=len(a), block=32, args=[a, b, c, result]).check()
    assert np.array_equal(result, d)


# Of 1 + k products that are each 2^-bits: what is left of the fraction.
CASES = [
    ("sm_80", "f16", 24, 16 * 2.0**-24),
    ("sm_80", "f16", 25, 0.0),  # below the one extra bit: each is cut off before they are added
    ("sm_90a", "f16", 25, 16 * 2.0**-25),
    ("sm_90a", "f16", 26, 0.0),
    ("sm_80", "tf32", 24, 8 * 2.0**-24),
    ("sm_80", "tf32", 25, 0.0),
    ("sm_90a", "tf32", 25, 8 * 2.0**-25),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target, name, bits, left", CASES)
def test_terms_are_cut_off(target: str, name: str, bits: int, left: float, sign: int) -> None:
    shape = SHAPES[name]
    row = Product(shape, name, name, "f32", target=target)
    dtype, code = (np.float16, np.uint16) if name == "f16" else (np.float32, np.uint32)
    half = bits // 2
    a = np.full((1, 16, shape.k), sign * 2.0**-half, dtype).view(code)
    b = np.full((1, shape.k, 8), 2.0 ** (half - bits), dtype).view(code)
    c = np.full((1, 16, 8), sign, np.float32).view(np.uint32)
    d = multiply(row, a, b, c).view(np.float32)
    assert np.all(d == sign * np.float32(1 + left))


def test_a_sum_is_cut_off_and_not_rounded() -> None:
    """1 + 3 · 2^-24, of which float32 has 1 + 2^-23: the nearest would be 1 + 2^-22."""
    row = Product(SHAPES["f16"], "f16", "f16", "f32")
    a = np.zeros((1, 16, 16), np.float16)
    a[..., :3] = 2.0**-12
    b = np.full((1, 16, 8), 2.0**-12, np.float16)
    c = np.full((1, 16, 8), 1.0, np.float32).view(np.uint32)
    d = multiply(row, a.view(np.uint16), b.view(np.uint16), c).view(np.float32)
    assert np.all(d == np.float32(1 + 2.0**-23))


@pytest.mark.parametrize("partner", [1.0, 2.0**-14, 2.0**-24, 0.0], ids=str)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite(value: float, partner: float) -> None:
    """It stays so times a partner however small; and times zero it is NaN."""
    row = Product(SHAPES["f16"], "f16", "f16", "f32")
    a, b = np.ones((1, 16, 16), np.float16), np.ones((1, 16, 8), np.float16)
    a[0, 3, 5], b[0, 5] = value, partner
    c = np.zeros((1, 16, 8), np.float32).view(np.uint32)
    d = multiply(row, a.view(np.uint16), b.view(np.uint16), c).view(np.float32)[0]
    expected = value if partner else np.nan
    assert np.array_equal(d[3], np.full(8, expected, np.float32), equal_nan=True)
    assert np.allclose(np.delete(d, 3, 0), 15 + partner, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_accumulator_that_is_not_finite(value: float) -> None:
    row = Product(SHAPES["tf32"], "tf32", "tf32", "f32")
    a, b = np.full((1, 16, 8), 2.0**-60, np.float32), np.full((1, 8, 8), 2.0**-60, np.float32)
    c = np.zeros((1, 16, 8), np.float32)
    c[0, 3] = value
    d = multiply(row, *(x.view(np.uint32) for x in (a, b, c))).view(np.float32)[0]
    assert np.array_equal(d[3], np.full(8, value, np.float32), equal_nan=True)
    assert np.all(np.delete(d, 3, 0) == 2.0**-117)
