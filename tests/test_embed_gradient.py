"""The embedding's gradient kernels against autograd of the eager formula; sparse gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import Target
from embed_cases import (
    CASES,
    DTYPES,
    SIZES,
    V,
    check_gradients,
    double,
    eager_gradients,
    kernel_gradients,
    options,
)
from numerics import assert_bitwise_equal, check
from torch import Tensor

import pyfuse

pytestmark = pytest.mark.emulated(sm_80=5, sm_90=40, sm_89=48, sm_120=48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradient(case: str, dtype: torch.dtype, target: Target) -> None:
    shape = (3, 7)
    # Where three columns happen to be nearly equal, a norm blows every rounding error up, the truth's
    # too: float64 has no wider one.
    smallest = (63 if dtype == torch.float64 else 3) if "norm" in CASES[case] else 1
    for d in SIZES[SIZES.index(smallest) :]:
        calls = []
        for _ in range(5 if d < 10 else 1):
            weight, token_ids = torch.randn(V, d).to(dtype), torch.randint(0, V, shape)
            given = options(d, shape, dtype=dtype, **CASES[case])
            calls.append((torch.randn(*shape, d).to(dtype), token_ids, weight, given))
        check_gradients(target, calls, f"D = {d}")


@pytest.mark.emulated(sm_80=1)
def test_rows_that_occur_often(target: Target) -> None:
    """Padding takes most of a batch, and segments are two: such rows are shared out by columns."""
    emulated = target.backend != "cpu"
    for d in (5, 197) if emulated else (5, 197, 300):
        shape = (11, 33) if emulated else (40, 65)
        token_ids = torch.where(torch.rand(shape) < 0.6, 7, torch.randint(0, V, shape))
        weight, dy = torch.randn(V, d), torch.randn(*shape, d)
        for chosen in ({}, {**CASES["bert"], "position": "each"}):
            given = options(d, shape, dtype=torch.float32, **chosen)
            check_gradients(target, [(dy, token_ids, weight, given)], f"D = {d}")


@pytest.mark.parametrize("needs", [{"weight"}, {"norm_bias"}, {"norm_weight", "segment_weight"}])
def test_gradients_of_what_is_needed(needs: set[str], target: Target) -> None:
    token_ids, weight, dy = torch.randint(0, V, (2, 9)), torch.randn(V, 33), torch.randn(2, 9, 33)
    given = options(33, (2, 9), dtype=torch.float32, **CASES["bert"])
    everything = kernel_gradients(target, dy, token_ids, weight, given)
    some = kernel_gradients(target, dy, token_ids, weight, given, frozenset(needs))
    for name, dx in some.items():
        assert_bitwise_equal(dx, everything[name], name)


# ---- sparse gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["token", "scaled", "bert"])
def test_sparse_gradient(case: str, dtype: torch.dtype, target: Target) -> None:
    token_ids, weight = torch.randint(0, V, (3, 7)), torch.randn(V, 33).to(dtype)
    dy = torch.randn(3, 7, 33).to(dtype)
    given = options(33, (3, 7), dtype=dtype, **CASES[case], sparse=True)
    actual = kernel_gradients(target, dy, token_ids, weight, given)["weight"]
    eager = eager_gradients(dy, token_ids, weight, given)["weight"]
    assert actual.is_sparse and not actual.is_coalesced() and actual.dtype == dtype
    assert torch.equal(actual._indices(), eager._indices())
    wide = {key: double(x) for key, x in given.items()}
    exact = eager_gradients(dy.double(), token_ids, weight.double(), wide)["weight"]
    check(actual._values(), exact._values(), eager._values(), "values", "gradient")


@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_gradient_reaches_the_optimizer(compiled: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(V, 4))
    before, token_ids = weight.detach().clone(), torch.tensor([3, 9, 3])

    def call(weight: Tensor) -> Tensor:
        return pyfuse.embed(token_ids, weight, sparse=True)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    function(weight).sum().backward()
    assert weight.grad is not None and weight.grad.is_sparse
    torch.optim.SGD([weight], lr=1.0).step()
    moved = torch.zeros(V, 4).index_add(0, token_ids, torch.ones(3, 4))
    torch.testing.assert_close(weight.detach(), before - moved)
