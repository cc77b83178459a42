"""A linear layer as a function, with the faster of two matrix products for each of its passes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import (
    linear as torch_linear,  # also where override_torch has put another there
)

from pyfuse.backends.cpu_matmul import KINDS, MIN_FLOPS, Choice, Way, choose, multiply
from pyfuse.guards import formula_reason, plain, wants_second_derivatives
from pyfuse.ops._autocast import autocast_enabled
from pyfuse.ops._checks import bind_dims, same_device, same_dtype_device


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + b, as torch.nn.functional.linear.

    With y's gradient dy and rows counted over all leading dimensions:

        dx = dy·W        dW = dyᵀ·x        db = sum of dy over the rows

    x [..., K], weight [N, K], bias [N] or None; y [..., N]. Any dtype that F.linear takes, the same for all
    (under torch.autocast they are cast as F.linear casts them). Any strides; any size may be 0.

    In float32 on a CPU each of the three products runs in the faster of two ways: torch's own (MKL, which is slow on
    AMD CPUs with AVX-512), or the oneDNN inside torch, in true float32 as well and held to the accuracy rule. The
    choice is measured once per process, shape and number of threads, in about a tenth of a second; small and
    narrow products are torch's without it; :func:`linear_choices` tells it. So results may
    differ between two processes in their last bits; within one, the same inputs give the same bits. After
    torch.use_deterministic_algorithms(True), and wherever else than with plain float32 CPU tensors in eager mode
    (other dtypes and devices, a W whose memory has gaps, torch.compile, export, functorch's transforms,
    forward-mode AD, tensor subclasses), this is F.linear itself.

    Differentiable any number of times.
    ValueError, TypeError: a size, dtype or device that does not fit.
    """
    _check(x, weight, bias)
    return checked_linear(x, weight, bias)


def checked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of arguments that fit."""
    ways = None if torch.compiler.is_compiling() else _chosen_ways(x, weight, bias)
    if ways is None:
        return torch_linear(x, weight, bias)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias):
        result: Tensor = _Linear.apply(ways, x, weight, bias)
        return result
    return _forward(ways.forward, x, weight, bias)


def linear_choices(rows: int, n: int, k: int) -> dict[str, Choice]:
    """Which way each product of a layer with W [n, k] takes in this process for that many rows of x, and why.

    The keys: "forward" (y), "input" (dx) and "weight" (dW). What has not been measured yet is measured now. A
    Choice has `way`, `milliseconds` of each way and the shape that they were `measured` with; str() shows all.
    """
    for name, size in (("rows", rows), ("n", n), ("k", k)):
        if size < 0:
            raise ValueError(f"{name}: expected at least 0, got {size}")
    return {kind: choose(kind, rows, n, k) for kind in KINDS}


class Ways(NamedTuple):
    """The ways of the three products."""

    forward: Way
    input: Way
    weight: Way


_deterministic = torch.are_deterministic_algorithms_enabled
_STOCK = Ways("torch", "torch", "torch")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = {"x": (x, "... K"), "weight": (weight, "N K")}
    if bias is not None:
        given["bias"] = (bias, "N")
    bind_dims(**given)
    tensors = {name: tensor for name, (tensor, _) in given.items()}
    if autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        same_device(**tensors)  # dtypes become one
    else:
        same_dtype_device(**tensors)


def _any_requires_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


def _chosen_ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> Ways | None:
    """The ways of this call's products; None where it is F.linear's."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return None
    n, k = weight.shape
    transposed = _lies_transposed(weight)
    if 2.0 * x.numel() * n < MIN_FLOPS or not able(x, weight.t() if transposed else weight, bias):
        return None
    rows = x.numel() // k
    dx = dw = False
    if torch.is_grad_enabled():
        dx, dw = x.requires_grad, weight.requires_grad
    if transposed:  # Wᵀ is the layer then: y is made as its dx, and dx as its y
        backward = choose_ways(rows, k, n, True, dw)
        ways = Ways(backward.input, backward.forward if dx else "torch", backward.weight)
    else:
        ways = choose_ways(rows, n, k, dx, dw)
    return None if ways == _STOCK else ways


def _lies_transposed(weight: Tensor) -> bool:
    """Whether W [N, K] is the view of a dense [K, N], as GPT-2's Conv1D has it."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


def able(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these float32 CPU tensors may take another way than torch's."""
    return (
        weight.is_contiguous()
        and plain((x, weight, bias))
        and formula_reason() is None
        and not _deterministic()  # no measurement decides about bits then
        and not (autocast_enabled() and torch.is_autocast_enabled("cpu"))
    )


def choose_ways(rows: int, n: int, k: int, dx: bool, dw: bool) -> Ways:
    """Of the products that are asked for; the others are torch's."""
    return Ways(
        choose("forward", rows, n, k).way,
        choose("input", rows, n, k).way if dx else "torch",
        choose("weight", rows, n, k).way if dw else "torch",
    )


def _forward(way: Way, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if way == "torch":
        return torch_linear(x, weight, bias)
    with torch.no_grad():
        y = multiply(way, _rows(x), weight, bias)
        # Not view(): autograd forbids a caller to write into a view that comes out of a custom function.
        result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
        return result


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).contiguous()


class _Linear(torch.autograd.Function):
    """Only plain tensors come here, and never under a functorch transform."""

    @staticmethod
    def forward(ctx: Any, ways: Ways, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.ways, ctx.transposed = ways, _lies_transposed(weight)
        _, needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _forward(ways.forward, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ways = ctx.ways
        if wants_second_derivatives((dy,)) or not plain((dy, x, weight)):
            ways = _STOCK  # torch's products are differentiable again
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        # The casts of autocast belong to the forward pass.
        with torch.autocast("cpu", enabled=False) if autocast_enabled() else nullcontext():
            if needs_x:
                a = flows if ways.input == "torch" else flows.contiguous()
                dx = multiply(ways.input, a, weight.t()).reshape(ctx.x_shape)
            if needs_weight:
                rows = x.reshape(-1, x.shape[-1])
                if ways.weight != "torch":
                    rows, flows = rows.contiguous(), flows.contiguous()
                if ctx.transposed:
                    dw = multiply(ways.weight, rows.t(), flows.t()).t()
                else:
                    dw = multiply(ways.weight, flows.t(), rows.t())
            if needs_bias:
                db = flows.sum(0)
        return None, dx, dw, db
