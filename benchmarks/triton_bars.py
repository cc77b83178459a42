"""The promises of the Triton kernels that a machine without a GPU can keep: counts of their compiled code, not times.

Instructions come from the assembler's output, wavefronts and sectors from running it in the emulator (tests/ptxemu).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bar import Bar

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
SECTOR = 32
NVIDIA, AMD = (80, 86, 89, 90, 100, 120), ("gfx90a", "gfx942")


def triton() -> Iterator[Bar]:
    """Main loops, spills, tensor cores, shared and global memory."""
    sys.path.insert(0, str(ROOT / "tests"))  # where ptxemu and the recorder of launches are
    yield from _main_loops()
    yield from _units()
    yield from _spills()
    yield from _shared()
    yield from _global()


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

    count, spilled = 0, []
    for arch in (*NVIDIA, *AMD):
        for d in (64, 128, 256):
            for name, launch in attention_launches(arch, d, BF16, causal=True).items():
                count += 1
                if not launch.compiled(arch).code.in_registers:
                    spilled.append(f"{name} D{d} {_arch(arch)}")
    figure = f"{len(spilled)} of {count}" + (f": {', '.join(spilled)}" if spilled else "")
    yield Bar("attention kernels that spill", figure, "0", not spilled)


def _shared() -> Iterator[Bar]:
    """Wavefronts of shared memory, forward and backward together."""
    from emulated import standing_in

    import pyfuse

    mask = torch.rand(384, 384) < 0.9
    calls: list[tuple[int, int, torch.dtype, dict[str, Any]]] = [
        *((arch, d, BF16, {"causal": True}) for arch in (80, 90) for d in (64, 128)),
        (80, 64, BF16, {"mask": mask}),
        (90, 64, BF16, {"mask": mask}),
        (80, 64, torch.float32, {"causal": True}),
        (90, 64, torch.float32, {"causal": True}),
    ]
    for arch, d, dtype, options in calls:
        q, k, v = (
            torch.randn(1, 384, 2, d, dtype=dtype).transpose(1, 2).requires_grad_() for _ in "qkv"
        )
        with standing_in(arch) as gpu:
            pyfuse.attention(q, k, v, **options, backend="triton").sum().backward()
        kind = (
            f"{str(dtype).removeprefix('torch.')} D{d} {'mask' if 'mask' in options else 'causal'}"
        )
        actual = sum(report.counters["shared_wavefronts"] for report in gpu.reports)
        ideal = sum(report.counters["shared_wavefronts_ideal"] for report in gpu.reports)
        yield _ratio(f"attention {kind} {_arch(arch)}: shared wavefronts / ideal", actual, ideal)


def _ratio(name: str, actual: float, ideal: float) -> Bar:
    return Bar(name, f"{actual / ideal:.3f}", "<= 1.05", actual <= 1.05 * ideal)


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _global() -> Iterator[Bar]:
    """Sectors of the kernels that memory bounds against each input read and each output written once: on a GPU of one
    multiprocessor, where a program has as many rows as in a large call on a large one."""
    from unittest.mock import patch

    from pyfuse.backends import gpu_chip
    from pyfuse.backends.triton_device import kernels

    norm_configs, position_configs = kernels("norm_configs"), kernels("position_configs")
    plans = [x for m in (norm_configs, position_configs) for x in vars(m).values()]
    plans = [plan for plan in plans if hasattr(plan, "cache_clear")]
    for plan in plans:
        plan.cache_clear()
    one = patch.dict(gpu_chip.MULTIPROCESSORS, {80: 1})
    with one, patch.object(position_configs, "MULTIPROCESSORS", 1):
        yield from _norms()
        yield from _positions()
    for plan in plans:
        plan.cache_clear()
    yield from _decoding()


def _sectors(call: Callable[[], Any]) -> int:
    """In bytes, of all launches of the call."""
    from emulated import standing_in

    with standing_in(80) as gpu:
        call()
    return SECTOR * sum(report.counters["sectors"] for report in gpu.reports)


def _norms() -> Iterator[Bar]:
    for rows, d, dtype in ((80, 4096, BF16), (240, 768, torch.float32)):
        yield from _norms_of(rows, d, dtype)


def _norms_of(rows: int, d: int, dtype: torch.dtype) -> Iterator[Bar]:
    import pyfuse

    x, residual, dy, dz = (torch.randn(rows, d, dtype=dtype) for _ in range(4))
    w, b = (torch.randn(d, dtype=dtype) for _ in range(2))
    kind = f"{rows} x {d} {str(dtype).removeprefix('torch.')} sm_80: sectors / ideal"
    layer_norm = partial(pyfuse.layer_norm, backend="triton")
    rms_norm = partial(pyfuse.rms_norm, backend="triton")
    actual = _sectors(lambda: layer_norm(x, w, b))
    yield _ratio(f"layer_norm {kind}", actual, _nbytes(x, x, w, b))
    actual = _sectors(lambda: rms_norm(x, w, residual=residual, prenorm=True))
    yield _ratio(f"add and rms_norm {kind}", actual, _nbytes(x, x, x, x, w))
    leaves = [t.detach().requires_grad_() for t in (x, residual, w, b)]

    def trained() -> Any:
        x, residual, w, b = leaves
        return layer_norm(x, w, b, residual=residual, prenorm=True)

    with torch.no_grad():
        forward = _sectors(trained)
    actual = _sectors(lambda: torch.autograd.grad(trained(), leaves, (dy, dz))) - forward
    statistics = 2 * 4 * rows  # mean and 1/σ in float32, written by the forward for this
    once = _nbytes(x, x, dy, dz, w, w, b) + 2 * statistics
    yield _ratio(f"layer_norm backward, with dw and db, {kind}", actual, once)


def _positions() -> Iterator[Bar]:
    import pyfuse

    q, k = (torch.randn(1, 1100, h, 128, dtype=BF16).transpose(1, 2) for h in (8, 2))
    cos, sin = torch.rand(2, 1100, 64)
    bytes_ = _sectors(lambda: pyfuse.rope_pair(q, k, cos, sin, layout="half", backend="triton"))
    name = "rope_pair bfloat16 1100 x (8 + 2) x 128 sm_80: sectors / ideal"
    yield _ratio(name, bytes_, _nbytes(q, q, k, k, cos, sin))
    for d in (768, 4096):
        table, w, b = torch.randn(200, d, dtype=BF16), *torch.randn(2, d, dtype=BF16)
        ids = torch.randint(0, 200, (1, 512))
        call = partial(
            pyfuse.embed, ids, table, norm_weight=w, norm_bias=b, scale=2.0, backend="triton"
        )
        ideal = 2 * 512 * d * 2 + _nbytes(ids, w, b)
        yield _ratio(
            f"embed and norm bfloat16 512 x {d} sm_80: sectors / ideal", _sectors(call), ideal
        )


def _decoding() -> Iterator[Bar]:
    """Without a pipeline: the emulator does not count its copies among the sectors. The addresses are the same."""
    from emulated import GpuOfCpuTensors
    from ptxemu.gpu import Emulator

    import pyfuse
    from pyfuse.backends import triton_device

    class Unpipelined(GpuOfCpuTensors):
        multiprocessors = 1

        def launch(
            self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
        ) -> None:
            stages = {"STAGES": 1} if "STAGES" in options else {}
            super().launch(kernel, grid, args, options | stages)

    lengths, n = torch.tensor([1500, 260]), 1504
    q = torch.randn(2, 8, 1, 128, dtype=BF16)
    caches = torch.randn(2, 2, 2, n, 128, dtype=BF16)
    pages = torch.randperm(2 * n // 16, dtype=torch.int32).view(2, -1)
    paged = torch.randn(2, 2 * n // 16, 2, 16, 128, dtype=BF16)
    moved = 2 * int(lengths.sum()) * 2 * 128 * 2 + _nbytes(q, q)
    for name, (k, v), table in (
        ("contiguous", caches, None),
        ("pages of 16", paged, pages),
    ):
        gpu = Unpipelined(Emulator(80))
        with triton_device.stand_in(gpu):
            pyfuse.decode_attention(q, k, v, seqlens_k=lengths, block_table=table, backend="triton")
        bytes_ = SECTOR * sum(report.counters["sectors"] for report in gpu.reports)
        yield _ratio(f"decode bfloat16 D128 {name} sm_80: sectors / ideal", bytes_, moved)
