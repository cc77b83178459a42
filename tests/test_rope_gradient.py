"""The rotary embedding's gradient kernels against autograd of the eager formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import laid_out
from conftest import Target, at_threads
from numerics import assert_bitwise_equal, check
from rope_cases import DTYPES, HEADS, LONG, ROTATIONS, TABLES, angles
from torch import Tensor

import pyfuse
from pyfuse import dispatch

pytestmark = pytest.mark.emulated(sm_80=8, sm_90=64, sm_89=64, sm_120=64)


def kernel_gradient(
    target: Target, dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, **o: Any
) -> Tensor:
    gradient = dispatch.load(target.backend).OPS["rope"].gradient
    options = {"positions": None, "inplace": False} | o
    needs = frozenset({"x"})
    assert gradient.why_not(needs, x, cos, sin, **options) is None
    y, saved = gradient.forward(x, cos, sin, **options)
    assert_bitwise_equal(y, pyfuse.rope(x, cos, sin, **o, backend=target.backend), "forward")
    given = gradient.backward((dy,), (x, cos, sin), options, saved, needs)
    assert set(given) == needs
    return given["x"]


def eager_gradient(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, **o: Any) -> Tensor:
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(pyfuse.rope(x, cos, sin, backend="eager", **o), x, dy)
    return dx


def check_gradient(
    target: Target, dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, name: str, **o: Any
) -> Tensor:
    actual = kernel_gradient(target, dy, x, cos, sin, **o)
    eager = eager_gradient(dy, x, cos, sin, **o)
    exact = eager_gradient(*(t.double() for t in (dy, x, cos, sin)), **o)
    check(actual, exact, eager, name, "gradient")
    return actual


@pytest.mark.parametrize("own_table", [True, False], ids=["own", "f32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ROTATIONS)
def test_gradient(layout: str, dtype: torch.dtype, own_table: bool, target: Target) -> None:
    for d, r in [*HEADS, LONG]:
        x = laid_out(torch.randn(2, 3, 5, d).to(dtype), "BMHD")
        dy = torch.randn(2, 3, 5, d).to(dtype)
        cos, sin = angles(2, 5, r // 2, dtype=dtype if own_table else torch.float32)
        dx = check_gradient(target, dy, x, cos, sin, f"{r} of {d}", layout=layout)
        assert torch.equal(dx[..., r:], dy[..., r:])


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "sum": lambda: torch.ones(()).expand(2, 3, 5, 16),
    "one_head": lambda: torch.randn(2, 1, 5, 16).expand(2, 3, 5, 16),
    "columns": lambda: torch.randn(2, 3, 16, 5).transpose(2, 3),
    "every_second": lambda: torch.randn(2, 3, 5, 32)[..., ::2],
    "BMHD": lambda: laid_out(torch.randn(2, 3, 5, 16), "BMHD"),
    "slice": lambda: laid_out(torch.randn(2, 3, 5, 16), "slice"),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("memory", GRADIENTS)
@pytest.mark.parametrize("layout", ROTATIONS)
def test_gradient_in_any_memory(layout: str, memory: str, table: str, target: Target) -> None:
    cos, sin, positions = TABLES[table]()
    x, dy = laid_out(torch.randn(2, 3, 5, 16), "slice"), GRADIENTS[memory]()
    dx = check_gradient(target, dy, x, cos, sin, memory, layout=layout, positions=positions)
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0)])
def test_gradient_of_nothing(shape: tuple[int, ...], target: Target) -> None:
    x = torch.zeros(shape)
    cos, sin = angles(shape[0], shape[2], shape[3] // 2)
    assert kernel_gradient(target, x, x, cos, sin, layout="half").shape == shape


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("layout", ROTATIONS)
def test_gradient_turns_back(layout: str, dtype: torch.dtype, target: Target) -> None:
    """A rotation keeps lengths, so that its gradient is its inverse."""
    x = torch.randn(1, 2, 197, 64, dtype=dtype)
    cos, sin = angles(197, 32, dtype=dtype)
    results = []
    for threads in at_threads(1, 2, 4):
        y = pyfuse.rope(x, cos, sin, layout=layout, backend=target.backend)
        back = kernel_gradient(target, y, x, cos, sin, layout=layout)
        torch.testing.assert_close(back, x, msg=f"{threads} threads")
        results.append(back)
    for back in results[1:]:
        assert_bitwise_equal(back, results[0], "threads")


def test_gradient_says_what_it_has_not(target: Target) -> None:
    gradient = dispatch.load(target.backend).OPS["rope"].gradient
    x, (cos, sin) = torch.zeros(1, 1, 5, 8), angles(5, 4)
    reason = gradient.why_not(frozenset({"x", "sin"}), x, cos, sin, layout="half")
    assert reason == "the kernel has no gradient of cos and sin"
    reason = gradient.why_not(frozenset({"x"}), x, cos, sin, layout="half", inplace=True)
    assert reason == "inplace overwrites x"
