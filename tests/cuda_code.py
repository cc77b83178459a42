"""Machine code of the units of pyfuse._cuda, as nvcc compiles them."""

from __future__ import annotations

from pathlib import Path

from ptxemu import nvcc_run, sass

from pyfuse.backends import cuda_device

ROOT = Path(__file__).resolve().parent.parent


def kernels_of(unit: str, arch: str) -> dict[str, sass.Sass]:
    """By the names of their entries; arch as nvcc has it: "80", "90a"."""
    source, options, _ = cuda_device.module().units()[unit]
    return sass.read_cubin(nvcc_run.compile_cubin(ROOT / source, arch, flags=options.split()))
