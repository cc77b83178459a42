"""The accuracy rule itself: what it must let through and what it must catch."""

from __future__ import annotations

import numerics
import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A truth, and an eager result that is off by about an ulp here and there."""
    exact = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64) * torch.finfo(dtype).eps
    return exact, (exact * (1 + noise)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_lets_through_eager_and_the_rounded_truth(dtype: torch.dtype) -> None:
    exact, eager = example(dtype)
    numerics.check(eager, exact, eager, "o")
    numerics.check(exact.to(dtype), exact, eager, "o")
    numerics.check(exact.to(dtype), exact, exact.to(dtype), "o")


@pytest.mark.parametrize("dtype", DTYPES)
def test_catches_one_bad_element(dtype: torch.dtype) -> None:
    exact, eager = example(dtype)
    budget = (
        2 * (eager.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    )
    bad = eager.clone()
    bad[7] = exact[7] + 1.2 * budget
    with pytest.raises(AssertionError, match=r"o: largest error .* at element 7"):
        numerics.check(bad, exact, eager, "o")
    numerics.check(bad, exact, eager, "o", "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_catches_a_bias_below_the_largest_error(dtype: torch.dtype) -> None:
    exact, eager = example(dtype)
    biased = (eager.double() + 1.8 * (eager.double() - exact).abs().mean()).to(dtype)
    with pytest.raises(AssertionError, match="o: mean error"):
        numerics.check(biased, exact, eager, "o")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_catches_what_is_not_finite(bad: float) -> None:
    exact, eager = example(torch.float32)
    actual = eager.clone()
    actual[3] = bad
    with pytest.raises(AssertionError, match=r"first at \[3\]"):
        numerics.check(actual, exact, eager, "o")


def test_infinities_must_be_those_of_the_truth() -> None:
    exact, eager = example(torch.float32)
    exact[5], eager[5] = float("-inf"), float("-inf")
    numerics.check(eager, exact, eager, "lse")
    for wrong in (float("inf"), float("nan"), 0.0):
        actual = eager.clone()
        actual[5] = wrong
        with pytest.raises(AssertionError, match="truth of inf or NaN"):
            numerics.check(actual, exact, eager, "lse")


def test_catches_shape_and_dtype() -> None:
    exact, eager = example(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        numerics.check(eager[:999], exact, eager, "o")
    with pytest.raises(AssertionError, match="dtype"):
        numerics.check(eager.half(), exact, eager, "o")


def test_bitwise_equality_sees_zero_signs_and_equal_nan() -> None:
    x = torch.tensor([0.0, float("nan")])
    numerics.assert_bitwise_equal(x.clone(), x, "x")
    with pytest.raises(AssertionError, match="1 of 2"):
        numerics.assert_bitwise_equal(torch.tensor([-0.0, float("nan")]), x, "x")


@pytest.mark.parametrize("make", [torch.empty, torch.Tensor.new_empty], ids=["empty", "new_empty"])
def test_fresh_memory_is_poisoned(make: object) -> None:
    shape = (3, 4)
    x = torch.empty(shape) if make is torch.empty else torch.zeros(1).new_empty(shape)
    assert x.isnan().all() and torch.empty_like(x).isnan().all()
