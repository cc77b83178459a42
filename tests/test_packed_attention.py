"""varlen_attention and decode_attention on every backend, held to eager in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numerics
import pytest
import torch
from cases import DTYPES
from conftest import Target, at_threads
from torch import Tensor

import pyfuse

QUERIES, KEYS = [65, 0, 1, 130, 3], [111, 5, 70, 130, 0]
LENGTHS = [300, 0, 1, 129]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 16},
    "steps": {
        "causal": True,
        "softcap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]),
    },
}


def normal(dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPES[dtype])


def compare(function: Callable[..., Any], target: Target, *tensors: Tensor, **options: Any) -> None:
    """o and lse of that backend by the accuracy rule; a refusal skips the test."""

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    try:
        actual = function(*tensors, **options, return_lse=True, backend=target.backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal).splitlines()[-1].strip())
    options = {**options, "return_lse": True, "backend": "eager"}
    eager = function(*tensors, **options)
    wide = {name: double(x) for name, x in options.items()}
    exact = function(*map(double, tensors), **wide)
    for i, name in enumerate(("o", "lse")):
        numerics.check(actual[i], exact[i], eager[i], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(target: Target, name: str, dtype: str) -> None:
    total, total_k = sum(QUERIES), sum(KEYS)
    cu_q = torch.tensor([0, *QUERIES]).cumsum(0).to(torch.int32)
    cu_k = torch.tensor([0, *KEYS]).cumsum(0).to(torch.int32)
    tensors = (
        normal(dtype, total, 4, 64),
        normal(dtype, total_k, 2, 64),
        normal(dtype, total_k, 2, 40),
    )
    compare(pyfuse.varlen_attention, target, *tensors, cu_q, cu_k, **OPTIONS[name])


@pytest.mark.parametrize("heads", [(4, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_varlen_sizes_of_zero(
    target: Target, sizes: tuple[int, int], heads: tuple[int, int]
) -> None:
    """A tensor without elements has no memory, and needs none."""
    (m, n), (hq, hk) = sizes, heads
    cu_q, cu_k = torch.tensor([0, 0, m]), torch.tensor([0, n, n])
    tensors = [normal("f32", m, hq, 8), normal("f32", n, hk, 8), normal("f32", n, hk, 6)]
    points = [x.requires_grad_() for x in tensors]
    o, lse = pyfuse.varlen_attention(*points, cu_q, cu_k, return_lse=True, backend=target.backend)
    assert o.shape == (m, hq, 6) and lse.shape == (hq, m)
    assert (o == 0).all() and (lse == -float("inf")).all()
    for x, grad in zip(points, torch.autograd.grad(o.sum(), points), strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_has_the_same_bits_for_every_thread_count_and_run(
    target: Target, name: str, dtype: str
) -> None:
    """Forward and backward."""
    cu_q = torch.tensor([0, *QUERIES]).cumsum(0)
    cu_k = torch.tensor([0, *KEYS]).cumsum(0)
    shapes = [(sum(QUERIES), 4, 40), (sum(KEYS), 2, 40), (sum(KEYS), 2, 33)]
    points = [normal(dtype, *shape).requires_grad_() for shape in shapes]
    upstream = normal(dtype, sum(QUERIES), 4, 33)
    expected: list[Tensor] | None = None
    counts = (1, 1, 2, 2, 4, 4) if target.backend == "cpu" else (1, 1)
    for threads in at_threads(*counts):  # on a GPU: other orders of programs
        torch.manual_seed(1)
        o, lse = pyfuse.varlen_attention(
            *points, cu_q, cu_k, dropout_p=0.1, return_lse=True, backend=target.backend,
            **OPTIONS[name],
        )  # fmt: skip
        actual = [o, lse, *torch.autograd.grad(o, points, upstream)]
        expected = expected or actual
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            numerics.assert_bitwise_equal(a, b, f"result {i}, {threads} threads")


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("page_size", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_decode(target: Target, name: str, dtype: str, page_size: int | None, m: int) -> None:
    batch, options = len(LENGTHS), {**OPTIONS[name], "seqlens_k": torch.tensor(LENGTHS)}
    shape: tuple[int, ...] = (batch, 2, 304)
    if page_size is not None:
        pages = batch * 304 // page_size
        shape = (pages, 2, page_size)
        table = torch.randperm(pages).reshape(batch, -1).to(torch.int32)
        options["block_table"] = table
    tensors = normal(dtype, batch, 4, m, 64), normal(dtype, *shape, 64), normal(dtype, *shape, 40)
    compare(pyfuse.decode_attention, target, *tensors, **options)


@pytest.mark.parametrize("function", [pyfuse.varlen_attention, pyfuse.decode_attention])
def test_without_a_named_backend(function: Callable[..., Any]) -> None:
    """Some backend answers, and as eager does."""
    torch.manual_seed(0)
    if function is pyfuse.varlen_attention:
        cu = torch.tensor([0, 3, 5])
        tensors: tuple[Tensor, ...] = (*(torch.randn(5, 2, 8) for _ in range(3)), cu, cu)
        options: dict[str, Any] = {}
    else:
        tensors = (torch.randn(2, 2, 1, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8))
        options = {"seqlens_k": torch.tensor([3, 7])}
    actual = function(*tensors, **options)
    torch.testing.assert_close(actual, function(*tensors, **options, backend="eager"))
