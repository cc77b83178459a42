"""Linear layers in inference: the three ways compute the same, and stale copies of a weight are never used."""

from __future__ import annotations

import copy
from typing import Any

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import Target
from torch import Tensor

from pyfuse import linear
from pyfuse.activations import FORMULA
from pyfuse.backends.cpu_linear import PackedWeight, RowsWeight
from pyfuse.linear import ROWS, Choice, PackedLinear, calibrate, plan

# Only the CPU has these.
pytestmark = pytest.mark.emulated(sm_80=0, sm_90=0, sm_89=0, sm_120=0)

WAYS = ("torch", "rows", "packed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1), (3, 63), (65, 111), (197, 33), (64, 576)]  # N, K


def only(way: str) -> Choice:
    return Choice((way,) * len(ROWS), {})


def formula(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str | None,
    m: Tensor | None,
    r: Tensor | None,
) -> Tensor:
    y = F.linear(x, w, b)
    if activation is not None:
        y = FORMULA[activation](y)
    y = y if m is None else y * m
    return y if r is None else y + r


def checked(actual: Tensor, arguments: tuple[Any, ...], name: str) -> None:
    exact = formula(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    numerics.check(actual, exact, formula(*arguments), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 65])
@pytest.mark.parametrize("n,k", SIZES)
@pytest.mark.parametrize("kernel", [RowsWeight, PackedWeight])
def test_kernels(
    target: Target, kernel: type[RowsWeight], n: int, k: int, rows: int, dtype: torch.dtype
) -> None:
    if target.backend != "cpu":
        pytest.skip("the kernels are the CPU's")
    w, b = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    # Small results are drawn often enough for their mean error to mean something.
    draws = max(1, 1000 // (rows * n))
    x, m, r = (torch.randn(draws, rows, size).to(dtype) for size in (k, n, n))
    plain, biased = kernel(w, None), kernel(w, b)
    y = torch.stack([plain(x[i]) for i in range(draws)])
    checked(y, (x, w, None, None, None, None), "plain")
    for activation in (None, *FORMULA):
        y = torch.stack([biased(x[i], activation, m[i], r[i]) for i in range(draws)])
        checked(y, (x, w, b, activation, m, r), str(activation))


def test_many_rows_span_several_blocks(target: Target) -> None:
    """More rows and outputs than one task takes, with a ragged end of both."""
    if target.backend != "cpu":
        pytest.skip("the kernels are the CPU's")
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(1013, 257).to(dtype), torch.randn(331, 257).to(dtype)
        checked(PackedWeight(w, None)(x), (x, w, None, None, None, None), str(dtype))


@pytest.mark.parametrize("activation", FORMULA)
def test_activations_over_their_whole_range(target: Target, activation: str) -> None:
    """x·1 + 0: the activation alone, at small, large, infinite and undefined arguments."""
    if target.backend != "cpu":
        pytest.skip("the rows kernel is the CPU's")
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1e-3, 1e-3, 2001)])[:, None]
    one = torch.ones(1, 1)
    y, exact = (
        RowsWeight(one, None)(x, activation),
        formula(x.double(), one.double(), None, activation, None, None),
    )
    # By parts: an error at small arguments must not hide behind the values of large ones.
    for low, high in ((0.0, 1e-2), (1e-2, 1.0), (1.0, 8.0), (8.0, 101.0)):
        part = ((x.abs() >= low) & (x.abs() < high)).squeeze()
        eager = formula(x[part], one, None, activation, None, None)
        numerics.check(y[part], exact[part], eager, f"{activation} of {low} to {high}")
    special = torch.tensor([[float("inf")], [float("nan")]])
    y = RowsWeight(one, None)(special, activation)
    assert y[0].isinf().all() and y[1].isnan().all()


def test_the_vector_exponential_keeps_its_digits(target: Target) -> None:
    """silu(x) = x / (1 + e^-x) has the relative error of e^-x where that is large: a few ulp at most."""
    if target.backend != "cpu":
        pytest.skip("the kernels are the CPU's")
    x = torch.linspace(-80, 10, 20001)[:, None]
    y = RowsWeight(torch.ones(1, 1), None)(x, "silu")
    exact = torch.nn.functional.silu(x.double())
    error = ((y.double() - exact) / exact).abs().nan_to_num(0.0)  # 0/0 at x = 0
    ulps = error.max().item() / torch.finfo(torch.float32).eps
    assert ulps < 4, f"{ulps:.1f} ulp at {x[error.argmax()].item()}"


def test_threads_and_runs_agree_bit_by_bit() -> None:
    x, w = torch.randn(67, 333), torch.randn(777, 333)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            results.append((RowsWeight(w, None)(x), PackedWeight(w, None)(x)))
    finally:
        torch.set_num_threads(before)
    for few, many in results[1:]:
        numerics.assert_bitwise_equal(few, results[0][0], "rows")
        numerics.assert_bitwise_equal(many, results[0][1], "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_way_with_every_ending(way: str, dtype: torch.dtype, transposed: bool) -> None:
    w, b = torch.randn(65, 111).to(dtype), torch.randn(65).to(dtype)
    layer = PackedLinear(
        w.t().contiguous() if transposed else w, b, only(way), transposed=transposed
    )
    for shape in [(1, 1), (2, 3), (40, 1)]:
        x = torch.randn(*shape, 111).to(dtype)
        for m in (None, torch.randn(*shape, 65).to(dtype)):
            for r in (None, torch.randn(*shape, 65).to(dtype)):
                kept = [None if t is None else t.clone() for t in (x, m, r)]
                for activation in (None, *FORMULA):
                    y = layer(x, activation=activation, multiply=m, residual=r)
                    checked(y, (x, w, b, activation, m, r), f"{way} {activation}")
                for t, before in zip((x, m, r), kept, strict=True):
                    assert t is None or torch.equal(t, before), "an argument was written to"


@pytest.mark.parametrize("way", WAYS)
def test_strided_and_empty_inputs(way: str) -> None:
    w = torch.randn(65, 111)
    layer = PackedLinear(w, None, only(way))
    wide = torch.randn(4, 222)
    for x in (wide[:, 111:], wide[::2, :111], wide[:, ::2], torch.randn(111, 4).t()):
        checked(layer(x), (x, w, None, None, None, None), "strided")
    assert layer(torch.randn(2, 0, 111)).shape == (2, 0, 65)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_written_weight_is_seen(way: str, transposed: bool) -> None:
    w = torch.nn.Parameter(torch.randn(111, 65) if transposed else torch.randn(65, 111))
    layer = PackedLinear(w, None, only(way), transposed=transposed)
    x = torch.randn(3, 111)
    assert layer.is_current()
    with torch.no_grad():
        layer(x)
        w.mul_(2.0)
        assert not layer.is_current()
        exact = F.linear(x, w.t() if transposed else w)
        torch.testing.assert_close(layer(x), exact)
        assert layer.is_current()


@pytest.mark.parametrize("way", WAYS)
def test_a_strided_bias_is_seen_when_written(way: str) -> None:
    w, bias = torch.randn(65, 111), torch.randn(65, 2)[:, 0]
    layer = PackedLinear(w, bias, only(way))
    x = torch.randn(3, 111)
    checked(layer(x), (x, w, bias, None, None, None), "strided bias")
    bias.mul_(3.0)
    checked(layer(x), (x, w, bias, None, None, None), "written bias")


def test_copies_are_counted() -> None:
    w = torch.randn(64, 128)
    size = w.numel() * 4
    assert PackedLinear(w, None, only("rows")).memory_bytes == 0
    assert PackedLinear(w, None, only("torch")).memory_bytes == 0
    assert PackedLinear(w, None, only("packed")).memory_bytes == size
    assert (
        PackedLinear(w.t().contiguous(), None, only("rows"), transposed=True).memory_bytes == size
    )


def test_a_copied_layer_stands_alone() -> None:
    w = torch.nn.Parameter(torch.randn(65, 111))
    layer = PackedLinear(w, None, only("rows"))
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 111)
    before = twin(x)
    with torch.no_grad():
        w.zero_()
    assert torch.equal(twin(x), before) and not layer(x).any()


def test_choice_takes_the_next_larger_measurement() -> None:
    choice = Choice(("rows", "rows", "rows", "torch", "torch", "packed", "packed"), {})
    expected = {
        1: "rows",
        4: "rows",
        5: "torch",
        8: "torch",
        16: "torch",
        17: "packed",
        99999: "packed",
    }
    assert {rows: choice.way(rows) for rows in expected} == expected
    assert choice.description == "rows up to 4, then torch up to 16, then packed"


def test_calibration_measures_and_is_kept() -> None:
    choice = calibrate(48, 40, torch.float32, 1)
    assert set(choice.milliseconds) == set(ROWS) and len(choice.ways) == len(ROWS)
    assert all(t > 0 for best in choice.milliseconds.values() for t in best.values())
    assert calibrate(48, 40, torch.float32, 1) is choice
    for rows, best in choice.milliseconds.items():
        way = choice.way(rows)
        assert way == "torch" or best[way] < best["torch"]


def test_plan_leaves_alone_what_it_cannot_run() -> None:
    assert plan(torch.ones(4, 4, dtype=torch.int8)) is None
    assert plan(torch.ones(0, 4)) is None
    assert plan(torch.ones(4, 4, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(
    "ways", ["rows rows rows", "rows packed torch", "rows rows rows rows rows"]
)
def test_layers_of_one_input_together(ways: str, rows: int, dtype: torch.dtype) -> None:
    """Bit by bit what each gives alone, in one call or not; also a weight that was written to."""
    sizes = (65, 1, 197, 16, 17)
    layers = [
        PackedLinear(torch.randn(n, 111).to(dtype), torch.randn(n).to(dtype), only(way))
        for n, way in zip(sizes, ways.split(), strict=False)
    ]
    layers[0].weight.mul_(2.0)
    x = torch.randn(2, 111, rows).to(dtype).transpose(1, 2)
    activations = (None, "silu", "gelu", None, "relu")[: len(layers)]
    results = linear.together(x, layers, activations)
    for layer, activation, y in zip(layers, activations, results, strict=True):
        numerics.assert_bitwise_equal(y, layer(x, activation=activation), str(activation))


def test_calibration_leaves_the_programs_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    calibrate(33, 47, torch.float32, 1)
    assert torch.equal(torch.randn(3), expected)


def test_planning_for_an_activation_calibrates_with_it() -> None:
    w = torch.randn(65, 111)
    layer = plan(w, activation="gelu")
    choice = calibrate(65, 111, torch.float32, torch.get_num_threads(), "gelu")
    assert layer is None if set(choice.ways) == {"torch"} else layer.choice is choice
    assert choice is not calibrate(65, 111, torch.float32, torch.get_num_threads())


@pytest.mark.parametrize("way", WAYS)
def test_wrong_inputs_are_refused(way: str) -> None:
    layer = PackedLinear(torch.randn(4, 6), None, only(way))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(2, 5))
    with pytest.raises((TypeError, RuntimeError)):  # read as float32, these bits would be garbage
        layer(torch.randn(2, 6).bfloat16())
    for kernel in (RowsWeight, PackedWeight):
        for bias in (torch.randn(5), torch.randn(4).double()):
            with pytest.raises(ValueError, match="bias: got shape"):
                kernel(torch.randn(4, 6), bias)
    with pytest.raises(ValueError, match="weight: got strides"):
        RowsWeight(torch.randn(4, 6).t(), None)


def test_unknown_activation_names_the_known_ones() -> None:
    layer = PackedLinear(torch.randn(4, 4), None, only("torch"))
    with pytest.raises(ValueError, match=r"activation: got 'swish', needs one of .*silu"):
        layer(torch.randn(1, 4), activation="swish")
