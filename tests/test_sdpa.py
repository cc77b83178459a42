"""pyfuse.scaled_dot_product_attention against the function of torch that it stands for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyfuse

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def tensors(shapes: Shapes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def same(arguments: list[Tensor], **options: Any) -> None:
    """The same values and gradients as torch."""
    ours = [x.clone().requires_grad_() for x in arguments]
    theirs = [x.clone().requires_grad_() for x in arguments]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*theirs, **options)
        actual = pyfuse.scaled_dot_product_attention(*ours, **options)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), ours)
        wanted = torch.autograd.grad(expected.square().sum(), theirs)
    torch.testing.assert_close(grads, wanted)
    with torch.no_grad():  # the way of the kernels
        torch.testing.assert_close(
            pyfuse.scaled_dot_product_attention(*arguments, **options), expected
        )


SHAPES: dict[str, Shapes] = {
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "5-D": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)),
    "6-D": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 8)),
    "batch-broadcast": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "query-broadcast": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "heads-broadcast": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "query-heads-broadcast": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "fewer-dimensions": ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    "no-keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no-batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, causal: bool) -> None:
    same(tensors(SHAPES[name]), is_causal=causal)


@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)])
def test_causal_is_aligned_top_left(m: int, n: int) -> None:
    same(tensors(((2, 4, m, 8), (2, 4, n, 8), (2, 4, n, 8))), is_causal=True)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((3, 2, 4, 5, 8), (3, 2, 1, 7, 8), (3, 2, 1, 7, 8)),
    ],
    ids=["4-D", "3-D", "5-D"],
)
def test_grouped_heads(shapes: Shapes) -> None:
    same(tensors(shapes), enable_gqa=True)
    same(tensors(shapes), enable_gqa=True, is_causal=True, scale=0.3)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("4-D", (5, 7)),
        ("4-D", (2, 1, 5, 7)),
        ("4-D", (2, 4, 1, 7)),
        ("3-D", (4, 5, 7)),
        ("3-D", (5, 1)),
        ("2-D", (5, 7)),
        ("5-D", (3, 1, 4, 5, 7)),
        ("5-D", (2, 1, 5, 7)),
        ("5-D", (4, 5, 7)),
        ("batch-broadcast", (2, 1, 5, 7)),
    ],
)
def test_masks(name: str, shape: tuple[int, ...], kind: str) -> None:
    mask = torch.randn(shape, dtype=torch.float64)
    same(tensors(SHAPES[name]), attn_mask=mask > 0 if kind == "bool" else mask)


def test_a_query_that_sees_nothing() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    same(tensors(SHAPES["4-D"]), attn_mask=mask)


def test_any_strides() -> None:
    q, k, v = tensors(SHAPES["4-D"])
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert columns[0].stride(-1) != 1
    same(columns)


def test_signature_is_that_of_torch() -> None:
    """torch's is a builtin: its docstring starts with the signature."""
    documented = (F.scaled_dot_product_attention.__doc__ or "").split("->")[0]
    parameters = inspect.signature(pyfuse.scaled_dot_product_attention).parameters
    position = 0
    for name, parameter in parameters.items():
        position = documented.index(name, position)
        default = parameter.default
        if default is not inspect.Parameter.empty:
            assert documented[position:].startswith(f"{name}={default}"), name


def test_dropout_is_that_of_attention() -> None:
    q, k, v = tensors(SHAPES["4-D"])
    torch.manual_seed(5)
    actual = pyfuse.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(actual, pyfuse.attention(q, k, v, dropout_p=0.5))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((8,), (7, 8), (7, 8)), {}, "query: expected at least 2 dimensions"),
        (((5, 8), (7, 9), (7, 8)), {}, "key: E is 9, but query has E = 8"),
        (((5, 8), (7, 8), (6, 8)), {}, "value: S is 6, but key has S = 7"),
        (
            ((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
            {},
            "batch dimensions (2,), (3,), (3,) do not",
        ),
        (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), {}, "head dimensions (4,), (2,) do not"),
        (
            SHAPES["4-D"],
            {"is_causal": True, "attn_mask": torch.ones(5, 7, dtype=torch.bool)},
            "attn_mask: got a mask and is_causal=True",
        ),
        (
            SHAPES["5-D"],
            {"attn_mask": torch.zeros(2, 2, 4, 5, 7)},
            "attn_mask: shape (2, 2, 4, 5, 7)",
        ),
        (SHAPES["4-D"], {"attn_mask": torch.zeros(5, 6)}, "mask: shape (5, 6)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(shapes: Shapes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        pyfuse.scaled_dot_product_attention(*tensors(shapes, torch.float32), **options)
    assert message in str(error.value)
