"""The promises of the Triton kernels that a machine without a GPU can keep: counts of their compiled code, not times.

Instructions come from the assembler's output, wavefronts and sectors from running it in the emulator (tests/ptxemu).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bar import Bar

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
NVIDIA, AMD = (80, 86, 89, 90, 100, 120), ("gfx90a", "gfx942")


def triton() -> Iterator[Bar]:
    """Main loops, spills, tensor cores, shared and global memory."""
    sys.path.insert(0, str(ROOT / "tests"))  # where ptxemu and the recorder of launches are
    yield from _main_loops()
    yield from _units()
    yield from _spills()
    yield from _memory()


def _code(arch: int | str, kernel: str, **call: Any) -> Any:
    from launches import attention_launches

    return attention_launches(arch, **call)[kernel].compiled(arch).code


def _main_loops() -> Iterator[Bar]:
    for d, target in ((64, 5.5), (128, 4.8)):
        figure = _code(80, "flash_fwd_kernel", d=d, dtype=BF16, causal=True).main_loop.per_mma()
        name = f"flash_fwd D{d} causal bf16 sm_80: instructions per HMMA"
        yield Bar(name, f"{figure:.2f}", f"<= {target}", figure <= target)


def _units() -> Iterator[Bar]:
    """Which units the forward's main loop uses."""
    for arch, name in ((90, "HGMMA"), (100, "UTCHMMA"), ("gfx942", "v_mfma")):
        count = _code(arch, "flash_fwd_kernel", d=64, dtype=BF16, causal=True).body.count(name)
        yield Bar(f"flash_fwd on {_arch(arch)}: {name}", str(count), ">= 1", count >= 1)
    for arch in (90, 100, 120):
        loop = _code(arch, "flash_fwd_kernel", d=64, dtype=BF16, causal=True).main_loop
        count = loop.count("UTMALDG")
        yield Bar(f"flash_fwd on {_arch(arch)}: TMA loads in the loop", str(count), "2", count == 2)


def _arch(arch: int | str) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


def _spills() -> Iterator[Bar]:
    """Every attention kernel x head size x GPU as shipped, in bf16; its tests have float32 and the options."""
    from launches import attention_launches
    from ptxemu import sass

    count, spilled = 0, []
    for arch in (*NVIDIA, *AMD):
        for d in (64, 128, 256):
            for name, launch in attention_launches(arch, d, BF16, causal=True).items():
                compiled = launch.compiled(arch)
                amd = isinstance(arch, str)
                parsed = sass.parse_gcn(compiled.amdgcn) if amd else sass.read_cubin(compiled.cubin)
                (code,) = parsed.values()
                count += 1
                if code.stack or getattr(code, "vgpr_spills", 0):
                    spilled.append(f"{name} D{d} {_arch(arch)}")
    figure = f"{len(spilled)} of {count}" + (f": {', '.join(spilled)}" if spilled else "")
    yield Bar("attention kernels that spill", figure, "0", not spilled)


def _memory() -> Iterator[Bar]:
    from emulated import standing_in

    import pyfuse

    for arch in (80, 90):
        for d in (64, 128):
            q, k, v = (
                torch.randn(1, 384, 2, d, dtype=BF16).transpose(1, 2).requires_grad_()
                for _ in "qkv"
            )
            with standing_in(arch) as gpu:
                pyfuse.attention(q, k, v, causal=True, backend="triton").sum().backward()
            for what in ("shared_wavefronts", "sectors"):
                actual = sum(report.counters[what] for report in gpu.reports)
                ideal = sum(report.counters[f"{what}_ideal"] for report in gpu.reports)
                name = f"attention forward and backward D{d} sm_{arch}: {what.replace('_', ' ')} / ideal"
                yield Bar(name, f"{actual / ideal:.3f}", "<= 1.05", actual <= 1.05 * ideal)
