"""Linear, LayerNorm, RMSNorm and the functions under them: torch's contract, and what is left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_cases import KINDS
from torch import Tensor, nn

import pyfuse.nn
from pyfuse.nn import _fallbacks
from pyfuse.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> _fallbacks.Calls:
    counted = _fallbacks.Calls()
    monkeypatch.setattr(_fallbacks, "counting", counted)
    return counted


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for what the order of sums may change."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("shape", [7, (5, 7), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(
    name: str, affine: bool, shape: Any, dtype: torch.dtype, calls: _fallbacks.Calls
) -> None:
    found = []
    for kind in KINDS:
        torch.manual_seed(1)
        m = getattr(KINDS[kind], name)(shape, elementwise_affine=affine, dtype=dtype)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.randn_like(p))
        x = torch.randn(2, 3, 5, 7).to(dtype).requires_grad_()
        y = m(x)
        (y * torch.randn_like(y)).sum().backward()
        assert x.grad is not None
        found.append(
            [y.detach().double(), x.grad.double(), *(p.grad.double() for p in m.parameters())]
        )
        assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).abs().max() <= 8 * eps * theirs.abs().max()
    assert calls.run.total() == 1 and not calls.left


def test_the_default_eps_of_rms_norm() -> None:
    """torch takes that of the dtype in which it computes; with tiny inputs it is all that counts."""
    for dtype in DTYPES:
        x = (torch.randn(4, 8, dtype=torch.float64) * 1e-4).to(dtype)
        close(F.rms_norm(x, (8,)), nn.functional.rms_norm(x, (8,)))


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "two dtypes": ({"weight": torch.ones(8), "input": torch.ones(2, 8, dtype=torch.bfloat16)}, "beside"),
    "no size": ({"normalized_shape": (0,), "input": torch.ones(2, 0)}, "with a 0"),
    "subclass": ({"input": torch.ones(2, 8).as_subclass(type("Own", (Tensor,), {}))}, "Own"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_norms_that_are_left_to_torch(case: str, calls: _fallbacks.Calls) -> None:
    options, reason = LEFT[case]
    given = {"input": torch.ones(2, 8), "normalized_shape": (8,), **options}
    y = F.layer_norm(**given)
    assert type(y) is type(given["input"])
    assert torch.equal(y, nn.functional.layer_norm(**given))
    ((name, why),) = calls.left
    assert name == "layer_norm" and reason in why and not calls.run


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalized_shape": (7,)},
        {"normalized_shape": ()},
        {"weight": torch.ones(7)},
        {"input": torch.ones(2, 8, dtype=torch.int64)},
    ],
    ids=str,
)
def test_errors_of_norms_are_torchs(wrong: dict[str, Any]) -> None:
    given = {"input": torch.ones(2, 8), "normalized_shape": (8,), **wrong}
    messages = []
    for function in (F.layer_norm, nn.functional.layer_norm):
        with pytest.raises((RuntimeError, ValueError)) as error:
            function(**given)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(5, 7).tril() > 0},
    "float": {"attn_mask": torch.ones(5, 7).tril().log()},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(case: str, dtype: torch.dtype, calls: _fallbacks.Calls) -> None:
    options = dict(ATTENTION[case])
    if case == "float":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (5, 7, 7))
    y = F.scaled_dot_product_attention(q, k, v, **options)
    wide = {
        n: o.double() if n == "attn_mask" and case == "float" else o for n, o in options.items()
    }
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert calls.run == {"scaled_dot_product_attention": 1} and not calls.left


ATTENTION_LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": torch.ones(1, 1, 0, 8), "value": torch.ones(1, 1, 0, 8)}, "empty"),
    "all dropped": ({"dropout_p": 1.0}, "dropout_p"),
    "mask and causal": (
        {"is_causal": True, "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu()},
        "beside is_causal",
    ),
}


@pytest.mark.parametrize("case", ATTENTION_LEFT)
def test_attention_that_is_left_to_torch(case: str, calls: _fallbacks.Calls) -> None:
    options, reason = ATTENTION_LEFT[case]
    one = torch.ones(1, 1, 4, 8)
    given = {"query": one, "key": one, "value": one, **options}
    y, theirs = (
        f(**given)
        for f in (F.scaled_dot_product_attention, nn.functional.scaled_dot_product_attention)
    )
    assert torch.equal(y, theirs) or (y.isnan() == theirs.isnan()).all()
    ((_, why),) = calls.left
    assert reason in why and not calls.run


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": torch.ones(1, 1, 4, 6)},
        {"query": torch.ones(1, 1, 4, 8, dtype=torch.float64)},
        {"attn_mask": torch.ones(4, 4, dtype=torch.int64)},
        {"query": torch.ones(8)},
    ],
    ids=["key", "dtype", "mask", "dimensions"],
)
def test_errors_of_attention_are_torchs(wrong: dict[str, Any]) -> None:
    one = torch.ones(1, 1, 4, 8)
    given = {"query": one, "key": one, "value": one, **wrong}
    messages = []
    for function in (F.scaled_dot_product_attention, nn.functional.scaled_dot_product_attention):
        with pytest.raises((RuntimeError, ValueError)) as error:
            function(**given)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype: torch.dtype, calls: _fallbacks.Calls) -> None:
    m = pyfuse.nn.Dropout(0.3)
    assert repr(m) == repr(nn.Dropout(0.3))
    x = torch.ones(4, 50, 100, dtype=dtype, requires_grad=True)
    y = m(x)
    kept = torch.tensor(1 / 0.7, dtype=torch.float64).to(dtype)
    assert (y.eq(0.0) | y.eq(kept)).all()
    dropped = y.eq(0.0).double().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / y.numel()) ** 0.5
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, y)
    assert calls.run == {"dropout": 1} and not calls.left
    assert torch.equal(m.eval()(x), x) and torch.equal(F.dropout(x, 0.0), x)
    assert calls.run == {"dropout": 1} and not calls.left


DROPOUT_LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({"p": 1.0}, "p outside"),
    "in place": ({"inplace": True}, "inplace"),
    "whole numbers": ({"input": torch.ones(3, dtype=torch.int64), "p": 1.0}, "dtype torch.int64"),
    "no dimensions": ({"input": torch.ones(())}, "no dimensions"),
    "meta": ({"input": torch.ones(3, device="meta")}, "torch's own is fast on this device"),
}


@pytest.mark.parametrize("case", DROPOUT_LEFT)
def test_dropout_that_is_left_to_torch(case: str, calls: _fallbacks.Calls) -> None:
    options, reason = DROPOUT_LEFT[case]
    found = []
    for function in (torch.nn.functional.dropout, F.dropout):
        given = {"input": torch.ones(5, 7)} | options
        if given["input"].device.type == "cpu":
            given["input"] = given["input"].clone()
        torch.manual_seed(3)
        y = function(**given)
        assert (y is given["input"]) == (case == "in place")
        found.append(y)
    assert found[0].is_meta or torch.equal(*found)
    ((name, why),) = calls.left
    assert name == "dropout" and reason in why and not calls.run


def test_small_dropout_is_torchs_by_choice(calls: _fallbacks.Calls) -> None:
    x, found = torch.ones(5, 7), []
    for function in (torch.nn.functional.dropout, F.dropout):
        torch.manual_seed(3)
        found.append(function(x))
    assert torch.equal(*found) and not calls.left and not calls.run


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_errors_of_dropout_are_torchs(p: float) -> None:
    said = []
    for function in (torch.nn.functional.dropout, F.dropout):
        with pytest.raises((ValueError, RuntimeError), match="dropout prob") as caught:
            function(torch.ones(3), p)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_compiled_dropout_is_torchs() -> None:
    """Which the compiler fuses with what stands around it."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: F.dropout(x, 0.5), backend=backend, fullgraph=True)(torch.ones(8))
    assert "dropout" in graphs[0].code and "pyfuse" not in graphs[0].code


def test_linear() -> None:
    torch.manual_seed(1)
    theirs = nn.Linear(5, 3)
    torch.manual_seed(1)
    ours = pyfuse.nn.Linear(5, 3)
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ours(torch.randn(4, 6))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "Linear"])
def test_a_compiled_layer_is_one_graph(name: str) -> None:
    m = getattr(pyfuse.nn, name)(*((8, 8) if name == "Linear" else (8,)))
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))
