"""The norms' kernels, dropout and mixed dtypes included, and their gradients against the eager formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target, at_threads
from norm_cases import (
    CASES,
    NormCall,
    NormCase,
    build,
    check_call,
    eager_gradients,
    kernel_gradients,
    results,
    subsets,
)
from numerics import assert_bitwise_equal, check
from torch import Tensor

import pyfuse

pytestmark = pytest.mark.emulated(sm_80=4, sm_90=24, sm_89=48, sm_120=48)
OPS = ["layer_norm", "llama", "gemma", "torch"]
HALF = ["bf16", "f16"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_call(case: NormCase, target: Target) -> None:
    check_call(build(case), target, str(case))


@pytest.mark.parametrize("residual", ["none", "f32"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_what_is_needed(op: str, residual: str, target: Target) -> None:
    for dtype, dropout in (("f32", 0.0), ("f32", 0.3), ("bf16", 0.0), ("bf16", 0.3)):
        call = build(NormCase(op, dtype, 37, 65, residual=residual, dropout=dropout))
        everything = kernel_gradients(call, target.backend)
        for needs in subsets(frozenset(call.named())):
            for name, grad in kernel_gradients(call, target.backend, needs).items():
                assert_bitwise_equal(grad, everything[name], f"{name} of {sorted(needs)}")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_flow_from_one_result_alone(op: str, dtype: str, target: Target) -> None:
    for dropout in (0.0, 0.3):
        call = build(NormCase(op, dtype, 37, 65, residual="own", prenorm=True, dropout=dropout))
        for grads in ((call.grads[0], None), (None, call.grads[1])):
            call.grads = grads
            check_call(call, target, f"grads {[g is not None for g in grads]}")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_threads_change_no_bit(op: str, dtype: str, target: Target) -> None:
    for rows, d in ((203, 577), (5000, 3), (2, 5000)):
        call = build(NormCase(op, dtype, rows, d, residual="own", prenorm=True, dropout=0.2))
        found = [
            (*results(call, target.backend), *kernel_gradients(call, target.backend).values())
            for _ in at_threads(1, 2, 4)
        ]
        for other in found[1:]:
            for a, b in zip(other, found[0], strict=True):
                assert_bitwise_equal(a, b, f"{rows}x{d}")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_size_changes_no_bit_of_a_row(op: str, dtype: str, target: Target) -> None:
    """Large calls store past the caches, and take row after row; small ones two rows at a time."""
    d = 768
    for rows in (2300, 6100 if dtype == "f32" else 12200):  # more than half a cache, and than one
        case = NormCase(op, dtype, rows, d, residual="own", prenorm=True)
        call = build(case)
        whole = (*results(call, target.backend), kernel_gradients(call, target.backend)["x"])
        for part in (slice(0, 5), slice(rows - 4, rows)):
            x, *parameters = call.tensors
            assert x is not None
            options = {**call.options, "residual": call.options["residual"][part]}
            grads = tuple(None if g is None else g[part] for g in call.grads)
            small = NormCall(call.op, (x[part], *parameters), options, grads)
            alone = (*results(small, target.backend), kernel_gradients(small, target.backend)["x"])
            for a, b in zip(alone, whole, strict=True):
                assert_bitwise_equal(a, b[part], f"{rows} rows, {part}")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_sums_over_many_rows(op: str, dtype: str, target: Target) -> None:
    """A plain sum in float over so many rows would miss the rule by far."""
    for rows, d in ((30000, 5), (20000, 64)):
        check_call(build(NormCase(op, dtype, rows, d)), target, f"{rows}x{d}")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, prenorm: bool, target: Target) -> None:
    case = NormCase(rows=15, d=65, residual="own", prenorm=prenorm, dropout=0.3)
    flat = build(case)
    expected = kernel_gradients(flat, target.backend)

    def strided(t: Any) -> Any:
        return LAYOUTS[layout](t.view(3, 5, 65)) if isinstance(t, Tensor) and t.ndim == 2 else t

    tensors = tuple(map(strided, flat.tensors))
    options = {name: strided(t) for name, t in flat.options.items()}
    call = NormCall(flat.op, tensors, options, tuple(map(strided, flat.grads)))
    weight = call.tensors[1]
    assert weight is not None
    weight = torch.stack((weight, weight), 1)[:, 0]
    call.tensors = (call.tensors[0], weight, call.tensors[2])
    for name, grad in kernel_gradients(call, target.backend).items():
        assert torch.equal(grad.reshape(expected[name].shape), expected[name]), name


def test_expanded_gradient(target: Target) -> None:
    call = build(NormCase(rows=6, d=65))
    for dy in (torch.ones(()).expand(6, 65), torch.randn(65).expand(6, 65)):
        call.grads = (dy,)
        found = kernel_gradients(call, target.backend)
        call.grads = (dy.contiguous(),)
        for name, grad in kernel_gradients(call, target.backend).items():
            assert_bitwise_equal(found[name], grad, name)


@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_nan_and_infinity_stay_in_their_row(op: str, target: Target) -> None:
    call = build(NormCase(op, rows=5, d=67))
    clean = kernel_gradients(call, target.backend)
    x = call.tensors[0]
    assert x is not None
    x[1, 66], x[3, 0] = float("nan"), float("inf")
    spoilt = kernel_gradients(call, target.backend)
    assert_bitwise_equal(spoilt["x"][::2], clean["x"][::2], "the other rows")
    assert spoilt["x"][1].isnan().all() and spoilt["x"][3].isnan().any()
    assert spoilt["weight"].isnan().any()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_what_is_dropped_is_gone(dtype: str, target: Target) -> None:
    """A NaN that is dropped is 0, forward and backward, as in the formula."""
    call = build(NormCase(dtype=dtype, rows=4, d=67, residual="own", prenorm=True, dropout=0.5))
    (_, z), x = results(call, target.backend), call.tensors[0]
    assert x is not None
    dropped = z == call.options["residual"]
    assert 0.3 < dropped.double().mean().item() < 0.7
    expected = kernel_gradients(call, target.backend)
    before = results(call, target.backend)
    x[dropped] = float("nan")
    for a, b in zip(results(call, target.backend), before, strict=True):
        assert_bitwise_equal(a, b, "result")
    found = kernel_gradients(call, target.backend)
    for name, grad in expected.items():
        assert_bitwise_equal(found[name], grad, name)
    assert torch.equal(found["x"] == 0, dropped)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_same_mask_as_the_formula(op: str, dtype: str, target: Target) -> None:
    for d in (1, 3, 4, 5, 31, 65, 577):
        call = build(NormCase(op, dtype, 7, d, residual="own", prenorm=True, dropout=0.4))
        call.options["residual"] = torch.zeros_like(call.options["residual"])
        ours, eager = (results(call, backend)[1] for backend in (target.backend, "eager"))
        assert_bitwise_equal(ours, eager, f"z of {d}")


@pytest.mark.parametrize("dtype", HALF)
def test_results_have_the_dtypes_of_the_formula(dtype: str, target: Target) -> None:
    for op in OPS:
        for weight in ("own", "f32"):
            call = build(NormCase(op, dtype, weight=weight, residual="f32", prenorm=True))
            kinds = [[y.dtype for y in results(call, b)] for b in (target.backend, "eager")]
            assert kinds[0] == kinds[1], (op, weight)


def test_constant_rows_have_finite_gradients(target: Target) -> None:
    for op in OPS:
        call = build(NormCase(op, rows=3, d=65))
        call.tensors = (torch.full((3, 65), 0.5), *call.tensors[1:])
        found, eager = kernel_gradients(call, target.backend), eager_gradients(call.double())
        assert all(grad.isfinite().all() for grad in found.values())
        if op != "layer_norm":  # there it is rounding, blown up by eps^-1/2
            check(found["x"], eager["x"], eager_gradients(call)["x"], op, "gradient")


# ---- through autograd -----------------------------------------------------------------------------


def calls(backend: str, p: float) -> dict[str, Callable[..., Any]]:
    def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            torch.manual_seed(1)  # each call draws its dropout from the default generator
            return function(*tensors)

        return call

    options: dict[str, Any] = {"dropout_p": p, "backend": backend}
    return {
        "layer_norm": seeded(lambda x, r, w, b: pyfuse.layer_norm(x, w, b, **options)),
        "post": seeded(lambda x, r, w, b: pyfuse.layer_norm(x, w, b, residual=r, **options)),
        "pre": seeded(
            lambda x, r, w, b: pyfuse.layer_norm(x, w, b, residual=r, prenorm=True, **options)
        ),
        "llama": seeded(
            lambda x, r, w, b: pyfuse.rms_norm(x, w, residual=r, prenorm=True, **options)
        ),
        "gemma": seeded(lambda x, r, w, b: pyfuse.rms_norm(x, w, casting="gemma", **options)),
        "bare": seeded(lambda x, r, w, b: pyfuse.rms_norm(x, **options)),
    }


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("name", calls("eager", 0.0))
def test_gradcheck(name: str, dtype: torch.dtype, p: float, target: Target) -> None:
    call = calls(target.backend, p)[name]
    point = [torch.randn(shape, dtype=dtype) for shape in ((3, 5), (3, 5), (5,), (5,))]
    for t in point:
        t.requires_grad_()
    torch.autograd.gradcheck(call, point)
    torch.autograd.gradgradcheck(call, point, fast_mode=True)


def test_autograd_takes_the_kernels(target: Target) -> None:
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    w = torch.randn(8, requires_grad=True)
    named = None if target.backend == "cpu" else target.backend  # tensors in memory are the CPU's
    options: dict[str, Any] = {"residual": residual, "prenorm": True, "dropout_p": 0.1}
    chosen = pyfuse.explain("layer_norm", x, w, **options, backend=named)
    assert chosen.chosen == target.backend and chosen.needs == ("residual", "weight", "x")
    y, z = pyfuse.layer_norm(x, w, residual=residual, prenorm=True, backend=target.backend)
    (y.sum() + z.square().sum()).backward()
    assert x.grad is not None and residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()  # one gradient for both, but not one memory
    assert residual.grad.abs().min() > 0


def test_dropout_in_training_repeats_with_the_seed(target: Target) -> None:
    x = torch.randn(16, 64, requires_grad=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        y = pyfuse.rms_norm(x, residual=x, dropout_p=0.5, backend=target.backend)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert_bitwise_equal(found[0], found[1], "dx")
