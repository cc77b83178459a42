"""The CUDA kernels of the norms: what they move, how they compile, every size of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Target
from cuda_code import kernels_of
from emulated import CudaOfCpuTensors, standing_in
from norm_cases import (
    NormCall,
    NormCase,
    build,
    check_call,
    implementation,
    kernel_gradients,
    results,
)
from numerics import assert_bitwise_equal
from ptxemu import Report
from torch import Tensor

import pyfuse
from pyfuse.backends import cuda_device, cuda_norm_gradient, gpu_chip

if cuda_device._cuda is None:
    pytest.skip("pyfuse._cuda is not built", allow_module_level=True)
ON_80 = Target("cuda", arch=80)
SECTOR = 32


@pytest.fixture
def device() -> Iterator[CudaOfCpuTensors]:
    with standing_in(80, backend="cuda") as device:
        assert isinstance(device, CudaOfCpuTensors)
        yield device


@pytest.fixture
def small_gpu(
    device: CudaOfCpuTensors, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CudaOfCpuTensors]:
    """Each block has many rows, as in large calls on a GPU with many multiprocessors."""
    monkeypatch.setattr(device, "multiprocessors", 1)
    monkeypatch.setitem(gpu_chip.MULTIPROCESSORS, 80, 1)
    monkeypatch.setattr(cuda_norm_gradient, "AT_ONCE", 1)
    yield device


def forward(call: NormCall) -> tuple[Any, tuple[Tensor | None, ...]]:
    gradient = implementation(call, "cuda").gradient
    assert gradient is not None
    return gradient.forward(*call.tensors, **call.options)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def no_waste(*reports: Report) -> None:
    """No bank conflict, and no sector more than an access has to take."""
    for report in reports:
        assert report.conflicts() == [] and report.conflicts(shared=False) == []


# Rows so many that the parameters' share is that of 20 and more rows to a block.
BARS = [
    NormCase("layer_norm", "bf16", 80, 4096),
    NormCase("layer_norm", "bf16", 80, 4096, "f32", "f32", residual="f32", prenorm=True),
    NormCase("layer_norm", "f32", 240, 768, residual="own"),
    NormCase("layer_norm", "bf16", 400, 768, residual="own", prenorm=True, dropout=0.1),
    NormCase("llama", "bf16", 80, 5120, residual="own", prenorm=True),
    NormCase("llama", "bf16", 80, 4096, weight="f32"),
    NormCase("gemma", "f16", 1600, 128),
    NormCase("torch", "bf16", 80, 8192),
    NormCase("torch", "f32", 1200, 136, residual="own", prenorm=True),
    NormCase("layer_norm", "f32", 1200, 264),
]


@pytest.mark.parametrize("case", BARS, ids=str)
def test_each_byte_moves_once(case: NormCase, small_gpu: CudaOfCpuTensors) -> None:
    """The sums that the backward's blocks leave for the kernel after it are not counted."""
    call = build(case)
    made = results(call, "cuda")
    result, saved = forward(call)
    found = kernel_gradients(call, "cuda")
    plain, kept, *_, back, added = small_gpu.reports
    for report in (plain, kept, back, added):
        assert report.conflicts() == []
    x, *parameters = call.tensors
    residual = call.options["residual"]
    once = nbytes(x, residual, *parameters, *made)
    assert plain.counters["sectors"] * SECTOR <= 1.05 * once
    source = (x, residual) if isinstance(result, Tensor) else (result[1],)
    written = {id(found[name]): found[name] for name in {"x", "residual"} & set(found)}
    once = nbytes(*source, parameters[0], *call.grads, *saved[:2], *written.values())
    assert x is not None
    blocks = cuda_norm_gradient.block_count(x.numel(), case.d, 80)
    sums = blocks * len(parameters) * 4 * case.d
    assert back.counters["sectors"] * SECTOR - sums <= 1.05 * once


@pytest.mark.parametrize("d", [8, 136, 264, 768, 4096, 12288, 20000])
@pytest.mark.parametrize(("op", "dtype"), [("layer_norm", "bf16"), ("llama", "f32")])
def test_no_access_wastes(op: str, dtype: str, d: int, device: CudaOfCpuTensors) -> None:
    """Of rows that begin anywhere in a sector, too: more than 1.03 times the ideal there is theirs."""
    call = build(NormCase(op, dtype, 9, d, residual="own", prenorm=True, dropout=0.1))
    results(call, "cuda")
    kernel_gradients(call, "cuda")
    for report in device.reports:
        assert report.conflicts() == []
        assert report.counters["sectors"] <= 1.03 * report.counters["sectors_ideal"]


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
def test_registers_suffice(arch: str) -> None:
    for name in cuda_device.module().units():
        if name.startswith("norm"):
            for code in kernels_of(name, arch).values():
                assert code.in_registers, f"{name}/{code.name}: {code.spills}"


# Sizes around those where a row has another number of threads, or goes through a block in stretches.
SIZES = [
    NormCase("layer_norm", "bf16", 9, 1, residual="own", prenorm=True),
    NormCase("llama", "f32", 300, 2, dropout=0.4),
    NormCase("layer_norm", "bf16", 70, 8),
    NormCase("layer_norm", "f16", 70, 24, residual="f32", dropout=0.1),
    NormCase("layer_norm", "f32", 70, 260),
    NormCase("gemma", "f16", 5, 2049),
    NormCase("torch", "bf16", 3, 4104, residual="own", prenorm=True, dropout=0.2),
    NormCase("layer_norm", "bf16", 3, 8192, residual="own"),
    NormCase("llama", "f32", 3, 8200, residual="own", prenorm=True),
    NormCase("torch", "bf16", 2, 16384, weight="f32"),
    NormCase("layer_norm", "f16", 2, 16500, "f32", residual="f32", prenorm=True, dropout=0.2),
    NormCase("llama", "bf16", 2, 32768, dropout=0.2),
    NormCase("layer_norm", "f32", 2, 40001, dropout=0.1),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_size(case: NormCase, device: CudaOfCpuTensors) -> None:
    check_call(build(case), ON_80, str(case))


@pytest.mark.parametrize(
    "case",
    [
        NormCase(rows=150, d=200, residual="own", dropout=0.1),
        NormCase("layer_norm", "bf16", 150, 768, residual="own"),
        NormCase("llama", rows=300),
        NormCase("layer_norm", "bf16", 50, 8320),
    ],
    ids=str,
)
def test_many_rows_to_a_block(case: NormCase, small_gpu: CudaOfCpuTensors) -> None:
    """Each launch has another order of blocks and warps: nothing depends on it."""
    call = build(case)
    first = check_call(call, ON_80, str(case))
    for name, grad in kernel_gradients(call, "cuda").items():
        assert_bitwise_equal(grad, first[name], name)


def test_rows_may_begin_anywhere(device: CudaOfCpuTensors) -> None:
    """At an address that is a multiple of nothing, every second, in columns of a wider tensor."""
    call = build(NormCase("layer_norm", "bf16", 5, 64, residual="own", prenorm=True))
    x, *parameters = call.tensors
    assert x is not None
    expected, gradients = results(call, "cuda"), kernel_gradients(call, "cuda")
    for take in (
        lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: torch.cat((t, t[:, :1]), 1)[:, :64],
    ):
        options = call.options | {"residual": take(call.options["residual"])}
        moved = NormCall(call.op, (take(x), *parameters), options, tuple(map(take, call.grads)))
        found = kernel_gradients(moved, "cuda")
        for a, b in zip(results(moved, "cuda"), expected, strict=True):
            torch.testing.assert_close(a, b)
        for name, grad in gradients.items():
            torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_statistics_made_again_are_the_same(op: str, device: CudaOfCpuTensors) -> None:
    """A compiled graph keeps results alone."""
    for prenorm, dropout in ((False, 0.0), (False, 0.3), (True, 0.3)):
        call = build(NormCase(op, "bf16", 9, 768, residual="own", prenorm=prenorm, dropout=dropout))
        gradient = implementation(call, "cuda").gradient
        assert gradient is not None and gradient.restore is not None
        result, saved = forward(call)
        given = (result,) if isinstance(result, Tensor) else result
        again = gradient.restore(given, call.tensors, call.options)
        for a, b in zip(again, saved, strict=True):
            if a is not None and b is not None:
                assert_bitwise_equal(a, b, f"{op}, {prenorm}, {dropout}")


X, W = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8)
REFUSED: list[tuple[str, str, tuple[Tensor, ...], dict[str, Any]]] = [
    ("x is torch.float64", "layer_norm", (X.double(), W), {}),
    ("residual is torch.float64", "layer_norm", (X, W), {"residual": X.double()}),
    ("gives float64", "rms_norm", (X, W.double()), {}),
    ("weight is torch.float8", "rms_norm", (X, W.to(torch.float8_e5m2)), {"casting": "torch"}),
    ("bias is torch.float8", "layer_norm", (X, W, W.to(torch.float8_e5m2)), {}),
]


@pytest.mark.parametrize(
    ("reason", "op", "tensors", "options"), REFUSED, ids=[r for r, *_ in REFUSED]
)
def test_refusal(
    reason: str,
    op: str,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    device: CudaOfCpuTensors,
) -> None:
    (asked,) = pyfuse.explain(op, *tensors, **options, backend="cuda").candidates
    assert asked.reason is not None and reason in asked.reason


def test_entries_check_what_would_crash() -> None:
    module, none = cuda_device.module(), (0, 0, 0)
    x, on = torch.zeros(1, 8), (80, 108, 0)

    def call(start: tuple[int, ...] = (x.data_ptr(), 8, 0), d: int = 8, kind: int = 0) -> Any:
        dropout = (0, 0, 0, 1.0)
        rest = (*none, 0, 0, 0, 0, 0, 0, 1, d, kind, *dropout, *none, *none, 1e-5)
        return lambda: module.norm_forward(on, (*start, *rest))

    for message, bad in (
        ("x: null data pointer", call(start=none)),
        ("dtype: the CUDA kernels have", call(start=(x.data_ptr(), 8, 3))),
        ("d: the kernels have 1 to", call(d=0)),
        ("no such kind: 4", call(kind=4)),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
