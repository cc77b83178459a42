"""pyfuse.ops.linear_cross_entropy: torch's cross-entropy of F.linear, in chunks that never hold all logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numerics
import pytest
import torch
from loss_cases import (
    ALL,
    OPTIONS,
    REDUCTIONS,
    F_cross_entropy,
    Ops,
    checked,
    gradients,
    make,
    reference,
)
from torch import Tensor

import pyfuse
from pyfuse.backends import chunked_loss, cpu_matmul, torch_loss
from pyfuse.backends.chunked_loss import Sizes
from pyfuse.backends.cpu_matmul import WAYS, Choice
from pyfuse.ops import _loss_chunks, linear_cross_entropy

LINEAR = sys.modules["pyfuse.ops.linear"]
LOSS = sys.modules["pyfuse.ops._loss"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens, and blocks of 7 rows of dW."""
    monkeypatch.setattr(torch_loss, "sizes", lambda vocabulary, k, dtype: Sizes(5, 7))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All products of the chunks in this way."""
    if request.param not in cpu_matmul.ways():
        pytest.skip(f"{request.param} cannot run in this build")
    monkeypatch.setattr(LINEAR, "_deterministic", lambda: False)
    monkeypatch.setattr(_loss_chunks, "choose", lambda kind, rows, n, k: Choice(request.param))
    made: list[str] = []
    real = cpu_matmul.multiply

    def counted(way: str, *arguments: Any, **options: Any) -> Tensor:
        made.append(way)
        return real(way, *arguments, **options)

    monkeypatch.setattr(chunked_loss, "multiply", counted)
    yield request.param
    assert made and set(made) == {request.param}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("tokens,v,k", [(1, 3, 1), (63, 65, 111), (197, 2, 3), (65, 197, 63)])
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients(
    tokens: int, v: int, k: int, options: dict[str, Any], reduction: str
) -> None:
    given = make(tokens, v, k, biased=tokens != 65)
    flow = torch.randn(tokens) if reduction == "none" else torch.tensor(1.7)
    checked(given, "chunks", flow, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_dtypes(dtype: torch.dtype, reduction: str) -> None:
    given = make(63, 111, 65, dtype)
    checked(given, "all options", None, reduction=reduction, **ALL)
    checked(given, "plain", None, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_every_way(way: str, reduction: str) -> None:
    given = make(64, 197, 111)
    exact, eager, ours = (
        gradients(f, tuple(g), None, {"reduction": reduction, **ALL})  # type: ignore[arg-type]
        for f, g in (
            (reference, [t.double() if t.is_floating_point() else t for t in given]),  # type: ignore[union-attr]
            (reference, given),
            (linear_cross_entropy, given),
        )
    )
    # Chunks of 5 tokens are narrower than these ways are meant for.
    for name, *found in zip(("loss", "dx", "dW", "db"), ours, exact, eager, strict=True):
        numerics.check(*found, f"{way} {name}", "gradient", random=True)


def test_chunks_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(11, 13, 7, torch.float64)
    whole = gradients(linear_cross_entropy, given, None, ALL)
    for rows in (1, 2, 10, 11, 12):
        monkeypatch.setattr(torch_loss, "sizes", lambda v, k, dtype, rows=rows: Sizes(rows, 7))
        for a, b in zip(gradients(linear_cross_entropy, given, None, ALL), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_chunks_fit_their_memory() -> None:
    for v in (1, 1000, 49152, 262144, 10**9):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            size = 8 if dtype == torch.float64 else 4
            rows = torch_loss.sizes(v, 64, dtype).rows
            assert rows == 1 or rows * v * size <= torch_loss.CHUNK_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a chunk of logits, in the forward pass or in the backward pass."""
    tokens, v, k = 512, 1024, 8
    monkeypatch.setattr(torch_loss, "CHUNK_BYTES", 64 * v * 4)
    # A dispatch mode would send the call to the formula.
    monkeypatch.setattr(sys.modules["pyfuse.ops.linear_cross_entropy"], "plain", lambda t: True)
    monkeypatch.setattr(LOSS, "plain", lambda t: True)
    x, w, target, b = make(tokens, v, k, dtype)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    with Ops() as ours:
        loss = linear_cross_entropy(x, w, target, b, reduction=reduction, **ALL)
        found = torch.autograd.grad(loss.sum(), leaves)
    assert ours.bytes == 64 * v * 4
    with Ops() as formula:
        reference(x, w, target, b, reduction=reduction, **ALL)
    assert formula.bytes >= tokens * v * dtype.itemsize, "the measurement sees nothing"
    assert all(g.abs().sum() > 0 for g in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(options: dict[str, Any], reduction: str) -> None:
    x, w, target, b = make(7, 5, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, target, b, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@pytest.mark.usefixtures("small_chunks")
def test_any_subset_of_gradients(needs: tuple[int, int, int], reduction: str) -> None:
    x, w, target, b = given = make(13, 11, 7)
    every = gradients(linear_cross_entropy, given, None, {"reduction": reduction})[1:]
    leaves = [
        t.requires_grad_(bool(n)) for t, n in zip((x, w, b), needs, strict=True) if t is not None
    ]
    loss = linear_cross_entropy(x, w, target, b, reduction=reduction)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.sum().backward()
    for leaf, need, expected in zip(leaves, needs, every, strict=True):
        assert (leaf.grad is not None) == bool(need)
        if leaf.grad is not None:
            numerics.assert_bitwise_equal(leaf.grad, expected, str(needs))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_pass_gives_the_same(reduction: str) -> None:
    x, w, target, b = make(13, 11, 7)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, target, b, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    half = torch.autograd.grad(loss, (x, w), torch.tensor(1.5))
    for a, b, c in zip(first, again, half, strict=True):
        numerics.assert_bitwise_equal(a, b, "again")
        torch.testing.assert_close(a, 2 * c)
    with torch.no_grad():
        w.add_(1.0)
    loss = linear_cross_entropy(x, w, target).sum()
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("small_chunks")
def test_ignored_tokens_are_never_read() -> None:
    x, w, target, b = make(23, 11, 7)
    ignored = target == -100
    assert 0 < ignored.sum() < 23
    dirty = x.clone()
    dirty[ignored] = float("nan")
    clean = gradients(linear_cross_entropy, (x, w, target, b), None, ALL)
    for a, b_ in zip(
        gradients(linear_cross_entropy, (dirty, w, target, b), None, ALL), clean, strict=True
    ):
        numerics.assert_bitwise_equal(a, b_, "NaN in ignored tokens")
    assert not clean[1][ignored].any()
    losses = linear_cross_entropy(dirty, w, target, b, reduction="none")
    assert not losses[ignored].any() and losses.isfinite().all()
    renamed = target.masked_fill(ignored, 5)  # another index, which is a word as well
    checked((x, w, renamed, b), "ignore_index 5", ignore_index=5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 4], ids=["no token", "all ignored"])
@pytest.mark.parametrize("backend", [None, "cpu", "eager"])
def test_nothing_to_learn_from(backend: str | None, tokens: int, reduction: str) -> None:
    x, w = torch.randn(tokens, 5), torch.randn(3, 5)
    given = (x, w, torch.full((tokens,), -100), torch.randn(3))
    options = {"reduction": reduction, "z_loss": 0.1}
    ours = gradients(
        lambda *a, **o: linear_cross_entropy(*a, backend=backend, **o), given, None, options
    )
    expected = gradients(F_cross_entropy, given, None, {"reduction": reduction})
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and a.shape == b.shape
    assert ours[0].isnan().all() == (reduction == "mean" or (tokens == 0 and reduction == "none"))


def test_sizes_of_zero_and_tensors_without_memory() -> None:
    target = torch.tensor([0, 2])
    x, w, b = torch.randn(2, 0), torch.randn(3, 0), torch.randn(3)
    checked((x, w, target, b), "K 0")
    with pytest.raises(IndexError):
        linear_cross_entropy(torch.randn(2, 5), torch.randn(0, 5), target)
    x, w = torch.randn(2, 5, device="meta"), torch.randn(3, 5, device="meta")
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x, w, target.to("meta"), reduction=reduction)
        assert loss.is_meta and loss.shape == ((2,) if reduction == "none" else ())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions_and_strides(shape: tuple[int, ...], reduction: str) -> None:
    w = torch.randn(7, 11).t()
    x = torch.randn(7, *shape).movedim(0, -1) if shape else torch.randn(14)[::2]
    target = torch.randint(11, (*shape, 2))[..., 1]
    b = torch.randn(22)[::2]
    flow = torch.randn(()).expand(shape) if reduction == "none" else None
    checked((x, w, target, b), "strided", flow, reduction=reduction)


def test_extreme_logits() -> None:
    """The largest is subtracted before exp; words that are forbidden by a bias of -inf have no probability."""
    x, w, target, b = make(9, 11, 7)
    assert b is not None
    checked((1000.0 * x, w, target, b), "large")
    b[3] = float("-inf")
    target[target == 3] = 4
    ours, eager = (
        gradients(f, (x, w, target, b), None, {}) for f in (linear_cross_entropy, reference)
    )
    for a, e in zip(ours, eager, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e)


def test_float16_does_not_underflow() -> None:
    """Of 4096 tokens, each one's share of the mean's gradient is below float16's smallest number."""
    x, w = torch.randn(4096, 8).half(), (torch.randn(16, 8) / 64).half()
    target = torch.randint(16, (4096,))
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, target)
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(1024.0).half())
    double = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(1024.0 * reference(double, w.double(), target), double)
    assert (dx.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, reduction: str) -> None:
    given = make(33, 65, 63)
    double = (given[0].double(), given[1].double(), given[2], given[3].double())  # type: ignore[union-attr]
    options = {"reduction": reduction}
    exact = gradients(reference, double, None, options)
    with torch.autocast("cpu", dtype):
        eager = gradients(F_cross_entropy, given, None, options)
        ours = gradients(linear_cross_entropy, given, None, options)
        formula = linear_cross_entropy(*given, backend="eager", **options)  # type: ignore[arg-type]
    assert formula.dtype == ours[0].dtype == eager[0].dtype == torch.float32
    for name, *found in zip(("loss", "dx", "dW", "db"), ours, exact, eager, strict=True):
        numerics.check(*found, f"autocast {name}", "gradient")


@pytest.mark.parametrize(
    "backend, reduction", [*(("aot_eager", r) for r in REDUCTIONS), ("inductor", "mean")]
)
@pytest.mark.usefixtures("small_chunks")
def test_compiled(backend: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(13, 11, 7)
    flow = torch.randn(13) if reduction == "none" else torch.tensor(1.7)
    options = {"reduction": reduction, **ALL}
    eager = gradients(linear_cross_entropy, given, flow, options)
    compiled = torch.compile(
        lambda *a, **o: linear_cross_entropy(*a, **o), fullgraph=True, backend=backend
    )
    chunks: list[int] = []
    real = chunked_loss.ChunkedLoss.run

    def run(self: Any, *arguments: Any) -> Any:
        chunks.append(len(self.target))
        return real(self, *arguments)

    monkeypatch.setattr(chunked_loss.ChunkedLoss, "run", run)
    for a, b in zip(gradients(compiled, given, flow, options), eager, strict=True):
        torch.testing.assert_close(a, b)
    assert chunks, "the graph holds the formula, with all of the logits"
    with torch.no_grad():
        assert torch.equal(compiled(*given, **options), eager[0])


def test_exported_and_operators() -> None:
    x, w, target, b = make(13, 11, 7)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(x, w, target, label_smoothing=0.1)

    for strict in (False, True):
        program = torch.export.export(Module(), (x, w, target), strict=strict)
        assert torch.equal(
            program.module()(x, w, target), linear_cross_entropy(x, w, target, label_smoothing=0.1)
        )
    arguments = (0.1, 0.01, 3.0, -100)
    for reduction in REDUCTIONS:
        options = (*arguments, reduction, torch.float32, None, [True, True, False])
        torch.library.opcheck(
            torch.ops.pyfuse.linear_cross_entropy.default,
            (x.clone().requires_grad_(), w.clone().requires_grad_(), b, target, *options),
        )
    torch.library.opcheck(
        torch.ops.pyfuse.linear_cross_entropy_backward.default,
        (torch.randn(13), x, w, b, target, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_transforms() -> None:
    x, w, target, b = make(12, 11, 7, torch.float64)

    def loss(function: Any) -> Callable[[Tensor], Tensor]:
        return lambda w: function(x, w, target, b, **ALL)

    ours, exact = loss(linear_cross_entropy), loss(reference)
    close = torch.testing.assert_close
    close(torch.func.grad(ours)(w), torch.func.grad(exact)(w))
    close(torch.func.hessian(ours)(w), torch.func.hessian(exact)(w))
    tangent = torch.randn_like(w)
    close(torch.func.jvp(ours, (w,), (tangent,)), torch.func.jvp(exact, (w,), (tangent,)))
    several = torch.stack([w, 2 * w, -w])
    close(torch.func.vmap(ours)(several), torch.stack([exact(each) for each in several]))
    compiled = torch.compile(torch.func.grad(ours), fullgraph=True, backend="aot_eager")
    close(compiled(w), torch.func.grad(exact)(w))
    w.requires_grad_()
    saved = torch.utils.checkpoint.checkpoint(ours, w, use_reentrant=False)
    close(torch.autograd.grad(saved, w), torch.autograd.grad(exact(w), w))


def test_backends_and_explain() -> None:
    x, w, target, b = make(5, 11, 7)
    auto = linear_cross_entropy(x, w, target, b)
    for name in ("cpu", "eager"):
        torch.testing.assert_close(linear_cross_entropy(x, w, target, b, backend=name), auto)
        with pyfuse.use_backend(name):
            torch.testing.assert_close(linear_cross_entropy(x, w, target, b), auto)
    with pytest.raises(NotImplementedError, match="cuda: does not implement linear_cross_entropy"):
        linear_cross_entropy(x, w, target, b, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        linear_cross_entropy(x, w, target, b, backend="fast")
    meta = [t.to("meta") for t in (x, w, target)]
    with pytest.raises(NotImplementedError, match="cpu: x is on meta"):
        linear_cross_entropy(*meta, backend="cpu")
    batch = torch.func.vmap(lambda x: linear_cross_entropy(x, w, target, backend="cpu"))
    with pytest.raises(NotImplementedError, match="functorch transform needs"):
        batch(x[None])
    told = pyfuse.explain(linear_cross_entropy, x, w.clone().requires_grad_(), target)
    assert told.chosen == "cpu" and told.needs == ("weight",)
    assert pyfuse.explain("linear_cross_entropy", x, w, target, backend="eager").chosen == "eager"


def test_errors_name_the_argument() -> None:
    x, w, target = torch.randn(2, 5), torch.randn(4, 5), torch.tensor([1, 3])
    for arguments, options, error, message in (
        ((x, torch.randn(4, 6), target), {}, ValueError, "weight: K is 6, but x has K = 5"),
        ((x, w, target, torch.randn(3)), {}, ValueError, "bias: V is 3, but weight has V = 4"),
        ((x, w, target[:1]), {}, ValueError, r"target: expected shape \(2,\)"),
        ((x, w, target.int()), {}, TypeError, "target: dtype torch.int32, needs int64"),
        ((x, w, torch.randn(2, 4)), {}, TypeError, "target: dtype torch.float32"),
        ((x, w, [1, 3]), {}, TypeError, "target: expected a torch.Tensor, got list"),
        ((x, w, target.to("meta")), {}, ValueError, "target: on meta"),
        ((x, w.double(), target), {}, TypeError, "weight: dtype torch.float64"),
        ((x.int(), w.int(), target), {}, TypeError, "x: dtype torch.int32"),
        ((x, w, target), {"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1"),
        ((x, w, target), {"z_loss": -1.0}, ValueError, "z_loss: expected"),
        ((x, w, target), {"softcap": 0.0}, ValueError, "softcap: expected"),
        ((x, w, target), {"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ((x, w, torch.tensor([1, 4])), {}, IndexError, "target: 4 is out of bounds, needs 0 to 3"),
        ((x, w, torch.tensor([-1, 3])), {}, IndexError, "target: -1 is out of bounds"),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(*arguments, **options)  # type: ignore[arg-type]
