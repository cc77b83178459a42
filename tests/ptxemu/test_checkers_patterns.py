"""Kernels that are right although they look dangerous: nothing may be found in them, in whatever order they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptxemu import nvcc_run
from ptxemu.gpu import Gpu

pytestmark = pytest.mark.skipif(
    nvcc_run.find_nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME"
)
SOURCE = nvcc_run.SAMPLES / "patterns.cu"

Arguments = tuple[Any, ...]


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def last_block_sum() -> Arguments:
    return torch.arange(4096.0), torch.zeros(8), torch.zeros(1), ints(1), 4096


def parts_of_warps() -> Arguments:
    return torch.randint(100, (512,), dtype=torch.int32), ints(64), ints(1)


def histogram() -> Arguments:
    return torch.randint(256, (5000,), dtype=torch.uint8), ints(256), 5000


# By kernel: blocks, threads, arguments, and what holds afterwards.
PATTERNS: dict[str, tuple[int, int, Callable[[], Arguments], Callable[..., bool]]] = {
    "last_block_sum": (8, 128, last_block_sum, lambda x, _, out, *__: out.item() == x.sum()),
    "locked_sum": (4, 64, lambda: (ints(1), torch.zeros(64), 3), lambda _, s, n: s.eq(4 * n).all()),
    "warp_tree": (1, 32, lambda: (torch.arange(64.0), torch.zeros(1)), lambda x, y: y == x.sum()),
    "parts_of_warps": (
        *(4, 128, parts_of_warps),
        lambda x, y, odd: y.equal(x.view(64, 8).sum(1).int()) and odd == (x & 1).sum(),
    ),
    "reverse": (
        *(1, 128, lambda: (torch.arange(128, dtype=torch.int32), ints(128))),
        lambda x, y: y.equal(x.flip(0) + 2),
    ),
    "neighbours": (5, 64, lambda: (ints(5, 64), ints(1)), lambda _, wrong: wrong.item() == 0),
    "histogram": (
        3,
        128,
        histogram,
        lambda x, bins, _: bins.equal(x.bincount(minlength=256).int()),
    ),
    "running_sums": (
        *(1, 256, lambda: (torch.ones(256, dtype=torch.int32),)),
        lambda x: x.tolist() == list(range(1, 257)),
    ),
    "chain": (
        *(6, 64, lambda: (torch.zeros(6, 64), ints(6))),
        lambda tile, _: tile[:, 0].tolist() == [1, 2, 3, 4, 5, 6],
    ),
}


@pytest.mark.archs(80, 90)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name: str, gpu: Gpu) -> None:
    grid, block, arguments, holds = PATTERNS[name]
    for seed in range(4):
        values = arguments()
        nvcc_run.launch(SOURCE, name, grid, block, *values, gpu=gpu, seed=seed)
        assert holds(*values)
