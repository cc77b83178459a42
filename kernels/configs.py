"""Block sizes, warps and stages of the attention kernels as plain data, with the reason beside each.

How they were found: of the sizes that fill the tensor cores (16 rows to a warp at least), those that the assembler fits
into registers without a spill, with `causal` and with `window`; of these the one with fewest instructions per
tensor-core instruction in the interior loop, as benchmarks/triton_bars.py counts them. Hopper's, but for "extras", are
those that took the least time on an H100 (docs/h100.md), spills or not. PYFUSE_AUTOTUNE=1 measures `candidates` on
the GPU at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

Arch = int | str


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: rows of queries, rows of keys, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @cached_property
    def options(self) -> dict[str, Any]:
        """What a launch says of them; not to be changed."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages}
        return triton_options(self.warps) | sizes


def triton_options(warps: int) -> dict[str, Any]:
    """Triton's default of FP fusion changes with its version, so it is said. Stages are set loop by loop."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def block(size: int, least: int = 16) -> int:
    """The power of 2 that holds `size`; tensor cores need 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def family(arch: Arch) -> str:
    """GPUs that share a table: by their tensor cores and by shared memory (ada and rtx: 99 KiB for a program)."""
    if isinstance(arch, str):
        return "cdna"  # gfx90a, gfx942: 64 KiB, waves of 64
    if arch in (86, 89):
        return "ada"
    if arch >= 120:
        return "rtx"
    return "ampere" if arch < 90 else "hopper" if arch < 100 else "blackwell"


# (operation, head size, bytes of an element) -> {family: tiles}; "" is every other family, "extras" is for calls with a
# mask, dropout, softcap or ALiBi: their steps need registers between the two products. On AMD's GPUs their own tiles do
# unless "cdna-extras" says others. With all of them at once dkdv spills 16 to 40 bytes of a thread;
# halving its tile to avoid that would cost every other call.
_SHIPPED: dict[tuple[str, int, int], dict[str, Tiles]] = {
    # Forward. 128 queries halve the loads of K and V per product; registers hold the scores and o, so that with
    # larger heads the keys of a tile become fewer.
    ("fwd", 64, 2): {
        "": Tiles(128, 64, 4, 2),
        "rtx": Tiles(128, 64, 8, 2),
        "hopper": Tiles(64, 64, 4, 3),
        "blackwell": Tiles(128, 128, 8, 2),
        "cdna": Tiles(128, 64, 4, 1),
        "extras": Tiles(128, 32, 8, 2),
    },
    ("fwd", 128, 2): {
        "": Tiles(128, 32, 8, 2),
        "ampere": Tiles(128, 64, 8, 2),
        "hopper": Tiles(64, 64, 4, 3),
        "blackwell": Tiles(128, 128, 8, 2),
        "cdna": Tiles(128, 64, 8, 1),
        "cdna-extras": Tiles(64, 64, 4, 1),
        "rtx-extras": Tiles(128, 32, 8, 1),
        "blackwell-extras": Tiles(64, 32, 8, 2),
        "extras": Tiles(128, 32, 8, 2),
    },
    ("fwd", 256, 2): {
        "": Tiles(64, 32, 8, 2),
        "ampere": Tiles(64, 64, 8, 2),
        "hopper": Tiles(128, 64, 8, 2),
        "blackwell": Tiles(128, 32, 8, 2),
        "cdna": Tiles(64, 32, 4, 1),
        "cdna-extras": Tiles(64, 16, 4, 1),
        "extras": Tiles(64, 16, 8, 1),
    },
    # dk and dv: a block of keys stays in registers, with two accumulators; queries stream by.
    ("dkdv", 64, 2): {
        "": Tiles(32, 128, 8, 2),
        "hopper": Tiles(32, 64, 4, 3),
        "blackwell": Tiles(64, 128, 8, 2),
        "cdna": Tiles(32, 64, 4, 1),
        "extras": Tiles(32, 64, 8, 1),
    },
    ("dkdv", 128, 2): {
        "": Tiles(64, 64, 8, 2),
        "hopper": Tiles(64, 64, 4, 2),
        "blackwell": Tiles(32, 128, 8, 2),
        "cdna": Tiles(16, 64, 4, 1),
        "cdna-extras": Tiles(16, 64, 8, 1),
        "blackwell-extras": Tiles(32, 64, 8, 1),
        "extras": Tiles(32, 64, 8, 2),
    },
    ("dkdv", 256, 2): {
        "": Tiles(32, 32, 8, 1),
        "hopper": Tiles(64, 64, 8, 2),  # wgmma's 64 rows of two accumulators spill, and pay for it
        "blackwell": Tiles(32, 64, 8, 2),
        "cdna": Tiles(16, 32, 4, 1),
        "extras": Tiles(16, 32, 8, 1),
    },
    # dq: one accumulator, and the keys stream by.
    ("dq", 64, 2): {
        "": Tiles(128, 32, 8, 2),
        "ampere": Tiles(64, 64, 4, 2),
        "hopper": Tiles(128, 64, 4, 3),
        "blackwell": Tiles(128, 64, 8, 2),
        "cdna": Tiles(64, 32, 4, 1),
        "extras": Tiles(128, 32, 8, 2),
    },
    ("dq", 128, 2): {
        "": Tiles(64, 64, 8, 2),
        "hopper": Tiles(64, 64, 4, 2),
        "cdna": Tiles(64, 32, 8, 1),
        "cdna-extras": Tiles(64, 32, 4, 1),
        "blackwell-extras": Tiles(64, 32, 8, 1),
        "extras": Tiles(64, 32, 8, 2),
    },
    ("dq", 256, 2): {
        "": Tiles(64, 32, 8, 2),
        "hopper": Tiles(128, 64, 8, 1),
        "cdna": Tiles(32, 16, 4, 1),
        "extras": Tiles(32, 16, 8, 1),
    },
    # The gradient of a mask: no accumulator, but scores and their gradients at once, and nothing streams by.
    ("dmask", 64, 2): {"": Tiles(64, 32, 8, 1)},
    ("dmask", 128, 2): {"": Tiles(32, 64, 8, 1), "cdna": Tiles(32, 32, 8, 1)},
    ("dmask", 256, 2): {"": Tiles(16, 32, 8, 1), "cdna": Tiles(16, 32, 4, 1)},
    # float32 in three bfloat16 parts: three copies of each operand in registers, so small tiles; wgmma reads those of K
    # and V in shared memory. Heads above 64 spill all the same: the parts of one row of an operand take half of its
    # registers, and no tile is smaller than these. Bytes of a thread: up to 64 at 128 and 550 at 256; with the gradient
    # of a mask 32, 90 and 880 at 64, 128 and 256.
    ("fwd", 64, 4): {
        "": Tiles(64, 16, 8, 1),
        "hopper": Tiles(128, 32, 4, 2),
    },
    ("fwd", 128, 4): {
        "": Tiles(16, 16, 8, 1),
        "hopper": Tiles(64, 32, 4, 2),
    },
    ("fwd", 256, 4): {"": Tiles(16, 16, 8, 1)},
    ("dkdv", 64, 4): {
        "": Tiles(16, 32, 8, 1),
        "hopper": Tiles(64, 64, 4, 1),
    },
    ("dkdv", 128, 4): {"": Tiles(16, 16, 8, 1), "hopper": Tiles(32, 64, 4, 1)},
    ("dkdv", 256, 4): {"": Tiles(16, 16, 8, 1)},
    ("dq", 64, 4): {"": Tiles(32, 16, 8, 1), "hopper": Tiles(64, 32, 4, 1)},
    ("dq", 128, 4): {"": Tiles(16, 16, 8, 1), "hopper": Tiles(64, 16, 4, 1)},
    ("dq", 256, 4): {"": Tiles(16, 16, 8, 1)},
    ("dmask", 64, 4): {"": Tiles(32, 16, 8, 1)},
    ("dmask", 128, 4): {"": Tiles(16, 16, 8, 1)},
    ("dmask", 256, 4): {"": Tiles(16, 16, 8, 1)},
}
ROW_TERMS = Tiles(32, 0, 4, 1)  # bound by memory


@lru_cache(maxsize=1024)
def shipped(operation: str, d: int, size: int, arch: Arch, extras: bool) -> Tiles:
    """operation: "fwd", "dkdv", "dq", "dmask"; d: the larger head size; size: bytes of an element; extras: as the table
    says."""
    table = _SHIPPED[operation, block(d, 64), size]
    kind = family(arch)
    own = table.get(kind, table[""])
    if not extras:
        return own
    others = own if kind == "cdna" else table.get("extras", table[""])
    return table.get(f"{kind}-extras", others)


def candidates(operation: str, d: int, size: int, arch: Arch, extras: bool) -> list[Tiles]:
    """What autotuning tries: the shipped tiles first, then others of this table where nothing speaks against them."""
    first = shipped(operation, d, size, arch, extras)
    if extras:
        return [first, replace(first, stages=1)] if first.stages > 1 else [first]
    others = [
        tiles
        for kind, tiles in _SHIPPED[operation, block(d, 64), size].items()
        if not kind.endswith("extras")
    ]
    near = [
        Tiles(first.block_m, first.block_n, warps, stages)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]
    return list(dict.fromkeys((first, *others, *near)))
