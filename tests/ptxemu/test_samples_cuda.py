"""The CUDA C++ samples: the same bodies in the emulator and on a GPU."""

from __future__ import annotations

import math

import numerics
import pytest
import torch

from ptxemu import TensorMap, nvcc_run, struct
from ptxemu.gpu import Emulator, Gpu
from ptxemu.sample_cases import CASES, Case
from ptxemu.samples import flash_cuda

pytestmark = pytest.mark.skipif(
    nvcc_run.find_nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME"
)

SAMPLES = flash_cuda.FOLDER
HALVES = [case for case in CASES if case.dtype != torch.float32]
TMA_KERNELS = SAMPLES / "tma_copy.cu"


def check_clean(report: object, gpu: Gpu) -> None:
    """No bank conflicts: every access of the kernel's own tiles takes the fewest wavefronts."""
    if gpu.emulated:
        counters = report.counters  # type: ignore[attr-defined]
        assert counters["shared_wavefronts"] == counters["shared_wavefronts_ideal"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flash_forward(gpu: Gpu, case: Case) -> None:
    q, k, v = case.inputs()
    o, lse, report = flash_cuda.flash_fwd(q, k, v, causal=case.causal, gpu=gpu)
    case.check(q, k, v, o, lse)
    check_clean(report, gpu)


@pytest.mark.archs(80)
@pytest.mark.parametrize("D", [32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_flash_forward_of_other_head_sizes(gpu: Gpu, D: int, dtype: torch.dtype) -> None:
    case = Case(111, 130, True, dtype, D, batch=2, transposed=False)
    q, k, v = case.inputs()
    o, lse, _ = flash_cuda.flash_fwd(q, k, v, causal=True, gpu=gpu)
    case.check(q, k, v, o, lse)


@pytest.mark.archs(90)
@pytest.mark.parametrize(
    "case", [*HALVES, Case(300, 411, True, heads=1), Case(411, 300, False, heads=1)], ids=str
)
def test_flash_forward_with_wgmma(gpu: Gpu, case: Case) -> None:
    q, k, v = case.inputs()
    o, lse, report = flash_cuda.flash_fwd_sm90(q, k, v, causal=case.causal, gpu=gpu)
    case.check(q, k, v, o, lse)
    check_clean(report, gpu)
    if gpu.emulated and case.N > 128:
        assert report.counters["wgmma"] and not report.counters["mma"]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_warps_gives_the_same_bits(seed: int) -> None:
    case = Case(197, 300, True, heads=1)
    q, k, v = case.inputs()
    first = flash_cuda.flash_fwd_sm90(q, k, v, causal=True, seed=0)
    again = flash_cuda.flash_fwd_sm90(q, k, v, causal=True, seed=seed + 1)
    for actual, expected, name in zip(again[:2], first[:2], ("o", "lse"), strict=True):
        numerics.assert_bitwise_equal(actual, expected, name)


def test_keys_beyond_the_last_are_never_read() -> None:
    """NaN behind N changes nothing, and nothing is read there: the storage's rest belongs to no argument."""
    case = Case(65, 70)
    q, k, v = case.inputs()
    padded = [torch.full((1, 128, 2, 64), math.nan, dtype=x.dtype).transpose(1, 2) for x in (k, v)]
    for wide, x in zip(padded, (k, v), strict=True):
        wide[:, :, : case.N] = x
    k_view, v_view = (wide[:, :, : case.N] for wide in padded)
    o, lse, _ = flash_cuda.flash_fwd(q, k_view, v_view)
    case.check(q, k, v, o, lse)


@pytest.mark.parametrize("size", [1, 7, 64, 200, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.archs(80, 120)
def test_layer_norm(gpu: Gpu, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, size + 3) * 2 + 3).to(dtype)[:, :size]
    w, b = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    y, mean, rstd = (
        torch.full((5, size), math.nan, dtype=dtype),
        torch.full((5,), math.nan),
        torch.full((5,), math.nan),
    )
    params = struct("<6Q2q2if4x", x, w, b, y, mean, rstd, x.stride(0), size, size, 0, 1e-5)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    nvcc_run.launch(SAMPLES / "layer_norm.cu", f"layer_norm_{name}", 5, 128, params, gpu=gpu)
    exact = torch.nn.functional.layer_norm(x.double(), (size,), w.double(), b.double(), 1e-5)
    eager = torch.nn.functional.layer_norm(x, (size,), w, b, 1e-5)
    numerics.check(y, exact, eager, "y")
    numerics.check(mean, x.double().mean(1), x.float().mean(1), "mean")


# ---- the copy engine


def swizzled(size: int, swizzle: str) -> torch.Tensor:
    """Where byte i of a box lies: the number of its 16-byte chunk is XORed with bits 7.. of its address."""
    at = torch.arange(size)
    chunks = {"none": 1, "32B": 2, "64B": 4, "128B": 8}[swizzle]
    return at ^ (((at >> 7) & (chunks - 1)) << 4)


@pytest.mark.archs(90, 120)
@pytest.mark.parametrize(
    "swizzle, box", [("none", (8, 40)), ("32B", (16, 16)), ("64B", (16, 32)), ("128B", (16, 64))]
)
@pytest.mark.parametrize("x, y", [(0, 0), (-5, -3), (190, 30), (300, 0)])
def test_tma_load(gpu: Gpu, swizzle: str, box: tuple[int, int], x: int, y: int) -> None:
    tensor = torch.randn(37, 200).half()
    rows, columns = box
    size = rows * columns * 2
    out = torch.zeros(size, dtype=torch.uint8)
    tensor_map = TensorMap(tensor, box, swizzle)  # type: ignore[arg-type]
    nvcc_run.launch(
        TMA_KERNELS, "tma_load_2d", 1, 64, tensor_map, out, x, y, size, gpu=gpu, shared=size
    )
    expected = torch.zeros(37 + 600, 200 + 600).half()
    expected[300 : 300 + 37, 300 : 300 + 200] = tensor
    expected = expected[300 + y : 300 + y + rows, 300 + x : 300 + x + columns]
    assert torch.equal(out[swizzled(size, swizzle)].view(torch.half).view(rows, columns), expected)


@pytest.mark.archs(90, 120)
def test_tma_copies_between_tensors(gpu: Gpu) -> None:
    a, b = torch.randn(20, 64), torch.zeros(19, 48)
    maps = [TensorMap(x, (8, 32), "128B") for x in (a, b)]
    nvcc_run.launch(
        TMA_KERNELS, "tma_copy_2d", 1, 32, *maps, 4, 2, 40, 15, 1024, gpu=gpu, shared=1024
    )
    expected = torch.zeros(19, 48)
    expected[15:19, 40:48] = a[2:6, 4:12]
    assert torch.equal(b, expected)


@pytest.mark.archs(90, 120)
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_bulk_copies_in_two_stages(gpu: Gpu, pieces: int) -> None:
    x = torch.randn(512 * pieces)
    y = torch.zeros_like(x)
    nvcc_run.launch(TMA_KERNELS, "bulk_scale", 1, 128, x, y, 2.5, x.numel(), gpu=gpu)
    assert torch.equal(y, 2.5 * x)


@pytest.mark.archs(90, 120)
def test_memory_barriers(gpu: Gpu) -> None:
    x = torch.randn(32 * 7)
    y = torch.zeros_like(x)
    nvcc_run.launch(TMA_KERNELS, "mbarrier_ring", 1, 64, x, y, 7, gpu=gpu)
    assert torch.equal(y, x + 1)
    z = torch.zeros(96)
    nvcc_run.launch(TMA_KERNELS, "mbarrier_reverse", 1, 96, x[:96], z, gpu=gpu, shared=96 * 4)
    assert torch.equal(z, x[:96].flip(0))


@pytest.mark.archs(90, 120)
def test_clusters(gpu: Gpu) -> None:
    x = torch.randn(8 * 64)
    sums = torch.zeros(2)
    nvcc_run.launch(TMA_KERNELS, "cluster_sum", 8, 64, x, sums, gpu=gpu, cluster=4)
    numerics.check(sums, x.double().view(2, -1).sum(1), x.view(2, -1).sum(1), "sum")
    tensor, out = torch.randn(16, 32), torch.zeros(4, 8, 16)
    box = TensorMap(tensor, (8, 16))
    nvcc_run.launch(
        TMA_KERNELS, "tma_multicast_2d", 4, 64, box, out, 8, 4, 512, gpu=gpu, shared=512, cluster=2
    )
    assert torch.equal(out, tensor[4:12, 8:24].expand(4, 8, 16))


def test_compile_errors_carry_the_compiler_s_words(tmp_path: object) -> None:
    source = tmp_path / "broken.cu"  # type: ignore[operator]
    source.write_text('extern "C" __global__ void broken(float* x) { x[0] = undefined_name; }\n')
    with pytest.raises(nvcc_run.CompileError, match="undefined_name"):
        nvcc_run.launch(source, "broken", 1, 1, torch.zeros(1), gpu=Emulator(80))
