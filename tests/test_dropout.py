"""Dropout with an activation: every kernel against eager, its gradient, its draw, choice and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import laid_out
from conftest import Target, at_threads
from numerics import assert_bitwise_equal, check
from oracle import philox_word
from torch import Tensor

import pyfuse
from pyfuse import autograd, dispatch
from pyfuse.activations import FORMULA
from pyfuse.backends import eager_dropout

pytestmark = [
    pytest.mark.emulated(sm_80=1, sm_90=6, sm_89=48, sm_120=48),
    pytest.mark.backends("cpu", "triton"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = [None, *FORMULA]
SEED = torch.tensor([2**35 + 11, 5])


def options_of(p: float, activation: str | None) -> dict[str, Any]:
    return {"dropout_p": p, "dropout_seed": SEED if p > 0.0 else None, "activation": activation}


def run(x: Tensor, dy: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """(y, dx) by the kernels of a backend."""
    needs = frozenset({"x"})
    impl = dispatch.choose("dropout", (x,), options, backend, dispatch.Demand(needs))
    assert impl.gradient is not None
    leaf = x.detach().requires_grad_()
    y = autograd.run("dropout", impl.gradient, needs, (leaf,), options)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx


def by_formula(x: Tensor, dy: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = eager_dropout.dropout(leaf, **options)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx


def check_call(x: Tensor, dy: Tensor, target: Target, p: float, activation: str | None) -> None:
    name = f"{activation}, p {p}, {tuple(x.shape)}"
    options = options_of(p, activation)
    y, dx = run(x, dy, target.backend, **options)
    eager = by_formula(x, dy, **options)
    exact = by_formula(x.double(), dy.double(), **options)
    check(y, exact[0], eager[0], name)
    check(dx, exact[1], eager[1], f"dx, {name}", "gradient")
    if activation in (None, "relu"):  # the others may underflow
        assert torch.equal(y == 0.0, eager[0] == 0.0), name
    assert y.stride() == torch.empty_like(x).stride(), name
    assert dx.stride() == torch.empty_like(dy).stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel(activation: str | None, dtype: torch.dtype, target: Target) -> None:
    for shape in ((1,), (3, 3), (2, 5, 63), (65, 111), (3, 197), (7, 2 * 1024 + 8)):
        x, dy = (3.0 * torch.randn(2, *shape)).to(dtype)
        for p in (0.0, 0.1, 0.6):
            check_call(x, dy, target, p, activation)


@pytest.mark.parametrize("memory", ["BHMD", "BMHD", "MBHD", "slice"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_memory_order(activation: str | None, memory: str, target: Target) -> None:
    x = laid_out(torch.randn(2, 3, 33, 20), memory)
    check_call(x, torch.randn(2, 3, 33, 20), target, 0.3, activation)
    check_call(torch.randn(20, 9).t(), torch.randn(9, 20), target, 0.3, activation)
    wide = torch.randn(5, 1).expand(5, 40)
    check_call(wide, torch.ones(()).expand(5, 40), target, 0.3, activation)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_threads_and_size_change_no_bit(activation: str | None, target: Target) -> None:
    """A tensor that passes by the caches, and a row of many pieces."""
    for rows, d in ((2100, 1024), (1, 100_003)) if target.backend == "cpu" else ((40, 640),):
        x, dy = torch.randn(2, rows, d)
        options = options_of(0.2, activation)
        found = [run(x, dy, target.backend, **options) for _ in at_threads(1, 2, 4)]
        for other in found[1:]:
            for a, b in zip(other, found[0], strict=True):
                assert_bitwise_equal(a, b, f"{rows}x{d}")
        some = run(x[:3, :64].contiguous(), dy[:3, :64].contiguous(), target.backend, **options)
        for a, b in zip(some, found[0], strict=True):
            assert_bitwise_equal(a, b[:3, :64], f"the first of {rows}x{d}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_and_nan(activation: str | None, target: Target) -> None:
    x = torch.tensor([[-300.0, -90.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 90.0, 300.0, float("nan")]])
    dy = torch.ones_like(x)
    y, dx = run(x, dy, target.backend, **options_of(0.0, activation))
    wanted = by_formula(x.double(), dy.double(), **options_of(0.0, activation))
    for actual, exact in zip((y, dx), wanted, strict=True):
        torch.testing.assert_close(actual.double(), exact, equal_nan=True, rtol=3e-6, atol=3e-6)


def test_which_elements_are_dropped(target: Target) -> None:
    y, dx = run(torch.ones(2, 3, 5), torch.ones(2, 3, 5), target.backend, **options_of(0.3, None))
    threshold = -(-3 * 2**24 // 10)  # ceil(0.3 · 2^24)
    key = tuple(int(word) & 0xFFFFFFFF for word in SEED)
    for row in range(6):
        for column in range(5):
            kept = philox_word((0, 0, row, column), key) >> 8 >= threshold
            for t in (y, dx):
                value = t.view(6, 5)[row, column].item()
                assert value == pytest.approx(1 / 0.7 if kept else 0.0)


def test_what_is_dropped_is_zero_even_if_it_is_not_finite(target: Target) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.full((4, 64), bad)
        kept = by_formula(torch.ones(4, 64), torch.ones(4, 64), **options_of(0.5, None))[0] > 0
        y, _ = run(x, torch.ones(4, 64), target.backend, **options_of(0.5, None))
        assert torch.equal(y == 0, ~kept)
        _, dx = run(torch.ones(4, 64), x, target.backend, **options_of(0.5, "relu"))
        assert torch.equal(dx == 0, ~kept)


# ---- the call -----------------------------------------------------------------------------------


def test_draws_from_the_default_generator() -> None:
    x = torch.ones(64, 128)
    torch.manual_seed(1)
    first, second = pyfuse.dropout(x, 0.25), pyfuse.dropout(x, 0.25)
    torch.manual_seed(1)
    assert torch.equal(pyfuse.dropout(x, 0.25), first) and not torch.equal(first, second)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (first == 0.0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_no_dropout_draws_nothing() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x = torch.randn(3, 5)
    torch.set_rng_state(before)
    assert torch.equal(pyfuse.dropout(x, 0.0), x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compiled_is_one_graph(activation: str | None, p: float) -> None:
    def function(x: Tensor) -> Tensor:
        return pyfuse.dropout(x, p, activation=activation) + 1.0

    x = torch.randn(3, 8)
    torch.manual_seed(3)
    y = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    torch.manual_seed(3)
    assert_bitwise_equal(y, function(x), "compiled")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation: str | None) -> None:
    x = torch.randn(3, 5, dtype=torch.float64).sub(0.1).requires_grad_()

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return pyfuse.dropout(x, 0.4, activation=activation)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_what_is_kept_for_the_backward_pass() -> None:
    """Beside the seed: nothing, y, or x. No mask in any case."""
    x = torch.randn(64, 128, requires_grad=True)
    for activation in ACTIVATIONS:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):  # type: ignore[arg-type]
            y = pyfuse.dropout(x, 0.5, activation=activation)
        large = {t.data_ptr() for t in kept if t.untyped_storage().nbytes() > 64}
        expected = {None: set(), "relu": {y.data_ptr()}}.get(activation, {x.data_ptr()})
        assert large == expected, activation


def test_a_result_that_is_written_to_has_no_gradient_any_more() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = pyfuse.dropout(x, 0.5, activation="relu")
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_empty() -> None:
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3)):
        x = torch.randn(shape, requires_grad=True)
        y = pyfuse.dropout(x, 0.5, activation="gelu")
        y.sum().backward()
        assert x.grad is not None and y.shape == x.grad.shape == x.shape


def test_explain() -> None:
    x = torch.randn(3, 4)
    assert pyfuse.explain(pyfuse.dropout, x, 0.5, activation="relu").chosen == "cpu"
    with pytest.raises(NotImplementedError, match="no backend can run dropout:\n  cuda: "):
        pyfuse.dropout(x, backend="cuda")


@pytest.mark.parametrize(
    "error, text, arguments",
    [
        (TypeError, "x: expected a floating-point tensor", {"x": torch.ones(3, dtype=torch.int32)}),
        (ValueError, r"x: expected \[..., D\]", {"x": torch.ones(())}),
        (ValueError, "p: expected 0 <= p < 1, got 1.0", {"p": 1.0}),
        (ValueError, "p: expected 0 <= p < 1, got -0.5", {"p": -0.5}),
        (ValueError, "p: expected 0 <= p < 1, got nan", {"p": float("nan")}),
        (ValueError, "activation: got 'tanh', needs None or one of gelu", {"activation": "tanh"}),
        (ValueError, "backend: got 'gpu'", {"backend": "gpu"}),
    ],
)
def test_errors(error: type[Exception], text: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        pyfuse.dropout(**{"x": torch.ones(2, 3)} | arguments)


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("d", [1000, 4096])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, "gfx90a", "gfx942"])
def test_nothing_spills(arch: Any, d: int) -> None:
    """Forward and backward, with all that there is to compute."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from launches import record

    from pyfuse.backends.triton_dropout import DROPOUT

    assert DROPOUT.gradient is not None
    gradient, x = DROPOUT.gradient, torch.zeros(4, d, dtype=torch.bfloat16)
    options = options_of(0.1, "gelu_tanh")
    launches = record(arch, lambda: gradient.forward(x, **options))
    launches += record(arch, lambda: gradient.backward((x,), (x,), options, (), frozenset("x")))
    assert len(launches) == 2
    for launch in launches:
        code = launch.compiled(arch).code
        assert code.in_registers, (code.name, code.registers)
