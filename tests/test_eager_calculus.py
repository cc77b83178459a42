"""Derivatives of eager attention, and its passage through torch's program transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_eager_attention import HQ, OPTIONS, B, M, N, close, qkv, split
from torch import Tensor

from pyfuse.backends import eager_attention as eager

Function = Callable[..., tuple[Tensor, Tensor]]


def differentiable(options: dict[str, Any]) -> tuple[Function, list[Tensor]]:
    """A function of q, k, v and every floating-point option, and the point to differentiate it at.

    A mask's -inf is put in by the function: it has no neighbour for a finite difference.
    """
    given, _ = split(options)
    hidden = torch.tensor(False)
    if "mask" in given and given["mask"].is_floating_point():
        hidden = given["mask"] == float("-inf")
        given["mask"] = given["mask"].masked_fill(hidden, 0.0)
    names = [name for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()]
    names = [name for name in names if given[name].isfinite().all()]

    def function(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        call = given | dict(zip(names, extra, strict=True))
        if "mask" in names:
            call["mask"] = call["mask"].masked_fill(hidden, float("-inf"))
        o, lse = eager.attention(q, k, v, **call, return_lse=True)
        return o, lse.masked_fill(lse == float("-inf"), 0.0)

    return function, [x.clone().requires_grad_() for x in (*qkv(), *(given[n] for n in names))]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    function, point = differentiable(OPTIONS[name])
    torch.autograd.gradcheck(function, point, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", ["plain", "sinks", "seqlens-causal-sinks", "inf-mask", "all"])
def test_second_derivatives(name: str) -> None:
    function, point = differentiable(OPTIONS[name])
    torch.autograd.gradgradcheck(function, point, fast_mode=True)


def test_gradient_of_a_broadcast_mask_is_summed() -> None:
    q, k, v = qkv()
    small = torch.randn(HQ, 1, N, dtype=torch.float64, requires_grad=True)
    full = small.detach().expand(B, HQ, M, N).clone().requires_grad_()
    for mask in (small, full):
        eager.attention(q, k, v, mask=mask).square().sum().backward()
    assert small.grad is not None and full.grad is not None
    close(small.grad, full.grad.sum((0, 2))[:, None])


TRACED = ["plain", "all", "seqlens-causal-sinks", "bool-mask"]


def function_of(name: str) -> Function:
    given, _ = split(OPTIONS[name])
    return partial(eager.attention, **given, return_lse=True)


def gradients(function: Function, point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in point]
    o, lse = function(*leaves)
    loss = o.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", TRACED)
def test_compiles_as_one_graph(name: str) -> None:
    function, point = function_of(name), qkv()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*point), function(*point))
    close(gradients(compiled, point), gradients(function, point))


def test_compiles_once_for_all_sizes() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = partial(eager.attention, causal=True, window=(3, -1))
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for m, n in ((M, N), (6, 11), (9, 4)):
        point = qkv(m, n)
        close(compiled(*point), function(*point))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", TRACED)
def test_exports(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return function(q, k, v)

    function = function_of(name)
    program = torch.export.export(Module(), qkv())
    point = qkv()
    close(program.module()(*point), function(*point))


@pytest.mark.parametrize("name", TRACED)
def test_vmap(name: str) -> None:
    function = function_of(name)
    points = [qkv() for _ in range(3)]
    expected = [function(*point) for point in points]
    stacked = [torch.stack(x) for x in zip(*points, strict=True)]
    close(
        torch.vmap(function)(*stacked), tuple(torch.stack(x) for x in zip(*expected, strict=True))
    )


def test_vmap_over_the_mask() -> None:
    q, k, v = qkv()
    masks = torch.rand(3, M, N) > 0.3
    expected = torch.stack([eager.attention(q, k, v, mask=mask) for mask in masks])
    close(torch.vmap(lambda mask: eager.attention(q, k, v, mask=mask))(masks), expected)


@pytest.mark.parametrize("name", TRACED)
def test_functional_derivatives(name: str) -> None:
    """torch.func.grad and jvp agree with autograd: along t, <grad, t> is the change."""
    function, point = function_of(name), qkv()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in point]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    close(torch.func.grad(loss, (0, 1, 2))(*point), expected)
    tangents = qkv()
    change = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    close(torch.func.jvp(loss, point, tangents)[1], change)


def test_hessian() -> None:
    """Forward over reverse, with an empty row and a hidden key."""
    q, k, v = (x[:1, :2, :3] for x in qkv())
    q = q[:, :1]
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])

    def loss(q: Tensor) -> Tensor:
        return eager.attention(q, k[:, :1], v[:, :1], mask=mask).square().sum()

    hessian = torch.func.hessian(loss)(q)
    close(hessian, torch.autograd.functional.hessian(loss, q))
    assert hessian.isfinite().all() and hessian.any()
