"""wgmma: what it computes, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ptxemu import PtxError, sm90
from ptxemu.gmma import BYTES, Layout, accumulators, draw, offsets, swizzled
from ptxemu.gmma_kernel import multiply, registers


def k_major(swizzle: int, start: int, gap: int = 0) -> Layout:
    """Eight rows of `swizzle` bytes, `gap` bytes, the next eight rows; lbo is not looked at."""
    return Layout("K", swizzle, start, 16 * 777, 8 * swizzle + gap)


A_AT, B_AT = 0, 16 * 1024
K128 = k_major(128, A_AT), k_major(128, B_AT)
FLOATS = [
    *(f"f32.{k}.{k}" for k in ("bf16", "f16", "tf32")), "f16.f16.f16",
    *(f"{d}.{a}.{b}" for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
]  # fmt: skip
INTEGERS = [f"s32.{a}.{b}" for a in ("s8", "u8") for b in ("s8", "u8")]


@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize("kinds", FLOATS + INTEGERS)
def test_types(kinds: str, from_registers: bool) -> None:
    """Two products, one after the other, on accumulators that were not zero."""
    rng = np.random.default_rng(1)
    d, a_kind, b_kind = kinds.split(".")
    k = 64 // BYTES[a_kind]
    a, b = draw(a_kind, (64, k), rng, d == "f16"), draw(b_kind, (24, k), rng, d == "f16")
    before = rng.integers(-100, 100, (64, 24)).astype(np.float64)
    actual = multiply(kinds, a, b, None if from_registers else K128[0], K128[1], before=before)
    assert np.array_equal(actual, accumulators(before + a @ b.T, d))


@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("kinds", ["f32.bf16.bf16", "f16.f16.f16", "s32.s8.u8"])
def test_sizes(kinds: str, n: int) -> None:
    rng = np.random.default_rng(n)
    d, a_kind, b_kind = kinds.split(".")
    k = 32 // BYTES[a_kind]
    a, b = draw(a_kind, (64, k), rng, True), draw(b_kind, (n, k), rng, True)
    assert np.array_equal(multiply(kinds, a, b, *K128), accumulators(a @ b.T, d))


def test_integers_wrap_or_saturate() -> None:
    a, b = np.full((64, 32), 127.0), np.full((8, 32), 127.0)
    before = np.full((64, 8), 2.0**31 - 1)
    before[:32], b[4:] = -(2.0**31), -128.0
    exact = before + a @ b.T
    assert np.array_equal(
        multiply("s32.s8.s8", a, b, *K128, before=before), accumulators(exact, "s32")
    )
    limited = np.clip(exact, -(2.0**31), 2.0**31 - 1)
    actual = multiply("satfinite.s32.s8.s8", a, b, *K128, before=before)
    assert np.array_equal(actual, accumulators(limited, "s32"))
    assert not np.array_equal(exact, limited)


# ---- layouts. The gaps make every stride different from what the other ones would give.

LAYOUTS = [
    (Layout("K", 0, 0, 144, 144 * 9), 64),
    (Layout("K", 0, 16, 64 * 64, 128), 64),
    (Layout("MN", 0, 0, 128 * 17, 128), 64),
    (Layout("MN", 0, 128, 256, 2304), 64),
    (k_major(32, 0, 256), 16),
    (k_major(64, 0, 1024), 32),
    (k_major(128, 0), 64),
    (k_major(128, 0, 1024), 64),
    (Layout("MN", 32, 0, 512, 4352), 64),
    (Layout("MN", 64, 0, 1024, 4608), 64),
    (Layout("MN", 64, 0, 4096, 512), 64),
    (Layout("MN", 128, 0, 8192, 1024), 64),
]  # fmt: skip


def moved(layout: Layout, start: int) -> Layout:
    return Layout(layout.major, layout.swizzle, layout.start + start, layout.lbo, layout.sbo)


@pytest.mark.parametrize(("layout", "k"), LAYOUTS, ids=str)
def test_layouts_of_a(layout: Layout, k: int) -> None:
    """As many products along k as the layout is wide: inside a swizzle's pattern the address goes on by their bytes."""
    rng = np.random.default_rng(k)
    a, b = draw("bf16", (64, k), rng), draw("bf16", (16, k), rng)
    actual = multiply("f32.bf16.bf16", a, b, layout, k_major(128, 48 * 1024))
    assert np.array_equal(actual, accumulators(a @ b.T, "f32"))


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize(("layout", "k"), LAYOUTS, ids=str)
def test_layouts_of_b(layout: Layout, k: int, n: int) -> None:
    rng = np.random.default_rng(k)
    a, b = draw("f16", (64, k), rng), draw("f16", (n, k), rng)
    layout = moved(layout, 16 * 1024)
    actual = multiply("f32.f16.f16", a, b, k_major(128, 0), layout)
    assert np.array_equal(actual, accumulators(a @ b.T, "f32"))
    actual = multiply("f32.f16.f16", a, b, None, layout)
    assert np.array_equal(actual, accumulators(a @ b.T, "f32"))


@pytest.mark.parametrize("kind", ["tf32", "e4m3", "s8"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_layouts_of_other_sizes(kind: str, swizzle: int) -> None:
    rng = np.random.default_rng(swizzle)
    k = max(swizzle, 64) // BYTES[kind] if swizzle != 32 else 32 // BYTES[kind]
    a, b = draw(kind, (64, k), rng), draw(kind, (32, k), rng)
    layout = k_major(swizzle, 0, 1024) if swizzle else Layout("K", 0, 0, 128 * 9, 128)
    d = "s32" if kind == "s8" else "f32"
    actual = multiply(f"{d}.{kind}.{kind}", a, b, layout, moved(layout, 32 * 1024))
    assert np.array_equal(actual, accumulators(a @ b.T, d))


def test_known_layouts() -> None:
    """The examples of the PTX ISA, "Strides", and its table of swizzle patterns."""
    tf32 = Layout("K", 0, 0, 64 * 4, 32 * 4).plain(16, 16, 4) // 4
    assert np.array_equal(
        tf32,
        offsets((8, 2), (4, 32), np.arange(16))[:, None] + offsets((4, 4), (1, 64), np.arange(16)),
    )
    bf16 = Layout("MN", 64, 0, 256 * 2, 512 * 2).plain(64, 16, 2) // 2
    rows = offsets((8, 4, 2), (1, 8, 256), np.arange(64))
    assert np.array_equal(bf16, rows[:, None] + offsets((8, 2), (32, 512), np.arange(16)))
    chunks = swizzled(np.arange(0, 1024, 16), 128).reshape(8, 8) // 16 % 8
    assert chunks.tolist() == [[i ^ row for i in range(8)] for row in range(8)]
    assert swizzled(np.arange(0, 256, 16), 32).tolist() == [
        *range(0, 128, 16),
        *(i ^ 16 for i in range(128, 256, 16)),
    ]


# ---- scale-d, signs


@pytest.mark.parametrize("scale", ["0", "1", "p1", "p2", "!p1", "!p2"])
def test_scale_d(scale: str) -> None:
    """p1 is false, p2 is true."""
    rng = np.random.default_rng(3)
    a, b, before = (
        draw("bf16", (64, 16), rng),
        draw("bf16", (8, 16), rng),
        draw("bf16", (64, 8), rng),
    )
    actual = multiply("f32.bf16.bf16", a, b, *K128, before=before, scale_d=scale)
    keeps = scale in ("1", "p2", "!p1")
    assert np.array_equal(actual, accumulators(keeps * before + a @ b.T, "f32"))


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("kinds", ["f32.f16.f16", "f16.e5m2.e5m2", "f32.tf32.tf32"])
def test_signs(kinds: str, signs: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    d, kind, _ = kinds.split(".")
    k = 32 // BYTES[kind]
    a, b = draw(kind, (64, k), rng, True), draw(kind, (8, k), rng, True)
    before = rng.integers(-5, 5, (64, 8)).astype(np.float64)
    exact = before + signs[0] * signs[1] * a @ b.T
    for layout in (K128[0], None):
        actual = multiply(kinds, a, b, layout, K128[1], before=before, signs=signs)
        assert np.array_equal(actual, accumulators(exact, d))


# ---- what PTX does not have

D8, D16 = registers(8), registers(4)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (
            f"m64n16k16.f16.bf16.bf16 {D16}, d0, d0, 1, 1, 1, 0, 0",
            "a result of .f16 is not supported",
        ),
        (f"m64n16k8.f16.tf32.tf32 {D16}, d0, d0, 1, 1, 1", "a result of .f16 is not supported"),
        (f"m64n16k16.f32.bf16.f16 {D8}, d0, d0, 1, 1, 1, 0, 0", "do not go together"),
        (f"m64n16k32.f32.e4m3.s8 {D8}, d0, d0, 1, 1, 1", "do not go together"),
        (f"m64n16k32.s32.s8.e4m3 {D8}, d0, d0, 1", "do not go together"),
        (f"m64n16k32.f32.s8.s8 {D8}, d0, d0, 1", "a result of .f32 is not supported"),
        (
            f"m64n16k16.satfinite.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 0, 0",
            "only integers have .satfinite",
        ),
        (
            f"m64n16k32.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 0, 0",
            "this shape is not of these types",
        ),
        (
            f"m64n16k4.f32.f64.f64 {D8}, d0, d0, 1, 1, 1",
            "this shape is not of these types",
        ),
        (
            f"m64n12k16.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 0, 0",
            "shape .m64n12k16 is not supported",
        ),
        (
            f"m64n264k16.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 0, 0",
            "shape .m64n264k16 is not supported",
        ),
        (f"m64n40k32.s32.s8.s8 {registers(20)}, d0, d0, 1", "integers have no shape with this n"),
        (f"m64n16k16.f32.bf16.bf16 {D16}, d0, d0, 1, 1, 1, 0, 0", "has 4 accumulators, needs 8"),
        (f"m64n16k16.f32.bf16.bf16 {D8}, {{r0, r1}}, d0, 1, 1, 1, 0", "A has 4 registers"),
        (f"m64n16k16.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 0", "has 7 operands"),
        (f"m64n16k32.f32.e4m3.e4m3 {D8}, d0, d0, 1, 1, 1, 0, 1", "has 8 operands"),
        (f"m64n16k16.f32.bf16.bf16 {D8}, d0, d0, 1, 0, 1, 0, 0", "operand 4 is 0, needs -1 or 1"),
        (f"m64n16k16.f32.bf16.bf16 {D8}, d0, d0, 1, 1, 1, 2, 0", "operand 6 is 2, needs 0 or 1"),
    ],
)
def test_refused(instruction: str, message: str) -> None:
    with pytest.raises(PtxError, match=f"line [0-9]+: wgmma.mma_async.*{message}"):
        sm90.run(f"wgmma.mma_async.sync.aligned.{instruction};", accumulators=20)
