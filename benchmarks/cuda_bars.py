"""The promises of the CUDA C++ kernels that a machine without a GPU can keep: counts of their machine code and of
emulated launches, and what their build takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def _main_loops() -> Iterator[Bar]:
    """Issued instructions, without those of the correction that most rounds pass by."""
    from cuda_code import kernels_of

    for d, issue in ((64, 4.2), (128, 3.4)):
        loop = kernels_of(f"attention_fwd_bf16_d{d}", "80")["forward"].usual_loop
        name = f"attention_fwd.cu D{d} bf16 sm_80:"
        figure = loop.per_mma()
        yield Bar(f"{name} instructions per HMMA", f"{figure:.2f}", f"<= {issue}", figure <= issue)
        figure = loop.per_mma("LDSM")
        yield Bar(f"{name} ldmatrix per HMMA", f"{figure:.2f}", "<= 0.31", round(figure, 2) <= 0.31)


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
            q, k, v = torch.randn(3, 1, 384, 2, d).bfloat16().transpose(2, 3)
            with standing_in(arch, backend="cuda") as gpu:
                pyfuse.attention(q, k, v, causal=True, backend="cuda")
            counters: list[dict[str, Any]] = [report.counters for report in gpu.reports]
            actual = sum(c["shared_wavefronts"] for c in counters)
            ideal = sum(c["shared_wavefronts_ideal"] for c in counters)
            name = f"attention forward bf16 D{d} sm_{arch}: shared wavefronts / ideal"
            yield Bar(name, f"{actual / ideal:.3f}", "1.000", actual == ideal)


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
