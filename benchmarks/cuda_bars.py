"""The promises of the CUDA C++ kernels that a machine without a GPU can keep: counts of their machine code and of
emulated launches, and what their build takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.bar import Bar, unmeasured

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "86", "89", "90a", "100", "120")


def cuda() -> Iterator[Bar]:
    """Main loops, spills, shared memory."""
    from pyfuse.backends import cuda_device

    if cuda_device._cuda is None:
        yield unmeasured("CUDA kernels", cuda_device.NOT_BUILT, "")
        return
    sys.path.insert(0, str(ROOT / "tests"))  # where ptxemu and cuda_code are
    yield from _main_loops()
    yield _spills()
    yield from _shared()
    yield from _global()


def _main_loops() -> Iterator[Bar]:
    """Issued instructions, without those of the correction that most rounds pass by."""
    from cuda_code import kernels_of

    for d, issue in ((64, 4.2), (128, 3.4)):
        loop = kernels_of(f"attention_fwd_bf16_d{d}", "80")["forward"].usual_loop
        name = f"attention_fwd.cu D{d} bf16 sm_80:"
        figure = loop.per_mma()
        yield Bar(f"{name} instructions per HMMA", f"{figure:.2f}", f"<= {issue}", figure <= issue)
        figure = loop.per_mma("LDSM")
        yield Bar(f"{name} ldmatrix per HMMA", f"{figure:.4f}", "<= 0.31", figure <= 0.31)
        for kernel in ("dkdv", "dq"):
            loop = kernels_of(f"attention_bwd_{kernel}_bf16_d{d}", "80")[kernel].usual_loop
            name, figure = f"attention_bwd_{kernel}.cu D{d} bf16 sm_80:", loop.per_mma()
            yield Bar(f"{name} instructions per HMMA", f"{figure:.2f}", "<= 4.5", figure <= 4.5)


def _spills() -> Bar:
    """Of the forward's kernels for head sizes 64 and 128, on every architecture."""
    from cuda_code import kernels_of

    count, spilled = 0, []
    for arch in ARCHS:
        for dtype in ("bf16", "f16", "f32"):
            for d in (64, 128):
                for entry, code in kernels_of(f"attention_fwd_{dtype}_d{d}", arch).items():
                    count += 1
                    if not code.in_registers:
                        spilled.append(f"{entry} {dtype} D{d} sm_{arch} {code.stack} B")
    figure = f"{len(spilled)} of {count}" + (f": {', '.join(spilled)}" if spilled else "")
    return Bar("attention_fwd.cu D64 and D128: kernels that spill", figure, "0", not spilled)


def _shared() -> Iterator[Bar]:
    from emulated import standing_in

    import pyfuse

    for arch in (80, 90):
        for d in (64, 128):
            q, k, v = (torch.randn(1, 384, 2, d).bfloat16().transpose(1, 2) for _ in "qkv")
            leaves = [x.requires_grad_() for x in (q, k, v)]
            with standing_in(arch, backend="cuda") as gpu:
                pyfuse.attention(*leaves, causal=True, backend="cuda").sum().backward()
            counters: list[dict[str, Any]] = [report.counters for report in gpu.reports]
            actual = sum(c["shared_wavefronts"] for c in counters)
            ideal = sum(c["shared_wavefronts_ideal"] for c in counters)
            name = f"attention and its gradient bf16 D{d} sm_{arch}: shared wavefronts / ideal"
            yield Bar(name, f"{actual / ideal:.3f}", "1.000", actual == ideal)


def _global() -> Iterator[Bar]:
    """Sectors against each input read and each output written once; blocks have as many rows as in large calls."""
    import pyfuse
    from pyfuse.backends import cuda_norm_gradient, gpu_chip

    rows, d = 400, 768
    x, residual, w, b = (
        torch.randn(*size).bfloat16() for size in ((rows, d), (rows, d), (d,), (d,))
    )
    q, k = (torch.randn(1, 256, h, 128).bfloat16().transpose(1, 2) for h in (8, 2))
    cos, sin = torch.rand(2, 256, 64)
    table, ids = torch.randn(200, d).bfloat16(), torch.randint(0, 200, (1, 512))
    caches = torch.randn(2, 2, 2, 1504, 128).bfloat16()
    lengths, query = torch.tensor([1500, 260]), torch.randn(2, 8, 1, 128).bfloat16()
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "layer_norm": (lambda: pyfuse.layer_norm(x, w, b, backend="cuda"), _nbytes(x, x, w, b)),
        "add and rms_norm": (
            lambda: pyfuse.rms_norm(x, w, residual=residual, prenorm=True, backend="cuda"),
            _nbytes(x, x, x, x, w),
        ),
        "rope_pair": (
            lambda: pyfuse.rope_pair(q, k, cos, sin, layout="half", backend="cuda"),
            _nbytes(q, q, k, k, cos, sin),
        ),
        "embed and norm": (
            lambda: pyfuse.embed(ids, table, norm_weight=w, norm_bias=b, backend="cuda"),
            2 * 512 * d * 2 + _nbytes(ids, w, b),
        ),
        "decode": (
            lambda: pyfuse.decode_attention(query, *caches, seqlens_k=lengths, backend="cuda"),
            2 * int(lengths.sum()) * 2 * 128 * 2 + _nbytes(query, query),
        ),
    }
    for name, (call, once) in calls.items():
        yield _sectors(name, call, once)
    for leaf in (x, residual, w, b):
        leaf.requires_grad_()

    def trained() -> None:
        y, z = pyfuse.layer_norm(x, w, b, residual=residual, prenorm=True, backend="cuda")
        torch.autograd.backward((y, z), (torch.ones_like(y), torch.ones_like(z)))

    one = patch.dict(gpu_chip.MULTIPROCESSORS, {80: 1})
    with one, patch.object(cuda_norm_gradient, "AT_ONCE", 1):
        # Forward: x, residual, y, z; backward: z, dy, dz, dx (of both). Mean and 1/σ are written, then read.
        once = 8 * _nbytes(x) + 2 * (2 * 4 * rows) + _nbytes(w, b) + _nbytes(w, w, b)
        yield _sectors("layer_norm and its gradient", trained, once)


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _sectors(name: str, call: Callable[[], object], once: int) -> Bar:
    from emulated import CudaOfCpuTensors, standing_in

    with standing_in(80, backend="cuda") as gpu:
        assert isinstance(gpu, CudaOfCpuTensors)
        gpu.multiprocessors = 1
        call()
    sectors = sum(r.counters["sectors"] + r.counters["copied_sectors"] for r in gpu.reports)
    figure = sectors * 32 / once
    return Bar(
        f"{name} bfloat16 sm_80: sectors / ideal", f"{figure:.3f}", "<= 1.05", figure <= 1.05
    )


def cuda_build() -> Iterator[Bar]:
    """The whole extension for all architectures, from nothing."""
    import pybind11

    target = "the CUDA extension for 6 architectures"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        configure = [
            "cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DPYFUSE_CUDA=on",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        build = ["cmake", "--build", folder, "--target", "_cuda", "--parallel", str(os.cpu_count())]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        minutes = (time.perf_counter() - start) / 60
        size = next(Path(folder).glob("_cuda*.so")).stat().st_size / 1e6
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    yield Bar(f"build of {target}", f"{minutes:.1f} min", "<= 6 min", minutes <= 6)
    yield Bar("its largest job", f"{gigabytes:.1f} GB", "<= 3 GB", gigabytes <= 3)
    yield Bar(f"size of {target}", f"{size:.0f} MB", "<= 40 MB", size <= 40)
