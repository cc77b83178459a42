"""LayerNorm and RMSNorm around their kernels: the draw of dropout, derivatives, transforms, choice and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from numerics import assert_bitwise_equal
from oracle import philox_word
from torch import Tensor

import pyfuse
from pyfuse.backends import cpu_module, eager_norm

# ---- dropout ------------------------------------------------------------------------------------


def test_dropout_mask_is_counted_by_row_and_column() -> None:
    seed = torch.tensor([7, 3])
    x = torch.ones(2, 3, 5, dtype=torch.float64)
    y, z = eager_norm.layer_norm(x, prenorm=True, dropout_p=0.3, dropout_seed=seed)
    threshold = -(-3 * 2**24 // 10)  # ceil(0.3 · 2^24)
    for row in range(6):
        for column in range(5):
            kept = philox_word((0, 0, row, column), (7, 3)) >> 8 >= threshold
            assert z.view(6, 5)[row, column].item() == pytest.approx(1 / 0.7 if kept else 0.0)
    assert_bitwise_equal(y, eager_norm.layer_norm(z), "norm of z")


@pytest.mark.parametrize("function", [pyfuse.layer_norm, pyfuse.rms_norm])
def test_dropout_draws_from_the_default_generator(function: Callable[..., Any]) -> None:
    x, residual = torch.ones(64, 128), torch.full((64, 128), 2.0)

    def run() -> Tensor:
        _, z = function(x, residual=residual, prenorm=True, dropout_p=0.25)
        return z

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    assert first.unique().tolist() == pytest.approx([2.0, 2.0 + 1 / 0.75])
    assert (first == 2.0).float().mean().item() == pytest.approx(0.25, abs=0.02)


# ---- derivatives and transforms -----------------------------------------------------------------

CALCULUS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, r, w, b: pyfuse.layer_norm(x, w, b, residual=r, prenorm=True),
    "plain": lambda x, r, w, b: pyfuse.layer_norm(x) + pyfuse.rms_norm(r),
    "llama": lambda x, r, w, b: pyfuse.rms_norm(x, w, residual=r, prenorm=True),
    "gemma": lambda x, r, w, b: pyfuse.rms_norm(x, w, residual=r, casting="gemma"),
    "torch": lambda x, r, w, b: pyfuse.rms_norm(x, b, casting="torch"),
    "dropout": lambda x, r, w, b: eager_norm.layer_norm(
        x, w, b, residual=r, dropout_p=0.4, dropout_seed=torch.tensor([1, 2])
    ),
}


@pytest.mark.parametrize("name", CALCULUS)
def test_derivatives(name: str) -> None:
    point = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (3, 5), (5,), (5,))]
    for tensor in point:
        tensor.requires_grad_()
    torch.autograd.gradcheck(CALCULUS[name], point, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(CALCULUS[name], point, fast_mode=True)


def test_gradient_of_a_constant_row_is_finite() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    (pyfuse.layer_norm(x) + pyfuse.rms_norm(x)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["layer_norm", "llama"])
def test_vmap_and_functional_gradient(name: str) -> None:
    x, r = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    w, b = torch.randn(5), torch.randn(5)
    call = CALCULUS[name]
    for mapped, whole in zip(
        torch.vmap(call, in_dims=(0, 0, None, None))(x, r, w, b), call(x, r, w, b), strict=True
    ):
        torch.testing.assert_close(mapped, whole)

    def loss(w: Tensor) -> Tensor:
        y, z = call(x, r, w, b)
        return (y * z).sum()

    leaf = w.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(w), leaf.grad)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["layer_norm", "llama"])
def test_compiled(name: str, strided: bool) -> None:
    call = CALCULUS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, r = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    w, b = torch.randn(5), torch.randn(5)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for got, expected in zip(compiled(x, r, w, b), call(x, r, w, b), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert got.stride() == expected.stride()
    grads = []
    for function in (compiled, call):
        leaf = x.detach().clone().requires_grad_()
        y, z = function(leaf, r, w, b)
        (y * z).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_dropout_compiles() -> None:
    def call(x: Tensor) -> Tensor:
        return pyfuse.rms_norm(x, residual=x, dropout_p=0.5)

    y = torch.compile(call, fullgraph=True, backend="aot_eager")(torch.randn(8, 16))
    assert y.isfinite().all()


# ---- choice and errors --------------------------------------------------------------------------


def test_explain_says_what_a_kernel_refuses(target: Target) -> None:
    if target.backend != "cpu":
        return
    x, w = torch.randn(2, 8).bfloat16(), torch.randn(8)
    assert pyfuse.explain("layer_norm", x, w, w).chosen == "cpu"
    for options in ({"weight": w.clone().requires_grad_()}, {"weight": w, "bias": w.bfloat16()}):
        assert pyfuse.explain("layer_norm", x, **options).chosen == "cpu"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("does not mix", {"residual": torch.randn(2, 8).double()}),
        ("gives float64", {"weight": w.double()}),
    ]
    for reason, options in refused:
        explanation = pyfuse.explain("rms_norm", x, **options)
        assert explanation.chosen == "eager" and reason in str(explanation)


def test_kernel_entries_check_what_would_crash(target: Target) -> None:
    if target.backend == "cpu":
        norm = cpu_module.module().norm
        sizes, dtypes = (1, 8, 8, 8), (0, 0, 0, 0, 0)
        rest = (0, 1e-5, 0.0, 1)  # layer_norm, eps, no dropout, one thread
        x = torch.zeros(1, 8)
        at = x.data_ptr()
        with pytest.raises(ValueError, match="x: null data pointer"):
            norm(0, 0, 0, 0, 0, 0, 0, *sizes, *dtypes, *rest)
        with pytest.raises(ValueError, match="y: null data pointer"):
            norm(at, 0, 0, 0, 0, 0, 0, *sizes, *dtypes, *rest)
        with pytest.raises(ValueError, match="z is x without residual"):
            norm(at, 0, 0, 0, at, at, 0, *sizes, *dtypes, *rest)
        with pytest.raises(ValueError, match="no such kind: 4"):
            norm(at, 0, 0, 0, at, 0, 0, *sizes, *dtypes, 4, *rest[1:])
        with pytest.raises(ValueError, match="residual must be of x's dtype"):
            norm(at, 0, 0, 0, at, 0, 0, *sizes, 0, 1, 0, 0, 0, *rest)
        with pytest.raises(ValueError, match="y must be of x's dtype"):
            norm(at, 0, 0, 0, at, 0, 0, *sizes, 1, 1, 0, 0, 0, *rest)
        strides, grads = (8, 0, 0, 8, 0), (0, 0, 0, 0)
        with pytest.raises(ValueError, match="dy: null data pointer"):
            cpu_module.module().norm_gradient(
                at, 0, 0, 0, 0, *grads, 0, 0, 1, 8, strides, *dtypes, *rest
            )


X = torch.zeros(2, 8)
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    (r"x: .*floating-point.*int64", TypeError, lambda: pyfuse.layer_norm(torch.zeros(2, 8).long())),
    (r"x: .*shape \(2, 0\)", ValueError, lambda: pyfuse.layer_norm(torch.zeros(2, 0))),
    (r"x: .*shape \(\)", ValueError, lambda: pyfuse.rms_norm(torch.tensor(1.0))),
    (r"weight: .*\(8,\).*got \(7,\)", ValueError, lambda: pyfuse.layer_norm(X, torch.zeros(7))),
    (r"weight: .*got \(1, 8\)", ValueError, lambda: pyfuse.rms_norm(X, torch.zeros(1, 8))),
    (r"weight: .*int64", TypeError, lambda: pyfuse.rms_norm(X, torch.zeros(8).long())),
    (
        r"weight: is on meta, but x is on cpu",
        ValueError,
        lambda: pyfuse.layer_norm(X, torch.zeros(8, device="meta")),
    ),
    (r"bias: .*got \(9,\)", ValueError, lambda: pyfuse.layer_norm(X, None, torch.zeros(9))),
    (r"eps: .*-1", ValueError, lambda: pyfuse.layer_norm(X, eps=-1.0)),
    (r"eps: .*nan", ValueError, lambda: pyfuse.rms_norm(X, eps=float("nan"))),
    (r"dropout_p: .*1\.0", ValueError, lambda: pyfuse.layer_norm(X, dropout_p=1.0)),
    (r"dropout_p: .*-0\.1", ValueError, lambda: pyfuse.rms_norm(X, dropout_p=-0.1)),
    (
        r"residual: expected x's shape \(2, 8\), got \(8,\)",
        ValueError,
        lambda: pyfuse.layer_norm(X, residual=torch.zeros(8)),
    ),
    (
        r"residual: got torch.bfloat16",
        TypeError,
        lambda: pyfuse.rms_norm(X, residual=X.bfloat16()),
    ),
    (
        r"residual: is on meta",
        ValueError,
        lambda: pyfuse.rms_norm(X, residual=torch.zeros(2, 8, device="meta")),
    ),
    (r"casting: got 't5'", ValueError, lambda: pyfuse.rms_norm(X, casting="t5")),
]


@pytest.mark.parametrize(("message", "kind", "call"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input(message: str, kind: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
