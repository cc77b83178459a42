"""Machine code of the units of pyfuse._cuda, as cmake/cuda.cmake has it compiled."""

from __future__ import annotations

from pathlib import Path

from ptxemu import nvcc_run, sass

from pyfuse.backends import cuda_device

ROOT = Path(__file__).resolve().parent.parent


def kernels_of(unit: str, arch: str) -> dict[str, sass.Sass]:
    """By the names of their entries; arch as nvcc has it: "80", "90a". Code of all units but Hopper's own is assembled
    from PTX for sm_80."""
    source, options, built = cuda_device.module().units()[unit]
    virtual = None if built == "sm_90a" else "80"
    number = arch if virtual is None else arch.rstrip("af")
    cubin = nvcc_run.compile_cubin(ROOT / source, number, None, options.split(), virtual)
    return sass.read_cubin(cubin)
