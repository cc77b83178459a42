"""The Triton kernel of the loss of a language model's last layer: every option and size, what it reads and writes, how
it compiles. test_linear_cross_entropy.py has what does not depend on the backend."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Target
from emulated import GpuOfCpuTensors, standing_in
from launches import Launch, record
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
from numerics import assert_bitwise_equal, check
from ptxemu import triton_run
from torch import Tensor

import pyfuse
from pyfuse.backends import triton_device, triton_loss, triton_tune
from pyfuse.backends.chunked_loss import LossOptions, Sizes
from pyfuse.backends.triton_device import Arch
from pyfuse.backends.triton_loss import TritonRowLoss
from pyfuse.ops import linear_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.triton
ours = partial(linear_cross_entropy, backend="triton")
SECTOR = 32
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens, and blocks of 7 rows of dW."""
    sizes = triton_loss.sizes

    def small(vocabulary: int, k: int, dtype: torch.dtype) -> Sizes:
        return sizes(vocabulary, k, dtype)._replace(rows=5, block=7)

    monkeypatch.setattr(triton_loss, "sizes", small)


@pytest.fixture
def emulator() -> Iterator[GpuOfCpuTensors]:
    with standing_in(80) as gpu:
        assert isinstance(gpu, GpuOfCpuTensors)
        yield gpu


def same(a: list[Tensor], b: list[Tensor], name: str) -> None:
    for part, one, other in zip(("loss", "dx", "dW", "db"), a, b, strict=True):
        assert_bitwise_equal(one, other, f"{name} {part}")


# ---- results --------------------------------------------------------------------------------------


@pytest.mark.backends("triton")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients(
    dtype: torch.dtype, options: dict[str, Any], reduction: str, target: Target
) -> None:
    for tokens, v, k in ((5, 1, 3), (1, 3, 1), (63, 65, 111), (13, 197, 63)):
        given = make(tokens, v, k, dtype, biased=tokens != 63)
        flow = torch.randn(tokens) if reduction == "none" else torch.tensor(1.7)
        checked(given, f"{target} V {v}", flow, "triton", reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("v", [1, 3, 63, 111, 4096, 4099, 49157])
def test_vocabulary(v: int, dtype: torch.dtype, emulator: GpuOfCpuTensors) -> None:
    """Less than a block, whole blocks, the last one cut. The bias is part of the products."""
    given = make(9 if v < 4096 else 3, v, 16, dtype)
    for options in ({}, ALL):
        checked(given, f"V {v}", torch.tensor(0.7), "triton", **options)


def test_no_gradient_wanted(emulator: GpuOfCpuTensors) -> None:
    given = make(9, 4099, 16)
    for options in ({}, ALL):
        with_gradients = gradients(ours, given, None, options)[0]
        assert_bitwise_equal(ours(*given, **options), with_gradients, "loss")


def test_extreme_logits(emulator: GpuOfCpuTensors) -> None:
    """A bias of -inf forbids words; NaN, inf and rows without any word are as torch's."""
    x, w, target, b = make(9, 300, 7)
    assert b is not None
    checked((1000.0 * x, w, target, b), "large", None, "triton")
    b[3], target[target == 3] = float("-inf"), 4
    checked((x, w, target, b), "forbidden", None, "triton")
    for bad in (float("nan"), float("inf")):
        one = b.clone()
        one[7] = bad
        found, eager = (
            gradients(f, (x, w, target, one), None, {"reduction": "none"})
            for f in (ours, F_cross_entropy)
        )
        kept = target != -100
        assert found[0][kept].isnan().all() and eager[0][kept].isnan().all()
        assert found[1][kept].isnan().all() and not found[0][~kept].any()
    none = torch.full_like(b, float("-inf"))
    assert ours(x, w, target, none).isnan()


@pytest.mark.parametrize("tokens", [0, 4], ids=["no token", "all ignored"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_from(reduction: str, tokens: int, emulator: GpuOfCpuTensors) -> None:
    x, w = torch.randn(tokens, 5), torch.randn(3, 5)
    given = (x, w, torch.full((tokens,), -100), torch.randn(3))
    found = gradients(ours, given, None, {"reduction": reduction, "z_loss": 0.1})
    expected = gradients(F_cross_entropy, given, None, {"reduction": reduction})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and a.shape == b.shape
    assert found[0].isnan().all() == (reduction == "mean" or (tokens == 0 and reduction == "none"))


def test_leading_dimensions_and_strides(emulator: GpuOfCpuTensors) -> None:
    w, x = torch.randn(7, 11).t(), torch.randn(7, 2, 3).movedim(0, -1)
    target, b = torch.randint(11, (2, 3, 2))[..., 1], torch.randn(22)[::2]
    for reduction, flow in (("none", torch.randn(()).expand(2, 3)), ("mean", None)):
        checked((x, w, target, b), "strided", flow, "triton", reduction=reduction)


# ---- tokens left out, targets out of range --------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_what_ignored_tokens_hold_changes_nothing(
    reduction: str, emulator: GpuOfCpuTensors
) -> None:
    x, w, target, b = make(23, 11, 7)
    ignored = target == -100
    assert 0 < ignored.sum() < 23
    dirty = x.masked_fill(ignored[:, None], float("nan"))
    kept = dirty.clone()
    flow = torch.randn(23) if reduction == "none" else None
    options = {"reduction": reduction, **ALL}
    clean = gradients(ours, (x, w, target, b), flow, options)
    same(gradients(ours, (dirty, w, target, b), flow, options), clean, "NaN in ignored tokens")
    assert_bitwise_equal(dirty, kept, "the caller's x")
    assert not clean[1][ignored].any()
    if reduction == "none":
        assert not clean[0][ignored].any() and clean[0].isfinite().all()
    renamed = target.masked_fill(ignored, 5)  # another index, which is a word as well
    checked((x, w, renamed, b), "ignore_index 5", flow, "triton", ignore_index=5, **options)


@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**40)])
def test_target_out_of_range_gives_nan(bad: int, emulator: GpuOfCpuTensors) -> None:
    """The other tokens have what is theirs, and nothing is read out of bounds, which the emulator would report."""
    x, w, target, b = make(9, 11, 7)
    wrong = target.clone()
    wrong[4] = bad
    others = torch.arange(9) != 4
    for options in ({"reduction": "none"}, {"reduction": "none", **ALL}):
        found = gradients(ours, (x, w, wrong, b), None, options)
        expected = gradients(ours, (x, w, target, b), None, options)
        for a, e in zip(found[:2], expected[:2], strict=True):
            assert a[4].isnan().all()
            assert_bitwise_equal(a[others], e[others], "the others")
        assert found[2].isnan().all() and found[3].isnan().all()
    assert ours(x, w, wrong).isnan()


def test_debugging_stops_at_a_target_out_of_range() -> None:
    """As TRITON_DEBUG=1 does; an ignored one is no fault."""

    def kinds(target: list[int]) -> set[str]:
        launch = launched(80, torch.tensor(target), torch.zeros(2, 64))
        options = launch.options | {"debug": True}
        return triton_run.launch(
            launch.kernel, launch.grid, *launch.args, arch=80, check=False, **options
        ).kinds()

    assert not kinds([63, -100])
    assert "trap" in kinds([64, 0])


# ---- what the host does ---------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_chunks")
def test_the_host_waits_for_nothing(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that CUDA graphs can capture it: no value comes to the host, and no size depends on one. Nor is there any
    tensor larger than a chunk of logits in their own dtype."""
    # A dispatch mode would send the call to the formula.
    for module in ("linear_cross_entropy", "_loss"):
        monkeypatch.setattr(sys.modules[f"pyfuse.ops.{module}"], "plain", lambda tensors: True)
    x, w, target, b = make(13, 2051, 2, BF16)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    flow = torch.randn(13 if reduction == "none" else ())

    def step(backend: str) -> Ops:
        with Ops() as ops:
            loss = linear_cross_entropy(x, w, target, b, reduction=reduction, backend=backend, **ALL)  # fmt: skip
            torch.autograd.grad(loss, leaves, flow.to(loss.dtype))
        return ops

    found: list[Ops] = []
    launches = record(80, lambda: found.append(step("triton")))
    assert len(launches) == (6 if reduction == "none" else 3)
    waits = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "index", "masked_select"}
    assert not found[0].names & waits
    assert step("eager").names >= {"_local_scalar_dense", "nonzero", "index"}, "nothing is seen"
    assert found[0].bytes == 5 * 2112 * 2 and 2112 == 33 * 64  # two bytes each, of whole lines


def test_backends_and_refusals(emulator: GpuOfCpuTensors) -> None:
    x, w, target, b = make(5, 11, 7)
    with pyfuse.use_backend("triton"):
        assert_bitwise_equal(linear_cross_entropy(x, w, target, b), ours(x, w, target, b), "named")
    assert len(emulator.reports) == 2
    told = pyfuse.explain(linear_cross_entropy, x, w.requires_grad_(), target, backend="triton")
    assert told.chosen == "triton" and told.needs == ("weight",)
    with pytest.raises(NotImplementedError, match=r"triton: x is torch\.float64; the kernels have"):
        ours(x.double(), w.double(), target)
    many = torch.zeros(1, 1).expand(2**31, 1)
    assert "a vocabulary of 2147483648" in str(triton_loss.why_not(x[:, :1], many))
    batch = torch.func.vmap(lambda x: ours(x, w, target))
    with pytest.raises(NotImplementedError, match="triton: a functorch transform needs"):
        batch(x[None])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    x, w, target, b = make(5, 11, 7)
    with pytest.raises(NotImplementedError, match="triton: torch sees no GPU"):
        ours(x, w, target, b)


# ---- autograd, autocast, compiled graphs ----------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_pass_and_second_derivatives(
    reduction: str, emulator: GpuOfCpuTensors
) -> None:
    x, w, target, b = make(13, 11, 7)
    x.requires_grad_(), w.requires_grad_()
    loss = ours(x, w, target, b, reduction=reduction, **ALL).sum()
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    formula = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), create_graph=True)
    for one, two, three in zip(first, again, formula, strict=True):
        assert_bitwise_equal(one, two, "again")
        torch.testing.assert_close(one, three)
    (hessian,) = torch.autograd.grad(formula[0].square().sum(), w)
    exact = 3.0 * reference(x, w, target, b, reduction=reduction, **ALL).sum()
    (dx,) = torch.autograd.grad(exact, x, create_graph=True)
    torch.testing.assert_close(hessian, torch.autograd.grad(dx.square().sum(), w)[0])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype: torch.dtype, emulator: GpuOfCpuTensors) -> None:
    given = make(33, 65, 63)
    x, w, target, b = given
    assert b is not None
    exact = gradients(reference, (x.double(), w.double(), target, b.double()), None, {})
    with torch.autocast("cpu", dtype):
        eager = gradients(F_cross_entropy, given, None, {})
        found = gradients(ours, given, None, {})
    assert found[0].dtype == torch.float32
    for name, *three in zip(("loss", "dx", "dW", "db"), found, exact, eager, strict=True):
        check(*three, f"autocast {name}", "gradient")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str, emulator: GpuOfCpuTensors) -> None:
    given, options = make(13, 11, 7), {"reduction": reduction, **ALL}
    flow = torch.randn(13) if reduction == "none" else torch.tensor(1.7)
    eager = gradients(ours, given, flow, options)
    before = len(emulator.reports)
    compiled = torch.compile(
        lambda *a, **o: linear_cross_entropy(*a, **o, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    same(gradients(compiled, given, flow, options), eager, "compiled")
    assert len(emulator.reports) > before


@pytest.mark.usefixtures("small_chunks")
def test_order_of_programs_changes_no_bit(emulator: GpuOfCpuTensors) -> None:
    """Each launch of this emulator has another one."""
    given = make(13, 4099, 16, F16)
    first = gradients(ours, given, None, ALL)
    for _ in range(2):
        same(gradients(ours, given, None, ALL), first, "again")


# ---- launches -------------------------------------------------------------------------------------


def row_loss(
    target: Tensor, r: Tensor, gradient: bool = True, loss: LossOptions | None = None
) -> Tensor:
    """The kernel's call; r has any stride of rows."""
    losses = torch.empty(len(r))
    TritonRowLoss(loss or LossOptions(0.0, 0.0, None), -100)(r, target, None, losses, gradient)
    return losses


def launched(arch: Arch, target: Tensor, r: Tensor, **options: Any) -> Launch:
    (launch,) = record(arch, lambda: row_loss(target, r, **options))
    return launch


def logits(rows: int, v: int, dtype: torch.dtype) -> Tensor:
    """In memory as the chunks have it."""
    align = triton_loss.sizes(v, 1, dtype).align
    return torch.randn(rows, -(-v // align) * align).to(dtype)[:, :v]


def test_rows_beyond_32_bits(emulator: GpuOfCpuTensors) -> None:
    """Pages between them that nobody touches cost nothing."""
    storage = torch.UntypedStorage((3 * 2**30 + 9) * 2)
    r = torch.empty(0, dtype=BF16).set_(storage, 0, (4, 9), (2**30, 1))
    near, target = torch.randn(4, 9).to(BF16), torch.tensor([0, 8, -100, 3])
    r.copy_(near)
    assert_bitwise_equal(row_loss(target, r), row_loss(target, near), "losses")
    assert_bitwise_equal(r.clone(), near, "gradients")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_each_byte_moves_once_in_each_pass(dtype: torch.dtype, emulator: GpuOfCpuTensors) -> None:
    """16 bytes to a lane. Rows of any vocabulary begin at whole lines; of an odd one the last block, which is cut, has
    an access for each element."""
    for v, most in ((49152, 1.02), (128256, 1.02), (50257, 1.25)):
        r, target = logits(2, v, dtype), torch.tensor([5, v - 1])
        for gradient, passes in ((False, 1), (True, 3)):
            row_loss(target, r, gradient)
            report = emulator.reports[-1]
            assert v % 2 or report.conflicts(shared=False) == []
            moved = report.counters["sectors"] * SECTOR
            assert moved <= most * passes * 2 * v * dtype.itemsize
        ptx = launched(80, target, r).compiled(80).ptx
        kinds = set(re.findall(r"\b((?:ld|st)\.global\.v[\w.]*)", ptx))
        assert kinds == {"ld.global.v4.b32", "st.global.v4.b32"}


def test_numbers_that_change_compile_nothing_new() -> None:
    """Sizes, strides, options: none becomes a part of the kernel, not even 1 or a multiple of 16."""
    compiled = set()
    for v, smoothing, ignore_index in ((49152, 0.1, -100), (128256, 0.2, 1), (50304, 1.0, 16)):
        loss = TritonRowLoss(LossOptions(smoothing, 0.0, None), ignore_index)
        r, target, losses = logits(3, v, BF16), torch.zeros(3, dtype=torch.int64), torch.empty(3)
        (launch,) = record(80, partial(loss, r, target, None, losses, True))
        compiled.add(triton_run.compile_ptx(launch.kernel, *launch.args, arch=80, **launch.options))
    assert len(compiled) == 1


ARCHS: list[Arch] = [80, 86, 89, 90, 100, 120, "gfx90a", "gfx942"]
MOST, LEAST = LossOptions(0.1, 0.1, 3.0), LossOptions(0.0, 0.0, None)


@pytest.mark.ahead_of_time
@pytest.mark.parametrize(
    "dtype, v, loss",
    [(BF16, 49152, LEAST), (BF16, 50257, MOST), (F16, 128256, MOST), (F32, 50257, MOST)],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(arch: Arch, dtype: torch.dtype, v: int, loss: LossOptions) -> None:
    launch = launched(arch, torch.zeros(1, dtype=torch.int64), logits(1, v, dtype), loss=loss)
    code = launch.compiled(arch).code
    assert code.in_registers, (code.name, code.registers)


def test_chunks_and_tiles() -> None:
    for v in (1, 3, 1000, 49152, 262144, 10**9):
        for dtype in (F32, BF16):
            sizes = triton_loss.sizes(v, 64, dtype)
            fits = sizes.rows * v * dtype.itemsize <= triton_loss.CHUNK_BYTES
            assert 1 <= sizes.rows <= triton_loss.CHUNK_ROWS and (fits or sizes.rows == 1)
            for arch in ARCHS:
                first, *others = triton_device.kernels("loss_configs").candidates(
                    v, dtype.itemsize, arch, True
                )
                assert first not in others and all(t.columns >= t.warps for t in others)


def test_a_call_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel overwrites what it reads; the candidates have a copy of it."""
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_tune, "enabled", True)
    triton_tune._known.cache_clear()
    given = make(3, 70, 7)
    with standing_in(80) as gpu:
        checked(given, "tuned", None, "triton")
        tried = len(gpu.reports)
        checked(given, "known", None, "triton")
    triton_tune._known.cache_clear()
    assert tried > 2 and len(gpu.reports) == tried + 1
    assert "cross_entropy_kernel" in (tmp_path / "autotune.json").read_text()
