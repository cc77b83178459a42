"""The Triton samples: the same bodies in the emulator and on a GPU, with the pinned and with the newest Triton."""

from __future__ import annotations

import numerics
import pytest
import torch

from ptxemu import triton_run
from ptxemu.gpu import Emulator, Gpu
from ptxemu.sample_cases import DTYPES, Case

pytest.importorskip("triton", reason="Triton is not installed")

from ptxemu.samples import flash_fwd as flash
from ptxemu.samples import layer_norm_bwd

pytestmark = pytest.mark.triton

# Few sizes in many variants: a size of 1 and multiples of 16 are compiled apart from all others.
CASES = [
    *(
        Case(M, N, causal, dtype)
        for dtype in DTYPES
        for M, N, causal in ((111, 197, True), (65, 63, False))
    ),
    Case(128, 128, True),
    Case(63, 1),
    Case(3, 65, True, torch.float16),
]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flash_forward(gpu: Gpu, case: Case, tma: bool) -> None:
    q, k, v = case.inputs()
    o, lse, report = flash.flash_fwd(q, k, v, causal=case.causal, tma=tma, gpu=gpu)
    case.check(q, k, v, o, lse)
    if gpu.emulated and case.dtype != torch.float32:
        used = "wgmma" if gpu.arch == 90 else "mma"
        assert report.counters[used] > 0
        assert (report.counters["bulk"] > 0) == (tma and gpu.arch >= 90), (
            "descriptors become TMA where there is one"
        )


@pytest.mark.parametrize("warps, block_m, stages", [(8, 128, 3), (4, 64, 1)])
def test_flash_forward_in_other_tiles(gpu: Gpu, warps: int, block_m: int, stages: int) -> None:
    case = Case(197, 130)
    q, k, v = case.inputs()
    tiles = flash.Tiles(block_m=block_m, warps=warps, stages=stages)
    o, lse, _ = flash.flash_fwd(q, k, v, tiles=tiles, gpu=gpu)
    case.check(q, k, v, o, lse)


@pytest.mark.archs(80, 90)
def test_flash_forward_in_three_tf32_products(gpu: Gpu) -> None:
    """In chains of sums that are cut off; Ampere's keep a bit less, and miss the rule by a tenth if they are longer."""
    n, d = (65, 64) if gpu.arch >= 90 else (33, 32)
    case = Case(65, n, False, torch.float32, D=d)
    q, k, v = case.inputs()
    o, lse, report = flash.flash_fwd(q, k, v, precision="tf32x3", gpu=gpu)
    case.check(q, k, v, o, lse)
    if gpu.emulated:
        assert report.counters["mma"] + report.counters["wgmma"] > 0


@pytest.mark.archs(80)
def test_one_tf32_product_is_not_enough_for_float32(gpu: Gpu) -> None:
    """What Triton's interpreter would hide: it multiplies in full float32."""
    case = Case(65, 65, False, torch.float32)
    q, k, v = case.inputs()
    o, lse, _ = flash.flash_fwd(q, k, v, precision="tf32", gpu=gpu)
    with pytest.raises(AssertionError, match="error"):
        case.check(q, k, v, o, lse)


@pytest.mark.archs(80)
@pytest.mark.parametrize("D", [16, 40, 128])
def test_flash_forward_of_other_head_sizes(gpu: Gpu, D: int) -> None:
    case = Case(65, 70, True, D=D, batch=2)
    q, k, v = case.inputs()
    o, lse, _ = flash.flash_fwd(q, k, v, causal=True, gpu=gpu)
    case.check(q, k, v, o, lse)


@pytest.mark.archs(80)
def test_flash_forward_of_grouped_heads(gpu: Gpu) -> None:
    q, k, v = torch.randn(1, 4, 65, 64), torch.randn(1, 2, 70, 64), torch.randn(1, 2, 70, 64)
    o, lse, _ = flash.flash_fwd(q, k, v, gpu=gpu)
    Case(65, 70, False, torch.float32).check(q, k, v, o, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["partial", "wide", "lock"])
def test_layer_norm_backward(gpu: Gpu, way: str, dtype: torch.dtype) -> None:
    rows, size = 13, 197
    x, dy = (torch.randn(rows, size) * 2 + 1).to(dtype), torch.randn(rows, size).to(dtype)
    w, b = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    wide = x.double()
    mean, rstd = wide.mean(1).float(), (wide.var(1, unbiased=False) + 1e-5).rsqrt().float()
    block = 64 if way == "wide" else None
    *gradients, _ = layer_norm_bwd.layer_norm_bwd(
        dy, x, w, mean, rstd, way=way, programs=4, block_d=block, gpu=gpu
    )
    exact, eager = (_gradients(dy.to(t), x.to(t), w.to(t), b.to(t)) for t in (torch.float64, dtype))
    for name, actual, e, own in zip(("dx", "dw", "db"), gradients, exact, eager, strict=True):
        numerics.check(actual, e, own, name, "gradient")


def _gradients(dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, w, b = leaves
    y = torch.nn.functional.layer_norm(x, (x.shape[1],), w, b, 1e-5)
    return torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("seed", range(4))
def test_a_lock_lets_every_order_of_programs_finish(seed: int) -> None:
    x, dy, w = torch.randn(24, 64), torch.randn(24, 64), torch.randn(64)
    mean, rstd = x.mean(1), (x.var(1, unbiased=False) + 1e-5).rsqrt()
    *_, db, _ = layer_norm_bwd.layer_norm_bwd(
        dy, x, w, mean, rstd, way="lock", programs=2, gpu=Emulator(80), seed=seed
    )
    numerics.check(db, dy.double().sum(0), dy.sum(0), "db", "gradient")


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, "gfx90a", "gfx942"])
def test_samples_compile_for(arch: int | str) -> None:
    q, k, v, o = torch.empty(4, 1, 2, 128, 64, dtype=torch.bfloat16)
    kernel, args, options = flash.plan(q, k, v, o, torch.empty(1, 2, 128), causal=True)
    compiled = triton_run.compile_kernel(kernel, *args, arch=arch, **options)
    assert compiled.amdgcn if isinstance(arch, str) else compiled.cubin
