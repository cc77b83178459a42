"""pyfuse.ops.linear: each way of each product by the accuracy rule, gradients of any order, and who gets F.linear."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfuse.backends import cpu_matmul
from pyfuse.backends.cpu_matmul import KINDS, NARROW, WAYS, Choice, choose, multiply, operands
from pyfuse.ops import linear

OP = sys.modules["pyfuse.ops.linear"]
ABLE = cpu_matmul.ways()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All three products in this way, whatever their size; the products made are counted in MADE."""
    forced: str = request.param
    if forced not in ABLE:
        pytest.skip(f"{forced} cannot run in this build")
    monkeypatch.setattr(
        OP, "_deterministic", lambda: False
    )  # all tests are, for NaN in fresh memory
    monkeypatch.setattr(OP, "MIN_FLOPS", 1.0)
    monkeypatch.setattr(OP, "choose", lambda kind, rows, n, k: Choice(forced))
    MADE.clear()

    def counted(way: str, *arguments: Any) -> Tensor:
        MADE.append(way)
        return multiply(way, *arguments)

    monkeypatch.setattr(OP, "multiply", counted)
    yield forced


MADE: list[str] = []


def gradients(function: Any, inputs: list[Any], flow: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    found = torch.autograd.grad(y, [t for t in leaves if t is not None], flow.to(y.dtype))
    return y, list(found)


def checked(inputs: list[Any], flow: Tensor, name: str) -> None:
    """y, dx, dW and db of pyfuse against float64."""
    double = [None if t is None else t.double() for t in inputs]
    ours, exact, eager = (
        gradients(f, given, flow)
        for f, given in ((linear, inputs), (F.linear, double), (F.linear, inputs))
    )
    # Narrow products are torch's, whose error is smaller there (see NARROW); here they are forced.
    narrow = min(flow.numel() // flow.shape[-1], flow.shape[-1], inputs[0].shape[-1]) < NARROW
    numerics.check(ours[0], exact[0], eager[0], f"{name} y", random=narrow)
    for i, found in enumerate(ours[1]):
        shown = f"{name} gradient {i}"
        numerics.check(found, exact[1][i], eager[1][i], shown, "gradient", random=narrow)


SIZES = [(1, 1, 1), (3, 63, 65), (65, 111, 1), (197, 65, 111), (63, 3, 197), (2, 197, 1024)]
LONG = [(64, 96, 1537), (64, 1537, 96), (1537, 64, 96)]  # sums that oneDNN has to cut


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows,n,k", SIZES + LONG)
def test_every_way(way: str, rows: int, n: int, k: int, biased: bool) -> None:
    x, w = torch.randn(rows, k), torch.randn(n, k)
    checked([x, w, torch.randn(n) if biased else None], torch.randn(rows, n), way)
    if way != "torch":
        assert [way] * 3 == MADE


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows,n,k", SIZES + LONG)
def test_transposed_weight(way: str, rows: int, n: int, k: int, biased: bool) -> None:
    """A weight [K, N] as GPT-2's Conv1D has it; its gradient lies as it does."""
    x, w = torch.randn(rows, k), torch.randn(k, n).t()
    checked([x, w, torch.randn(n) if biased else None], torch.randn(rows, n), way)
    if way != "torch":
        assert [way] * 3 == MADE
    _, (dw,) = gradients(lambda w: linear(x, w), [w], torch.randn(rows, n))
    assert dw.t().is_contiguous()


def test_transposed_weight_is_calibrated_by_its_memory(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is made as the dx of a layer with that memory as its weight, dx as its y."""
    asked: list[tuple[Any, ...]] = []

    def choose(*shape: Any) -> Choice:
        asked.append(shape)
        return Choice(way)

    monkeypatch.setattr(OP, "choose", choose)
    gradients(linear, [torch.randn(9, 33), torch.randn(33, 65).t()], torch.randn(9, 65))
    assert set(asked) == {(kind, 9, 33, 65) for kind in ("forward", "input", "weight")}


@pytest.mark.parametrize("rows,n,k", LONG)
def test_onednn_in_one_piece_would_break_the_rule(
    rows: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the parts: if this fails, oneDNN sums better than it did, and they can go."""
    if "onednn" not in ABLE:
        pytest.skip("torch has no oneDNN here")
    a, b = operands("forward", torch.randn(64, 4096), torch.randn(300, 4096), torch.empty(0, 0))
    exact, eager = a.double() @ b.double().t(), a @ b.t()
    numerics.check(multiply("onednn", a, b), exact, eager, "in parts")
    monkeypatch.setattr(cpu_matmul, "MOST_SUMMED", 4096)
    whole = multiply("onednn", a, b)
    if torch.equal(eager, whole):
        pytest.skip("torch itself takes oneDNN here")
    with pytest.raises(AssertionError, match="error"):
        numerics.check(whole, exact, eager, "whole")


@pytest.mark.parametrize("shape", [(111,), (3, 111), (2, 3, 111), (2, 1, 3, 111)])
def test_leading_dimensions(way: str, shape: tuple[int, ...]) -> None:
    x, w, b = torch.randn(shape), torch.randn(65, 111), torch.randn(65)
    checked([x, w, b], torch.randn(*shape[:-1], 65), way)


def test_strides(way: str) -> None:
    """Of x, weight, bias and the gradient that arrives."""
    w, b = torch.randn(65, 111), torch.randn(65)
    flow = torch.randn(6, 65)
    wide = torch.randn(12, 222)
    for x in (
        wide[::2, 111:],
        wide[:6, ::2],
        torch.randn(111, 6).t(),
        torch.randn(111).expand(6, 111),
    ):
        exact = F.linear(x.double(), w.double(), b.double())
        numerics.check(linear(x, w, b), exact, F.linear(x, w, b), "strided x")
    x = torch.randn(6, 111)
    for strided in (
        torch.randn(111, 65).t(),
        torch.randn(65, 222)[:, ::2],
        torch.randn(130, 222)[:65, :111],
    ):
        exact = F.linear(x.double(), strided.double(), b.double())
        numerics.check(linear(x, strided, b), exact, F.linear(x, strided, b), "strided weight")
    strided = torch.randn(65, 2)[:, 1]
    exact = F.linear(x.double(), w.double(), strided.double())
    numerics.check(linear(x, w, strided), exact, F.linear(x, w, strided), "strided bias")
    for g in (torch.randn(65, 6).t(), torch.randn(6, 130)[:, ::2], torch.randn(65).expand(6, 65)):
        checked([x, w, b], g, "strided gradient")
    checked([torch.randn(3, 6, 111).transpose(0, 1), w, b], flow[:, None].expand(6, 3, 65), "both")


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_any_subset_of_gradients(way: str, needs: tuple[int, int, int]) -> None:
    inputs = [torch.randn(7, 33), torch.randn(65, 33), torch.randn(65)]
    for t, need in zip(inputs, needs, strict=True):
        t.requires_grad_(bool(need))
    y = linear(*inputs)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    flow = torch.randn(y.shape)
    _, every = gradients(linear, inputs, flow)
    found = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], flow)
    for i, expected in enumerate(t for t, need in zip(every, needs, strict=True) if need):
        numerics.assert_bitwise_equal(found[i], expected, f"gradient {i} of {needs}")
    with torch.no_grad():
        assert not linear(*inputs).requires_grad


@pytest.mark.parametrize(
    "shape", [((0, 5), (4, 5)), ((3, 0), (4, 0)), ((3, 5), (0, 5)), ((2, 0, 5), (4, 5))]
)
def test_empty(way: str, shape: Any) -> None:
    x, w = (torch.randn(s, requires_grad=True) for s in shape)
    b = torch.randn(w.shape[0], requires_grad=True)
    y, expected = linear(x, w, b), F.linear(x, w, b)
    assert torch.equal(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, w, b)),
        torch.autograd.grad(expected.sum(), (x, w, b)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_second_derivatives(way: str) -> None:
    inputs = [torch.randn(3, 7), torch.randn(5, 7), torch.randn(5)]

    def second(function: Any, given: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in given]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))  # type: ignore[arg-type]

    exact = second(F.linear, [t.double() for t in inputs])
    eager = second(F.linear, inputs)
    for i, found in enumerate(second(linear, inputs)):
        numerics.check(found, exact[i], eager[i], f"second derivative {i}", "gradient", random=True)


def test_gradients_in_float64() -> None:
    inputs = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,))
    ]
    assert torch.autograd.gradcheck(linear, inputs, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, inputs)
    by_function = lambda *t: OP._Linear.apply(OP._STOCK, *t)  # noqa: E731
    assert torch.autograd.gradcheck(by_function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(by_function, inputs)


def test_batched_gradients(way: str) -> None:
    x, w = torch.randn(3, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    flows = torch.randn(4, 3, 5)
    y = linear(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), flows, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        one = torch.autograd.grad(y, (x, w), flows[i], retain_graph=True)
        torch.testing.assert_close((dx[i], dw[i]), one)


def test_results_can_be_written_to_and_saved_tensors_are_watched(way: str) -> None:
    x, w = torch.randn(2, 3, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    y = linear(x, w)
    y += 1.0
    y[0].mul_(2.0)
    y.sum().backward()
    y = linear(x, w)
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_what_the_backward_pass_needs_is_kept(way: str) -> None:
    """A frozen weight needs no x: a layer that is not trained holds no activations."""
    x, w = torch.randn(3, 7), torch.randn(5, 7)
    for needs_x, needs_w in ((True, False), (False, True), (True, True)):
        kept: list[Tensor] = []
        leaves = x.clone().requires_grad_(needs_x), w.clone().requires_grad_(needs_w)

        def keep(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            linear(*leaves)
        kept_shapes = {tuple(t.shape) if t.shape != (7, 5) else (5, 7) for t in kept}
        assert ((3, 7) in kept_shapes) == needs_w and ((5, 7) in kept_shapes) == needs_x


def test_the_same_inputs_give_the_same_bits(way: str) -> None:
    inputs = [torch.randn(65, 333), torch.randn(77, 333), torch.randn(77)]
    flow = torch.randn(65, 77)
    y, found = gradients(linear, inputs, flow)
    again, twice = gradients(linear, inputs, flow)
    for a, b in zip((y, *found), (again, *twice), strict=True):
        numerics.assert_bitwise_equal(a, b, "again")


def test_torch_itself_where_the_ways_do_not_apply(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit F.linear's result, and none of the products is pyfuse's."""

    def same(*inputs: Tensor) -> None:
        numerics.assert_bitwise_equal(linear(*inputs), F.linear(*inputs), "F.linear")
        assert not MADE, f"took {MADE}"

    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        same(torch.randn(9, 33).to(dtype), torch.randn(65, 33).to(dtype))
    x, w, b = torch.randn(9, 33), torch.randn(65, 33), torch.randn(65)
    same(x, torch.randn(65, 66)[:, ::2], b)
    with monkeypatch.context() as patch:
        patch.setattr(OP, "_deterministic", torch.are_deterministic_algorithms_enabled)
        assert torch.are_deterministic_algorithms_enabled()
        same(x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        same(x, w, b)
        assert linear(x, w.double().float(), b).dtype == torch.bfloat16
    batch = torch.randn(4, 9, 33)
    torch.testing.assert_close(torch.func.vmap(linear, (0, None))(batch, w), F.linear(batch, w))
    grad = torch.func.grad(lambda w: linear(x, w, b).square().sum())(w)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: F.linear(x, w, b).square().sum())(w))
    _, tangent = torch.func.jvp(lambda w: linear(x, w), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, F.linear(x, torch.ones_like(w)))
    assert linear(x.to("meta"), w.to("meta")).shape == (9, 65)
    assert not MADE
    linear(x, w, b)
    assert [way] * (way != "torch") == MADE, "and these tensors would have taken it"


def test_subclasses_modes_and_fakes(way: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Subclass(Tensor):
        pass

    x, w = torch.randn(9, 33), torch.randn(65, 33)
    assert type(linear(x.as_subclass(Subclass), w)) is Subclass
    with FakeTensorMode() as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(w)).shape == (9, 65)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(linear(x, w), F.linear(x, w))
    assert not MADE


def test_compiled_and_exported(way: str) -> None:
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((9, 33), (65, 33), (65,)))
    compiled = torch.compile(lambda *t: linear(*t), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, w, b).square().sum(), (x, w, b))
    for ours, theirs in zip(
        found, torch.autograd.grad(F.linear(x, w, b).square().sum(), (x, w, b)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return linear(x, w)

    for strict in (False, True):
        program = torch.export.export(Module(), (x.detach(), w.detach()), strict=strict)
        assert torch.equal(program.module()(x.detach(), w.detach()), F.linear(x, w))
    assert not MADE


def test_errors_name_the_argument() -> None:
    x, w = torch.randn(2, 5), torch.randn(4, 5)
    for arguments, error, message in (
        ((x, torch.randn(4, 6)), ValueError, "weight: K is 6, but x has K = 5"),
        ((x, w, torch.randn(3)), ValueError, "bias: N is 3, but weight has N = 4"),
        ((x, torch.randn(5)), ValueError, "weight: expected 2 dimensions"),
        ((torch.tensor(1.0), w), ValueError, "x: expected at least 1 dimension"),
        ((x, w.double()), TypeError, "weight: dtype torch.float64"),
        ((x, w, torch.randn(4).bfloat16()), TypeError, "bias: dtype torch.bfloat16"),
        ((x, w.to("meta")), ValueError, "weight: on meta"),
        (([1.0], w), TypeError, "x: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            linear(*arguments)  # type: ignore[arg-type]


def test_choices_are_measured_once_and_told() -> None:
    generator = torch.get_rng_state()
    choices = OP.linear_choices(100, 200, 300)
    assert torch.equal(torch.get_rng_state(), generator), "it drew from the user's generator"
    assert tuple(choices) == KINDS
    for choice in choices.values():
        times = dict(choice.milliseconds)
        assert tuple(times) == ABLE and all(ms > 0 for ms in times.values())
        assert choice.measured == (128, 200, 300)
        assert choice.way == "torch" or times[choice.way] < times["torch"]
        assert f"torch {times['torch']:.3g} ms" in str(choice)
    assert OP.linear_choices(128, 200, 300) == choices
    small = OP.linear_choices(1, 20, 30)["forward"]
    assert small.way == "torch" and "too small" in str(small)
    with pytest.raises(ValueError, match="rows: expected at least 0, got -1"):
        OP.linear_choices(-1, 2, 3)


def test_choices_can_be_remembered_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def calibrate(*shape: Any) -> Choice:
        measured.append(shape)
        return Choice("torch")

    monkeypatch.setattr(cpu_matmul, "_calibrate", calibrate)
    monkeypatch.setattr(cpu_matmul, "ways", lambda: ("torch", "onednn"))
    known: dict[Any, Any] = {}
    with cpu_matmul.remembering(known):
        for _ in range(2):
            assert cpu_matmul.choose("forward", 128, 256, 256).way == "torch"
        assert len(measured) == 1 and len(known) == 1
        (key,) = known
        known[key] = "onednn"
        assert cpu_matmul.choose("forward", 128, 256, 256).way == "onednn"
        monkeypatch.setattr(cpu_matmul, "ways", lambda: ("torch",))  # it cannot run any more
        assert cpu_matmul.choose("forward", 128, 256, 256).way == "torch"
    assert len(measured) == 2
    cpu_matmul.choose("forward", 128, 256, 256)
    assert len(measured) == 3, "what was remembered is not known outside"


def test_narrow_products_are_torchs() -> None:
    """Where torch sums more exactly than the others: their error would break the accuracy rule."""
    for kind, narrow in (
        ("forward", [(15, 4096, 4096), (4096, 15, 4096)]),
        ("input", [(15, 4096, 4096), (4096, 4096, 15)]),
        ("weight", [(4096, 15, 4096), (4096, 4096, 15)]),
    ):
        for shape in narrow:
            assert choose(kind, *shape) == Choice("torch")


def test_large_products_are_measured_on_smaller_ones() -> None:
    for shape in ((4096, 49152, 576), (1, 49152, 576), (7, 10**6, 10**4)):
        sides = cpu_matmul._stand_in(*shape)
        assert 2.0 * sides[0] * sides[1] * sides[2] <= cpu_matmul.MAX_FLOPS
        assert sides[0] <= max(1, 2 * shape[0])
    assert cpu_matmul._stand_in(65, 100, 100) == (128, 100, 100)
    assert choose("forward", 0, 5, 5).way == "torch"


def test_onednn_may_be_switched_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        choice = choose("forward", 64, 256, 256)
    assert "onednn" not in dict(choice.milliseconds) and choice.measured is not None
