"""The Triton kernels of the norms: what they read and write, how they compile, every size of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Target
from emulated import standing_in
from launches import Launch
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
from ptxemu import Report, triton_run
from ptxemu.sass import Code
from torch import Tensor

import pyfuse
from pyfuse.backends import gpu_chip, triton_device
from pyfuse.backends.triton_device import Arch

pytest.importorskip("triton")
norm_configs = triton_device.kernels("norm_configs")
pytestmark = pytest.mark.triton
ON_80 = Target("triton", arch=80)
SECTOR = 32


class Device:
    """Keeps its launches, and carries them out in the emulator or not at all. seed: order of programs and warps."""

    name = "tests"

    def __init__(self, arch: Arch, runs: bool, seed: int = 0) -> None:
        self.arch, self.runs, self.seed = arch, runs, seed
        self.launches: list[Launch] = []
        self.reports: list[Report] = []

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.launches.append(Launch(kernel, grid, args, options))
        if self.runs:
            assert isinstance(self.arch, int)
            report = triton_run.launch(
                kernel, grid, *args, arch=self.arch, seed=self.seed, **options
            )
            self.reports.append(report)

    def time(self, launch: Callable[[Any], None], tiles: Any) -> None:
        raise NotImplementedError

    def codes(self) -> Iterator[Code]:
        """The machine code of each launch."""
        return (launch.compiled(self.arch).code for launch in self.launches)

    def accesses(self) -> Iterator[set[str]]:
        """The kinds of global accesses in the PTX of each launch that goes through rows."""
        for launch in self.launches:
            if launch.kernel.__name__ != "add_programs_kernel":
                ptx = launch.compiled(self.arch).ptx
                yield set(re.findall(r"\b((?:ld|st)\.global\.[\w.]*)", ptx))


@contextmanager
def on(arch: Arch, runs: bool = True, seed: int = 0) -> Iterator[Device]:
    device = Device(arch, runs, seed)
    with triton_device.stand_in(device):
        yield device


@pytest.fixture
def one_multiprocessor() -> Iterator[None]:
    """Each program has many rows, as in large calls on a GPU with many."""
    plans = (norm_configs.forward, norm_configs.backward, norm_configs.parameter_sums)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_chip.MULTIPROCESSORS, 80, 1)
        for plan in plans:
            plan.cache_clear()
        yield
    for plan in plans:
        plan.cache_clear()


def forward(call: NormCall) -> tuple[Any, tuple[Tensor | None, ...]]:
    gradient = implementation(call, "triton").gradient
    assert gradient is not None
    return gradient.forward(*call.tensors, **call.options)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# Rows so many that the parameters' share is that of 20 and more rows to a program.
BARS = [
    NormCase("layer_norm", "bf16", 80, 4096),
    NormCase("layer_norm", "f16", 160, 4096, weight="f32", bias="f32"),
    NormCase(
        "layer_norm", "bf16", 80, 4096, weight="f32", bias="f32", residual="f32", prenorm=True
    ),
    NormCase("layer_norm", "f32", 240, 768, residual="own"),
    NormCase("layer_norm", "bf16", 400, 768, residual="own", prenorm=True, dropout=0.1),
    NormCase("llama", "bf16", 80, 5120, residual="own", prenorm=True),
    NormCase("llama", "bf16", 80, 4096, weight="f32"),
    NormCase("gemma", "f16", 1600, 128),
    NormCase("torch", "bf16", 80, 8192),
]


@pytest.mark.parametrize("case", BARS, ids=str)
def test_each_byte_moves_once(case: NormCase, one_multiprocessor: None) -> None:
    """The sums that the backward's programs leave for the kernel after it are not counted."""
    call = build(case)
    with on(80) as device:
        made = results(call, "triton")
        result, saved = forward(call)
        found = kernel_gradients(call, "triton")
    plain, kept, *_, back, added = device.reports
    for report in (plain, kept, back, added):
        assert report.conflicts(shared=False) == []  # no sector more than an access has to take
    x, *parameters = call.tensors
    residual = call.options["residual"]
    source = (x, residual) if isinstance(result, Tensor) else (result[1],)
    written = {id(found[name]): found[name] for name in {"x", "residual"} & set(found)}
    once = nbytes(x, residual, *parameters, *made)
    assert plain.counters["sectors"] * SECTOR <= 1.05 * once
    once = nbytes(*source, parameters[0], *call.grads, *saved[:2], *written.values())
    programs, sums = device.launches[-2].grid[0], len(parameters) * 4 * case.d
    assert back.counters["sectors"] * SECTOR - programs * sums <= 1.05 * once


@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (80, "f32"), (90, "bf16"), (120, "f16")])
def test_accesses_have_16_bytes(arch: int, dtype: str) -> None:
    """Of rows, dense and strided ones, in both passes; the statistics of a row have 4."""
    wide = {"ld.global.v4.b32", "st.global.v4.b32"}
    for op, d in (("layer_norm", 4096), ("llama", 2880)):
        call = build(NormCase(op, dtype, 3, d, residual="own", prenorm=True))
        x, *parameters = call.tensors
        assert x is not None
        strided = torch.zeros(3, d + 8, dtype=x.dtype)[:, :d]
        with on(arch, runs=False) as device:
            results(call, "triton")
            results(NormCall(call.op, (strided, *parameters), call.options), "triton")
        assert [*device.accesses()] == [wide, wide]
        with on(arch, runs=False) as device:
            kernel_gradients(call, "triton")
        assert all(
            kinds <= wide | {"ld.global.b32", "st.global.b32"} for kinds in device.accesses()
        )


# What has most to keep in registers, and what is usual; one pass and wide, as many as compile within seconds.
SHIPPED = [
    NormCase("layer_norm", "bf16", 2, 4096),
    NormCase("layer_norm", "bf16", 2, 768, "f32", "f32", residual="f32", prenorm=True, dropout=0.1),
    NormCase("layer_norm", "f32", 2, 8192, residual="own", prenorm=True),
    NormCase("llama", "bf16", 2, 4096, residual="own", prenorm=True),
    NormCase("llama", "f32", 2, 200, residual="own", dropout=0.1),
    NormCase("torch", "bf16", 2, 16384, weight="f32"),
    NormCase("layer_norm", "bf16", 2, 20000, residual="f32", dropout=0.1),
]
ARCHS: list[Arch] = [80, 86, 89, 90, 100, 120, "gfx90a", "gfx942"]


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_suffice(arch: Arch) -> None:
    """Three of the cases for each GPU, so that all of them are compiled for some."""
    first = ARCHS.index(arch)
    for case in (SHIPPED[(first + step) % len(SHIPPED)] for step in (0, 2, 5)):
        call = build(case)
        with on(arch, runs=False) as device:
            kernel_gradients(call, "triton")
        for code in device.codes():
            assert code.in_registers, f"{case}, {code.name}: {code.spills}"


# Sizes around those where a tile has one row, a row has another number of threads, two passes begin.
SIZES = [
    NormCase("layer_norm", "bf16", 9, 1, residual="own", prenorm=True),
    NormCase("llama", "f32", 300, 2, dropout=0.4),
    NormCase("layer_norm", "f32", 70, 8),
    NormCase("gemma", "f16", 5, 2049),
    NormCase("layer_norm", "bf16", 3, 8192, residual="own"),
    NormCase("llama", "f32", 3, 8200, residual="own", prenorm=True),
    NormCase("torch", "bf16", 2, 16392, weight="f32"),
    NormCase(
        "layer_norm", "f16", 2, 16500, "f32", "own", residual="f32", prenorm=True, dropout=0.2
    ),
    NormCase("llama", "bf16", 2, 32768, dropout=0.2),
    NormCase("layer_norm", "f32", 2, 40001),
    NormCase("layer_norm", "bf16", 2, 65536),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_size(case: NormCase) -> None:
    with on(80):
        check_call(build(case), ON_80, str(case))


@pytest.mark.parametrize(
    "case",
    [NormCase(rows=150, d=200, residual="own", dropout=0.1), NormCase("llama", rows=300)],
    ids=str,
)
def test_many_rows_to_a_program(case: NormCase, one_multiprocessor: None) -> None:
    with on(80):
        check_call(build(case), ON_80, str(case))


def test_rows_may_begin_anywhere() -> None:
    """At an address that is a multiple of nothing, every second, in columns of a wider tensor."""
    call = build(NormCase("layer_norm", "bf16", 5, 64, residual="own", prenorm=True))
    x, *parameters = call.tensors
    assert x is not None
    with on(80):
        expected = results(call, "triton")
        gradients = kernel_gradients(call, "triton")
        for take in (
            lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
            lambda t: t.repeat_interleave(2, 0)[::2],
            lambda t: torch.cat((t, t[:, :1]), 1)[:, :64],
        ):
            options = call.options | {"residual": take(call.options["residual"])}
            moved = NormCall(call.op, (take(x), *parameters), options, tuple(map(take, call.grads)))
            found = kernel_gradients(moved, "triton")
            for a, b in zip(results(moved, "triton"), expected, strict=True):
                torch.testing.assert_close(a, b)
            for name, grad in gradients.items():
                torch.testing.assert_close(found[name], grad)


def test_order_of_programs_changes_no_bit(one_multiprocessor: None) -> None:
    for case in (
        NormCase("layer_norm", "f32", 700, 65, dropout=0.1),
        NormCase("llama", "f32", 90, 5),
    ):
        call, found = build(case), []
        for seed in (0, 1, 2):
            with on(80, seed=seed):
                found.append((*results(call, "triton"), *kernel_gradients(call, "triton").values()))
        for other in found[1:]:
            for a, b in zip(other, found[0], strict=True):
                assert_bitwise_equal(a, b, str(case))


@pytest.mark.parametrize("op", ["layer_norm", "llama"])
def test_statistics_made_again_are_the_same(op: str) -> None:
    """A compiled graph keeps results alone."""
    for prenorm, dropout in ((False, 0.0), (False, 0.3), (True, 0.3)):
        call = build(NormCase(op, "bf16", 9, 768, residual="own", prenorm=prenorm, dropout=dropout))
        with on(80):
            gradient = implementation(call, "triton").gradient
            assert gradient is not None and gradient.restore is not None
            result, saved = forward(call)
            given = (result,) if isinstance(result, Tensor) else result
            again = gradient.restore(given, call.tensors, call.options)
        for a, b in zip(again, saved, strict=True):
            if a is not None and b is not None:
                assert_bitwise_equal(a, b, f"{op}, {prenorm}, {dropout}")


def test_numbers_that_change_compile_nothing_new() -> None:
    """Rows, strides and seeds: none becomes a part of the kernel, not even 1 or a multiple of 16."""
    compiled = set()
    for rows, extra, seed in ((1, 8, (1, 1)), (16, 16, (16, 32)), (33, 24, (-5, 2**40))):
        call = build(NormCase("llama", "bf16", rows, 64, residual="own", dropout=0.5))
        x, weight = call.tensors
        assert x is not None
        padded = torch.zeros(rows + 1, 64 + extra, dtype=x.dtype)
        padded[:rows, :64] = x
        call.tensors = (padded[:rows, :64], weight)
        call.options["dropout_seed"] = torch.tensor(seed)
        with on(80) as device:
            check_call(call, ON_80, str(seed))
        for kernel, _, args, options in device.launches:
            compiled.add(triton_run.compile_ptx(kernel, *args, arch=80, **options))
    # The forward: alone, with statistics, these alone; the backward's two.
    assert len(compiled) == 5


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
    reason: str, op: str, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    with standing_in(80):
        (asked,) = pyfuse.explain(op, *tensors, **options, backend="triton").candidates
    assert asked.reason is not None and reason in asked.reason
