"""Machine code of the units of pyfuse._cuda, as cmake/cuda.cmake has it compiled."""

from __future__ import annotations

from pathlib import Path

from ptxemu import nvcc_run, sass

from pyfuse.backends import cuda_device

ROOT = Path(__file__).resolve().parent.parent


def kernels_of(unit: str, arch: str) -> dict[str, sass.Sass]:
    """By the names of their entries; arch as nvcc has it: "80", "90a". Assembled as in the build, from the PTX for the
    latest architecture up to this one."""
    source, options, ptx = cuda_device.module().units()[unit]
    if ptx == arch:
        virtual, number = None, arch
    else:
        number = arch.rstrip("af")
        virtual = max((x for x in ptx.split() if int(x) <= int(number)), key=int)
    cubin = nvcc_run.compile_cubin(ROOT / source, number, None, options.split(), virtual)
    return sass.read_cubin(cubin)
