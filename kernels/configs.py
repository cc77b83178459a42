"""Block sizes, warps and stages of the attention kernels as plain data, with the reason beside each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Arch = int | str


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: rows of queries, rows of keys, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return triton_options(self.warps) | {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "STAGES": self.stages,
        }


def triton_options(warps: int) -> dict[str, Any]:
    """Triton's default of FP fusion changes with its version, so it is said. Stages are set loop by loop."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def block(size: int, least: int = 16) -> int:
    """The power of 2 that holds `size`; tensor cores need 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def small_shared(arch: Arch) -> bool:
    """Consumer chips: 99 KiB of shared memory for a program, where data-centre chips have 163 and more."""
    return arch in (86, 89, 120, 121)


@lru_cache(maxsize=256)
def flash_fwd(d: int, dv: int, size: int, arch: Arch, queries: int) -> Tiles:
    """d, dv: head sizes; size: bytes of an element; queries: how many there are."""
    d = block(max(d, dv))
    if size == 4:
        return Tiles(64, 32 if d <= 64 else 16, 4, 1)
    if d <= 64:
        return Tiles(128, 64, 8, 2)
    if d <= 128:
        return Tiles(128, 32 if arch in (120, 121) else 64, 8, 2)
    return Tiles(128, 32, 8, 2) if arch in (90, 100) else Tiles(64, 32, 8, 2)


ROW_TERMS = Tiles(64, 0, 4, 1)  # one row's product to a few threads: bound by memory


@lru_cache(maxsize=256)
def flash_bwd_dkdv(d: int, dv: int, size: int, arch: Arch) -> Tiles:
    d = block(max(d, dv))
    if size == 4:
        return Tiles(32 if d <= 64 else 16, 32 if d <= 64 else 16, 4, 1)
    if d <= 64:
        return Tiles(64, 64, 4, 2)
    if d <= 128:
        return Tiles(32, 64, 8, 1)
    return Tiles(32, 32, 8, 1)


@lru_cache(maxsize=256)
def flash_bwd_dq(d: int, dv: int, size: int, arch: Arch) -> Tiles:
    d = block(max(d, dv))
    if size == 4:
        return Tiles(32 if d <= 64 else 16, 32 if d <= 64 else 16, 4, 1)
    if d <= 64:
        return Tiles(64, 64, 4, 2)
    if d <= 128:
        return Tiles(64, 32, 8, 1)
    return Tiles(32, 32, 8, 1)


def flash_bwd_dmask(d: int, dv: int, size: int, arch: Arch) -> Tiles:
    """As dq, whose products it takes, but without dq's own; its loop is not pipelined."""
    return flash_bwd_dq(d, dv, size, arch)
