"""rope_pair: the bits of two ropes, forward and backward, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from numerics import assert_bitwise_equal
from rope_cases import DTYPES, ROTATIONS, angles
from torch import Tensor

import pyfuse


def pair(dtype: torch.dtype = torch.float32, d: int = 24) -> tuple[Tensor, Tensor]:
    """q a view of [B, M, H, D], as models have it, k dense."""
    q = torch.randn(2, 19, 4, d).to(dtype).transpose(1, 2)
    return q, torch.randn(2, 3, 19, d).to(dtype)


TABLES: dict[str, Callable[[], dict[str, Any]]] = {
    "shared": lambda: dict(zip(("cos", "sin"), angles(19, 12), strict=True)),
    "batched": lambda: dict(zip(("cos", "sin"), angles(2, 19, 5), strict=True)),
    "gathered": lambda: {
        **dict(zip(("cos", "sin"), angles(40, 8), strict=True)),
        "positions": torch.randint(0, 40, (2, 19)),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layout", ROTATIONS)
def test_equals_two(
    layout: str, table: str, inplace: bool, dtype: torch.dtype, target: Target
) -> None:
    given = {"layout": layout, "backend": target.backend, **TABLES[table]()}
    q, k = pair(dtype)
    expected = [pyfuse.rope(x, **given) for x in (q, k)]
    turned = pyfuse.rope_pair(q, k, **given, inplace=inplace)
    for x, y, e in zip((q, k), turned, expected, strict=True):
        assert_bitwise_equal(y, e, "pair")
        assert y.stride() == x.stride() and (y is x) == inplace


@pytest.mark.parametrize("wanted", [("q", "k"), ("q",), ("k",)], ids="".join)
@pytest.mark.parametrize("used", ["both", "q", "k"])
@pytest.mark.parametrize("table", TABLES)
def test_gradients_equal_those_of_two(
    table: str, used: str, wanted: tuple[str, ...], target: Target
) -> None:
    """Also where one result is not used, or one gradient not wanted."""
    given = {"layout": "half", "backend": target.backend, **TABLES[table]()}
    q, k = pair()
    upstream = [torch.randn_like(x) for x in (q, k)]
    leaves = {n: x.requires_grad_(n in wanted) for n, x in (("q", q), ("k", k))}

    def gradients(results: tuple[Tensor, ...]) -> list[Tensor]:
        terms = [
            (y * dy).sum()
            for name, y, dy in zip("qk", results, upstream, strict=True)
            if used in ("both", name)
        ]
        loss = torch.stack([*terms, *(x.sum() * 0 for x in leaves.values())]).sum()
        return list(torch.autograd.grad(loss, [leaves[n] for n in wanted]))

    found = gradients(pyfuse.rope_pair(q, k, **given))
    for name, x, y in zip(
        wanted, found, gradients(tuple(pyfuse.rope(x, **given) for x in (q, k))), strict=True
    ):
        assert_bitwise_equal(x, y, f"d{name}")


def test_gradients_of_angles(backend: str) -> None:
    """By the formula."""
    q, k = (x.double() for x in pair(d=6))
    cos, sin = (t.requires_grad_() for t in angles(19, 3, dtype=torch.float64))
    torch.autograd.gradcheck(
        lambda cos, sin: pyfuse.rope_pair(q, k, cos, sin, layout="half"), (cos, sin), fast_mode=True
    )


def test_second_derivatives_of_one_alone() -> None:
    """The other result depends on nothing that a gradient is asked of."""
    q, k = (x.double() for x in pair(d=6))
    cos, sin = angles(19, 3, dtype=torch.float64)
    q.requires_grad_()
    for used in (0, 1, slice(None)):

        def loss(q: Tensor, used: Any = used) -> Tensor:
            turned = pyfuse.rope_pair(q, k, cos, sin, layout="half")[used]
            chosen = turned if isinstance(turned, tuple) else (turned,)
            return torch.stack([x.sin().sum() for x in chosen]).sum() + 0 * q.sum()

        (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
        (second,) = torch.autograd.grad(first.sum() + 0 * q.sum(), q)
        if used == 1:
            assert not first.any() and not second.any()
            continue
        one = pyfuse.rope(q, cos, sin, layout="half").sin().sum()
        (expected,) = torch.autograd.grad(one, q, create_graph=True)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize("empty", ["q", "k", "rows"])
def test_empty(empty: str, target: Target) -> None:
    q, k = pair()
    q = q[:, :0] if empty == "q" else q
    k = k[:, :0] if empty == "k" else k
    rows = 0 if empty == "rows" else 19
    cos, sin = angles(rows, 12)
    turned = pyfuse.rope_pair(
        q[:, :, :rows], k[:, :, :rows], cos, sin, layout="half", backend=target.backend
    )
    assert [y.shape for y in turned] == [q[:, :, :rows].shape, k[:, :, :rows].shape]


Q, COS = torch.zeros(2, 4, 5, 8), torch.zeros(5, 4)
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    (r"q: expected 4 dimensions", ValueError, {"q": Q[0]}),
    (r"cos: expected \[5, R/2\].* for q \(2, 4, 5, 8\)", ValueError, {"cos": COS[:4]}),
    (r"k: expected \[2, Hk, 5, 8\] like q, got \(1, 4, 5, 8\)", ValueError, {"k": Q[:1]}),
    (r"k: expected \[2, Hk, 5, 8\] like q, got \(2, 4, 3, 8\)", ValueError, {"k": Q[:, :, :3]}),
    (r"k: expected q's dtype torch.float32, got torch.float16", TypeError, {"k": Q.half()}),
    (r"k: is on meta", ValueError, {"k": Q.to("meta")}),
    (r"but k of shape .* is expanded", ValueError, {"k": Q[:, :1].expand(2, 3, 5, 8)}),
    (r"inplace: True, but a gradient", ValueError, {"k": Q.clone().requires_grad_()}),
]


@pytest.mark.parametrize(("message", "kind", "changed"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input(message: str, kind: type[Exception], changed: dict[str, Any]) -> None:
    given = {"q": Q.clone(), "k": Q.clone(), "cos": COS, "sin": COS} | changed
    with pytest.raises(kind, match=message):
        pyfuse.rope_pair(**given, layout="half", inplace=True)
