"""Autograd over gradient kernels: who runs them, what they are given, and what torch may do with the graph."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from recorder import Recorder, only_backends
from test_eager_attention import close
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transform_cases import CASES, Case, by_formula, gradients, leaves, total

import pyfuse
from pyfuse import dispatch
from pyfuse.dispatch import Gradient, Impl

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def recorder() -> Any:
    recorder = Recorder()
    with only_backends(recorder=recorder):
        yield recorder


def qkv() -> list[Tensor]:
    return leaves([torch.randn(2, 3, 2, 4, dtype=torch.float64).transpose(1, 2) for _ in "qkv"])


# --- derivatives


@every_case
def test_gradients(case: Case, one_seed: None, backends: Recorder | None) -> None:
    function, point = case.split()
    _, expected = by_formula(case)
    close(gradients(function, point), expected)
    if backends is not None:
        assert backends.calls == [f"{case.op} forward", f"{case.op} backward"]


@every_case
def test_gradcheck(case: Case, one_seed: None, recorder: Recorder) -> None:
    function, point = case.split(3)
    torch.autograd.gradcheck(
        function, leaves(point), check_forward_ad=True, fast_mode=True, check_batched_grad=True
    )
    assert f"{case.op} backward" in recorder.calls


@every_case
def test_gradgradcheck(case: Case, one_seed: None, recorder: Recorder) -> None:
    function, point = case.split(3)
    torch.autograd.gradgradcheck(function, leaves(point), fast_mode=True)
    assert f"{case.op} backward" not in recorder.calls, "second derivatives go through the formula"


def test_one_tensor_given_twice(recorder: Recorder) -> None:
    """Each of its roles has a share of the gradient, of the first and of the second order."""
    (x,) = leaves([torch.randn(1, 2, 3, 4, dtype=torch.float64)])
    torch.autograd.gradcheck(lambda x: pyfuse.attention(x, x, x), (x,))
    torch.autograd.gradgradcheck(lambda x: pyfuse.attention(x, x, x), (x,))
    assert "attention backward" in recorder.calls


@every_case
def test_checkpoint_replays_dropout(case: Case, recorder: Recorder) -> None:
    function, point = case.split()
    torch.manual_seed(5)
    expected = gradients(function, point)
    torch.manual_seed(5)
    inputs = leaves(point)
    total(checkpoint(function, *inputs, use_reentrant=False)).backward()
    close(tuple(x.grad for x in inputs), expected)


# --- what the kernels are asked for


def test_only_the_wanted_gradients_are_computed() -> None:
    wanted: list[frozenset[str]] = []

    class Asked(Recorder):
        def _gradient(self, op: str) -> Gradient:
            gradient = super()._gradient(op)

            def backward(grads: Any, t: Any, o: Any, s: Any, needs: frozenset[str]) -> Any:
                wanted.append(needs)
                return gradient.backward(grads, t, o, s, needs)

            return gradient._replace(backward=backward)

    x, weight, residual = torch.randn(2, 6), torch.randn(6), torch.randn(2, 6)
    with only_backends(asked=Asked()):
        for leaf in (weight, residual):
            leaf.requires_grad_()
            pyfuse.rms_norm(x, weight, residual=residual).sum().backward()
    assert wanted == [{"weight"}, {"weight", "residual"}]
    assert x.grad is None and residual.grad is not None


def test_unused_results_give_no_gradient(recorder: Recorder) -> None:
    q, k, v = qkv()
    o, lse = pyfuse.attention(q, k, v, return_lse=True)
    found = torch.autograd.grad(lse.sum(), (q, v))
    by_eager = pyfuse.attention(q, k, v, return_lse=True, backend="eager")[1]
    close(found[0], torch.autograd.grad(by_eager.sum(), q)[0])
    assert not found[1].any() and o.requires_grad


def test_gradients_have_the_dtype_of_their_argument(recorder: Recorder) -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    pyfuse.rms_norm(x, weight, casting="torch").sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_nothing_is_recorded_where_no_gradient_is_wanted(recorder: Recorder) -> None:
    q, k, v = qkv()
    with torch.no_grad():
        assert not pyfuse.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert pyfuse.attention(q, k, v).is_inference()
    assert pyfuse.attention(*(x.detach() for x in (q, k, v))).grad_fn is None


# --- what torch may do with results and saved tensors


def test_results_may_be_written_to() -> None:
    """o is a view of its [B, M, H, Dv] memory, and still no view to autograd; but what is saved must stay."""
    point = qkv()
    for options in ({}, {"return_lse": True}):
        expected = torch.autograd.grad(
            _first(point, backend="eager", **options).mul(2).sum(), point
        )
        with only_backends(recorder=Recorder(saves=False)):
            written = _first(point, **options).mul_(2)
            close(torch.autograd.grad(written.sum(), point), expected)
        with only_backends(recorder=Recorder()):
            written = _first(point, **options).mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                written.sum().backward()


def _first(point: list[Tensor], **options: Any) -> Tensor:
    result = pyfuse.attention(*point, **options)
    return result if isinstance(result, Tensor) else result[0]


def test_a_changed_argument_is_noticed(recorder: Recorder) -> None:
    q, k, v = qkv()
    hidden = k * 1
    loss = pyfuse.attention(q, hidden, v).sum()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensors_pass_through_hooks(recorder: Recorder) -> None:
    point = qkv()
    expected = torch.autograd.grad(pyfuse.attention(*point).sum(), point)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i].clone()):
        o = pyfuse.attention(*point)
    assert len(packed) == 4, "q, k, v, and what the kernel saves"
    close(torch.autograd.grad(o.sum(), point), expected)


def test_the_graph_dies_with_its_result(recorder: Recorder) -> None:
    """The node keeps o; were it not as an output, o would keep itself alive."""
    point = qkv()
    o = pyfuse.attention(*point)
    alive = weakref.ref(o)
    gc.disable()
    try:
        del o
        assert alive() is None
    finally:
        gc.enable()


def test_second_backward_needs_retain_graph(recorder: Recorder) -> None:
    q, k, v = qkv()
    loss = pyfuse.attention(q, k, v).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_rope_in_place_is_refused_where_a_gradient_is_wanted(recorder: Recorder) -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    table = torch.ones(3, 2)
    with pytest.raises(ValueError, match="inplace: True, but a gradient is asked for"):
        pyfuse.rope(x * 1, table, table, layout="half", inplace=True)
    with torch.no_grad():
        pyfuse.rope(x, table, table, layout="half", inplace=True)


# --- who runs


def test_kernels_that_object_are_passed_over(recorder: Recorder) -> None:
    q, k, v = qkv()
    assert pyfuse.explain("attention", q, k, v).chosen == "recorder"
    recorder.objection = "no gradient on Sundays"
    answer = pyfuse.explain("attention", q, k, v)
    assert str(answer).splitlines() == [
        "attention, with the gradient of k, q, v: eager",
        "  recorder: no gradient on Sundays",
        "  eager: runs",
    ]
    pyfuse.attention(q, k, v).sum().backward()
    assert recorder.calls == [] and q.grad is not None
    with pytest.raises(NotImplementedError, match="recorder: no gradient on Sundays"):
        pyfuse.attention(q, k, v, backend="recorder")
    with torch.no_grad():
        pyfuse.attention(q, k, v, backend="recorder")


def test_a_backend_without_gradient_kernels_says_so() -> None:
    class Values(Recorder):
        def _gradient(self, op: str) -> None:
            return None

    q, k, v = qkv()
    with only_backends(values=Values()):
        answer = pyfuse.explain("attention", q, k.detach(), v.detach())
        assert answer.chosen == "eager" and answer.needs == ("q",)
        assert answer.candidates[0].reason == "its kernels do not compute the gradient of q yet"
        with torch.no_grad():
            assert pyfuse.explain("attention", q, k, v).chosen == "values"


def test_transforms_are_explained(recorder: Recorder) -> None:
    q, k, v = (x.detach() for x in qkv())
    seen = []
    torch.vmap(lambda q: seen.append(pyfuse.explain("attention", q, k, v)) or q)(q[None])
    with torch.autograd.forward_ad.dual_level():
        seen.append(pyfuse.explain("attention", q, k, v))
    for answer, reason in zip(seen, ("a functorch transform", "forward-mode AD"), strict=True):
        assert answer.chosen == "eager"
        assert answer.candidates[0].reason == f"{reason} needs the differentiable formula"


def test_installed_gradient_kernels_keep_the_contract(one_seed: None) -> None:
    """Of every backend here: results as without gradient, one gradient for each name, of its argument's kind."""
    for name in [n for n, reason in dispatch.backend_status().items() if reason is None]:
        for case in CASES.values():
            impl: Impl | None = dispatch.load(name).OPS.get(case.op)
            if impl is not None and impl.gradient is not None:
                _check_contract(case, impl, impl.gradient)


def _check_contract(case: Case, impl: Impl, gradient: Gradient) -> None:
    caught: list[tuple[Any, Any]] = []
    function, point = case.split(dtype=torch.float32)

    def catch(op: str, tensors: Any, options: Any, backend: Any) -> Any:
        caught.append((tensors, options))
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run", catch)
        function(*point)
    ((tensors, options),) = caught
    needs = frozenset(case.needs())
    named = dict(zip(dispatch.tensor_names(case.op), tensors, strict=False)) | options
    if impl.why_not(*tensors, **options) or gradient.why_not(needs, *tensors, **options):
        return
    plain = impl.fn(*tensors, **options)
    result, saved = gradient.forward(*tensors, **options)
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    grads = tuple(map(torch.ones_like, results))
    kept = tensors if gradient.keep is None else gradient.keep(result, tensors, options)
    for given, t in zip(tensors, kept, strict=True):
        assert t is given or (t.shape, t.dtype) == (given.shape, given.dtype)
    found = gradient.backward(grads, kept, options, saved, needs)
    assert found.keys() >= needs
    for name in needs:
        assert (found[name].shape, found[name].dtype) == (named[name].shape, named[name].dtype)
    if gradient.restore is not None:
        if "return_lse" in options and not options["return_lse"]:
            results = tuple(impl.fn(*tensors, **{**options, "return_lse": True}))
        again = gradient.restore(results, tensors, options)
        restored = gradient.backward(grads, kept, options, again, needs)
        torch.testing.assert_close(restored, found)
