"""The kernels that bugs are seeded into, and the cases that each is run through."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numerics
import torch

from ptxemu import EmulationError, Report, nvcc_run, struct
from ptxemu.gpu import Emulator
from ptxemu.mutations import Kernel, Wrong, judged
from ptxemu.samples import flash_cuda


@dataclass(frozen=True)
class Case:
    """layout: plain; bmhd, heads next to each other in a row, as a projection leaves them; cold, all scores so low that
    exp of them is 0; far, batches 2^31 elements apart, or rows 2^30."""

    B: int
    Hq: int
    Hk: int
    M: int
    N: int
    causal: bool
    layout: str = "plain"
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16


@cache
def inputs(case: Case, D: int = 64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((case.Hq, case.M), (case.Hk, case.N), (case.Hk, case.N))
    q, k, v = (torch.randn(case.B, h, rows, D).to(case.dtype) for h, rows in shapes)
    if case.layout == "cold":
        q, k = q * 0.1 + 4, k * 0.1 - 4
    if case.layout == "bmhd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if case.layout == "far batches":
        k = _far(k, (2**31, 2**20, D, 1))
    if case.layout == "far rows":
        k = _far(k, (0, 0, 2**30, 1))
    return q, k, v


def _far(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """x with these strides. Pages between its rows that nobody touches cost nothing."""
    last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    storage = torch.UntypedStorage((last + 1) * x.element_size())
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, strides).copy_(x)


@cache
def attention(case: Case) -> tuple[torch.Tensor, ...]:
    """o exact and eager, lse exact and eager."""
    results = []
    for wide in (torch.float64, None):
        q, k, v = (x if wide is None else x.to(wide) for x in inputs(case))
        k, v = (x.repeat_interleave(case.Hq // case.Hk, 1) for x in (k, v))
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if case.causal:
            seen = torch.ones(case.M, case.N, dtype=torch.bool).tril(case.N - case.M)
            s = s.masked_fill(~seen, -math.inf)
        weights = torch.nan_to_num(s.softmax(-1))
        results += [weights @ v, torch.logsumexp(s if wide else s.float(), -1)]
    return results[0], results[2], results[1], results[3]


Launch = Callable[..., tuple[torch.Tensor, torch.Tensor, Report]]


def attention_cases(launch: Launch, cases: tuple[Case, ...], **more: object) -> Iterator[Wrong]:
    for case in cases:
        q, k, v = inputs(case)
        try:
            o, lse, report = launch(q, k, v, causal=case.causal, seed=case.seed, **more)
        except EmulationError as error:
            yield set(error.report.kinds())
            continue
        exact, eager, lse_exact, lse_eager = attention(case)
        yield judged(report, {"o": (o, exact, eager), "lse": (lse, lse_exact, lse_eager)})


GENERAL_CASES = (
    Case(1, 2, 2, 65, 197, True, "bmhd"),
    Case(1, 1, 1, 64, 192, False, seed=1),
    Case(2, 1, 1, 5, 70, False, "far batches"),
    Case(1, 1, 1, 65, 3, True),
    Case(1, 1, 1, 16, 130, False, "cold"),
)
SM90_CASES = (
    Case(1, 2, 2, 131, 515, True, "bmhd"),
    Case(1, 1, 1, 128, 512, False, seed=1),
    Case(1, 1, 1, 5, 130, False, "cold", seed=2),
)
TRITON_CASES = (
    Case(1, 4, 2, 65, 197, True, "bmhd"),
    Case(1, 1, 1, 64, 192, False, seed=1),
    Case(1, 1, 1, 5, 3, False, "far rows"),
    Case(1, 1, 1, 65, 3, True),
)


FP32_CASES = (Case(1, 2, 2, 17, 70, True, dtype=torch.float32),)


def flash_general(folder: Path, cases: tuple[Case, ...]) -> Iterator[Wrong]:
    source = folder / "flash_fwd.cu"
    yield from attention_cases(flash_cuda.flash_fwd, cases, source=source, check=False)


def flash_sm90(folder: Path) -> Iterator[Wrong]:
    source = folder / "flash_fwd_sm90.cu"
    yield from attention_cases(flash_cuda.flash_fwd_sm90, SM90_CASES, source=source, check=False)


def flash_triton(folder: Path) -> Iterator[Wrong]:
    yield from attention_cases(_module(folder / "flash_fwd.py").flash_fwd, TRITON_CASES)


def _module(path: Path) -> ModuleType:
    """A Python file as a module of its own."""
    name = "mutant_" + path.parent.name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer_norm(folder: Path) -> Iterator[Wrong]:
    for rows, D, threads in ((3, 2000, 128), (2, 197, 256)):
        torch.manual_seed(0)
        x = (torch.randn(rows, D + 24) * 3 + 1)[:, :D]
        w, b = torch.randn(2, D)
        y, (mean, rstd) = torch.full((rows, D), math.nan), torch.full((2, rows), math.nan)
        aligned = D % 4 == 0
        params = struct(
            "<6Q2q2if4x", x, w, b, y, mean, rstd, x.stride(0), y.stride(0), D, int(aligned), 1e-5
        )
        report = nvcc_run.launch(
            folder / "layer_norm.cu", "layer_norm_fp32", rows, threads, params,
            gpu=Emulator(80), check=False,
        )  # fmt: skip
        exact, eager = (
            torch.nn.functional.layer_norm(x.to(t), (D,), w.to(t), b.to(t), 1e-5)
            for t in (torch.float64, torch.float32)
        )
        means = x.double().mean(1), x.mean(1)
        yield judged(report, {"y": (y, exact, eager), "mean": (mean, *means)})


def layer_norm_bwd(folder: Path, way: str) -> Iterator[Wrong]:
    """Dw and db are sums over rows, with two rows for each row of partial sums."""
    run = _module(folder / "layer_norm_bwd.py").layer_norm_bwd
    for rows, D, seed in ((9, 65, 0), (9, 65, 1)):
        torch.manual_seed(0)
        x, dy = torch.randn(2, rows, D)
        w = torch.randn(D)
        mean = x.mean(1)
        rstd = (x.var(1, correction=0) + 1e-5).rsqrt()
        try:
            dx, dw, db, _ = run(dy, x, w, mean, rstd, way=way, programs=4, seed=seed)
        except EmulationError as error:
            yield set(error.report.kinds())
            continue
        exact, eager = (_layer_norm_gradients(dy, x, w, t) for t in (torch.float64, torch.float32))
        names = ("dx", "dw", "db")
        wrong: Wrong = set()
        for name, actual, true, own in zip(names, (dx, dw, db), exact, eager, strict=True):
            try:
                numerics.check(actual, true, own, name, "gradient")
            except AssertionError:
                wrong.add("numerics")
        yield wrong


def _layer_norm_gradients(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, torch.zeros_like(w))]
    y = torch.nn.functional.layer_norm(leaves[0], w.shape, leaves[1], leaves[2], 1e-5)
    return torch.autograd.grad(y, leaves, dy.to(dtype))


_FLASH = ("flash_fwd.cu", "flash_softmax.cuh", "primitives.cuh")
_SM90 = ("flash_fwd_sm90.cu", "copy_engine.cuh", "wgmma.cuh", "primitives_sm90.cuh", *_FLASH[1:])
_NORM = ("layer_norm.cu", "primitives.cuh")
_NORM_HALVES = "LAYER_NORM_ENTRY(bf16, bf16)\nLAYER_NORM_ENTRY(fp16, fp16)\n"


def _entry(name: str) -> dict[str, tuple[str, str]]:
    """Leaves one of flash_fwd.cu's nine kernels."""
    entries = "FLASH_ENTRIES(32)\nFLASH_ENTRIES(64)\nFLASH_ENTRIES(128)\n"
    return {"flash_fwd.cu": (entries, f"FLASH_ENTRY({name}, 64)\n")}


_ALL = [
    Kernel("flash", _FLASH, partial(flash_general, cases=GENERAL_CASES), _entry("bf16, bf16")),
    Kernel("flash fp32", _FLASH, partial(flash_general, cases=FP32_CASES), _entry("fp32, float")),
    Kernel("flash sm90", _SM90, flash_sm90, {_SM90[0]: ("FLASH_ENTRY(fp16)\n", "")}),
    Kernel("layer_norm", _NORM, layer_norm, {_NORM[0]: (_NORM_HALVES, "")}),
    Kernel("triton flash", ("flash_fwd.py",), flash_triton, {}),
]
for _way in ("partial", "wide", "lock"):
    _cases = partial(layer_norm_bwd, way=_way)
    _ALL.append(Kernel(f"triton {_way}", ("layer_norm_bwd.py",), _cases, {}))
KERNELS = {kernel.name: kernel for kernel in _ALL}
