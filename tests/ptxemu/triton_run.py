"""Run a Triton kernel from ordinary CPU tensors: compiled by Triton as for a GPU, its PTX executed by the emulator.

report = launch(kernel, (programs,), x, y, n, arch=90, num_warps=4, BLOCK=128)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import ptxemu

from .gpu import Emulator, Gpu
from .triton_compile import (
    Compiled,
    TritonNotFound,
    bind,
    compile_bound,
    compile_kernel,
    compile_ptx,
)

if TYPE_CHECKING:
    from triton import JITFunction

    from ptxemu import Report

__all__ = ["Compiled", "TritonNotFound", "compile_kernel", "compile_ptx", "launch"]

# Shared memory that one block may ask for, in bytes (CUDA programming guide, compute capabilities).
MAX_SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
MAX_SHARED |= {120: 101376, 121: 101376}

Grid = Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]


def launch(
    fn: JITFunction,
    grid: Grid,
    *args: Any,
    arch: int = 80,
    gpu: Gpu | None = None,
    seed: int = 0,
    check: bool = True,
    **options: Any,
) -> Report:
    """Run `fn` over `grid` and return its report: in the emulator of an architecture, or on `gpu`.

    args: the kernel's arguments: CPU tensors (pointers; wrapped in ptxemu.Output, their memory counts as never
    written), int, float, bool, None, tuples of these. options: its constexpr arguments, and Triton's options
    (num_warps=4, num_stages=3, num_ctas=1, maxnreg, debug, enable_fp_fusion=True, ...). arch: compute capability,
    80 for sm_80. grid: up to three sizes, or a function of the arguments that returns them. seed: order of warps
    and blocks. check: raise ptxemu.EmulationError if the emulator found a fault.
    """
    gpu = gpu or Emulator(arch)
    arch = gpu.arch
    bound = bind(fn, args, arch, options)
    compiled = compile_bound(fn, bound, arch, assemble=not gpu.emulated)
    sizes = _grid(grid, bound.arguments)
    metadata = compiled.kernel.metadata
    limit = MAX_SHARED.get(arch, metadata.shared)
    if metadata.shared > limit:
        name = fn.__name__
        raise ValueError(f"{name}: {metadata.shared} B of shared memory, sm_{arch} has {limit}")
    leaves = [leaf for leaf in bound.leaves() if leaf.kind != "constexpr"]
    values = [bound.wrap(_pack(leaf.value, leaf.kind)) for leaf in leaves]
    programs = math.prod(sizes) * metadata.num_ctas
    scratch = [
        _scratch(programs * metadata.global_scratch_size, metadata.global_scratch_align),
        _scratch(programs * metadata.profile_scratch_size, metadata.profile_scratch_align),
    ]
    report = gpu.module(compiled.ptx, lambda: compiled.cubin).launch(
        metadata.name,
        grid=(sizes[0] * metadata.num_ctas, *sizes[1:]),
        block=(compiled.threads, 1, 1),
        args=[*values, *scratch],
        shared=metadata.shared,
        seed=seed,
        cluster=(metadata.num_ctas, 1, 1),
        names={i: leaf.name for i, leaf in enumerate(leaves)},
    )
    if check:
        report.check()
    return report


def _grid(grid: Grid, arguments: dict[str, Any]) -> tuple[int, int, int]:
    sizes = tuple(grid(arguments) if callable(grid) else grid)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"grid: {sizes}, needs one to three positive sizes")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _pack(value: Any, kind: str) -> Any:
    """The value of a parameter: 16-bit floats are passed as their two bytes."""
    if kind == "fp16":
        return struct.pack("<e", value)
    if kind == "bf16":
        return struct.pack("<f", torch.tensor(value).bfloat16().item())[2:]
    return value


def _scratch(size: int, align: int) -> ptxemu.Output | int:
    """Undefined memory that Triton's generated code works in (tensor maps, for one); null when it needs none."""
    if not size:
        return 0
    memory = torch.empty(size + align, dtype=torch.uint8)
    start = -memory.data_ptr() % align
    return ptxemu.Output(memory[start : start + size])
