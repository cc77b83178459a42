"""The promises of the PTX emulator (tests/ptxemu): how long a launch, its build and its tests take.

Its launches run on one core, with every check on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bar import Bar

ROOT = Path(__file__).resolve().parent.parent
HEADS, HEAD_SIZE = 2, 64
ROUNDS = 9


def emulator() -> Iterator[Bar]:
    """Launches, build, tests."""
    sys.path.insert(0, str(ROOT / "tests"))  # where the package ptxemu is
    yield from _launches()
    yield _build()
    yield _tests()


def _launches() -> Iterator[Bar]:
    """The CUDA C++ sample's forward on sm_80 in bf16, after its result was compared with float64."""
    from ptxemu import gpu, nvcc_run
    from ptxemu.samples import flash_cuda

    if nvcc_run.find_nvcc() is None:
        yield Bar("flash forward in the emulator", "no nvcc on this machine", "<= 20 ms", False)
        return
    for length, target in ((128, 20), (1024, 600)):
        q, k, v = (torch.randn(1, HEADS, length, HEAD_SIZE, dtype=torch.bfloat16) for _ in "qkv")
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            o, _, _ = flash_cuda.flash_fwd(q, k, v, gpu=gpu.Emulator(80))
            times.append(1e3 * (time.perf_counter() - start))
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert (o.double() - exact).abs().max() < 1e-2, "the launch that is timed is wrong"
        median = sorted(times)[ROUNDS // 2]
        yield Bar(
            f"{HEADS} heads x {length} x {HEAD_SIZE} forward in the emulator",
            f"{median:.1f} ms (best {min(times):.1f})", f"<= {target} ms", median <= target,
        )  # fmt: skip


def _build() -> Bar:
    """From nothing, with all cores."""
    from ptxemu.build import compile_into

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compile_into(Path(folder))
        seconds = time.perf_counter() - start
    return Bar("build of the emulator", f"{seconds:.0f} s", "<= 60 s", seconds <= 60)


def _tests() -> Bar:
    """All of its tests, every kernel compiled anew."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/ptxemu"],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PTXEMU_CACHE": cache},
        )  # fmt: skip
        seconds = time.perf_counter() - start
    return Bar("the emulator's tests", f"{seconds / 60:.1f} min", "<= 4 min", seconds <= 240)
