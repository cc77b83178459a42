"""Decoding against torch and against memory: one new query (or a few) over a cache of keys and values.

    python -m benchmarks.bench_decode [--threads N] [--quick]

Every row is first held to eager in float64 (a wrong kernel gets no time), then timed in turns with torch and with
plain reading of the same cache by the same threads; times are medians, which a neighbour's load moves less
than their ratios. "of reading" is that reading's time over ours: 100 % is the memory's (or, for what fits
it, the cache's) own speed. "of DRAM" compares with reading a buffer that no cache holds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from benchmarks import command, peaks
from benchmarks.command import require
from benchmarks.turns import Spread, in_turns
from pyfuse.cli import measure


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: tuple[int, int]  # of queries and of keys
    queries: int
    keys: int
    d: int
    page_size: int | None = None

    def __str__(self) -> str:
        hq, hk = self.heads
        pages = f" pages of {self.page_size}" if self.page_size else ""
        return f"B{self.batch} H{hq}/{hk} M{self.queries} N{self.keys} D{self.d}{pages}"


PROMISED = (Shape(1, (32, 32), 1, 4096, 64), Shape(1, (9, 3), 1, 2048, 64))
SHAPES = (
    *PROMISED,
    Shape(1, (32, 32), 1, 4096, 64, page_size=16),
    Shape(1, (32, 32), 1, 4096, 64, page_size=128),
    Shape(1, (8, 8), 1, 128, 64),
    Shape(1, (8, 8), 1, 1024, 64),
    Shape(1, (32, 8), 1, 512, 128),
    Shape(1, (32, 8), 1, 4096, 128),
    Shape(1, (32, 8), 1, 16384, 128),
    Shape(1, (32, 8), 1, 16384, 128, page_size=16),
    Shape(1, (64, 8), 1, 8192, 128),
    Shape(8, (32, 8), 1, 1024, 64),
    Shape(32, (8, 8), 1, 512, 64),
    Shape(1, (32, 8), 4, 4096, 128),
    Shape(1, (32, 8), 16, 4096, 128),
)


@dataclass
class Cache:
    """Tensors of a shape, the cache contiguous and, if so asked for, in pages in random order."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqlens_k: Tensor
    paged: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(self, backend: str) -> Tensor:
        k, v, table = self.paged if self.paged is not None else (self.k, self.v, None)
        o: Tensor = pyfuse.decode_attention(
            self.q, k, v, seqlens_k=self.seqlens_k, block_table=table, backend=backend
        )
        return o

    def memory(self) -> tuple[Tensor, Tensor]:
        return self.paged[:2] if self.paged is not None else (self.k, self.v)


def build(shape: Shape, dtype: torch.dtype) -> Cache:
    batch, (hq, hk), n, d = shape.batch, shape.heads, shape.keys, shape.d
    q = torch.randn(batch, shape.queries, hq, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, hk, n, d).to(dtype) for _ in range(2))
    cache = Cache(q, k, v, torch.full((batch,), n))
    if shape.page_size is not None:
        table = torch.randperm(batch * n // shape.page_size).reshape(batch, -1)
        pages = []
        for x in (k, v):
            split = x.reshape(batch, hk, -1, shape.page_size, d).transpose(1, 2)
            pages.append(x.new_empty(split.flatten(0, 1).shape))
            pages[-1][table.flatten()] = split.flatten(0, 1)
        cache.paged = (*pages, table.to(torch.int32))  # type: ignore[assignment]
    return cache


def check(shape: Shape, cache: Cache) -> None:
    """Raise unless the kernel's error is within twice eager's own, plus 2 ulp of the largest value."""
    wide = Cache(cache.q.double(), cache.k.double(), cache.v.double(), cache.seqlens_k)
    exact, eager, ours = wide.attend("eager"), cache.attend("eager"), cache.attend("cpu")
    require(str(shape), ours, eager, exact)


def row(shape: Shape, dtype: torch.dtype, threads: int, budget: float) -> str:
    cache = build(shape, dtype)
    check(shape, cache)
    mask = None
    if shape.queries > 1:  # bottom-right, which torch's is_causal is not
        mask = torch.ones(shape.queries, shape.keys, dtype=torch.bool).tril(
            shape.keys - shape.queries
        )

    def by_torch() -> Tensor:
        gqa = shape.heads[0] != shape.heads[1]
        return F.scaled_dot_product_attention(
            cache.q, cache.k, cache.v, attn_mask=mask, enable_gqa=gqa
        )

    runs = {
        "pyfuse": measure.stopwatch(lambda: cache.attend("cpu")),
        "torch": measure.stopwatch(by_torch),
        "read": peaks.reader(threads, *cache.memory()),
    }
    rounds = in_turns(runs, budget=budget, least=9)
    seconds = {label: Spread.of(values).median for label, values in rounds.items()}
    dram = peaks.read_bandwidth(threads)
    ours, size = seconds["pyfuse"], cache.k.nbytes + cache.v.nbytes
    return (
        f"{str(dtype).removeprefix('torch.'):9}{shape!s:40}{1e6 * ours:9.1f} µs {size / 1e6:6.1f} MB "
        f"{size / ours / 1e9:6.1f} GB/s  {seconds['read'] / ours:4.0%} of reading "
        f"{size / ours / dram:4.0%} of DRAM {seconds['torch'] / ours:6.2f} x torch"
    )


def main() -> int:
    parser = command.parser("bench_decode")
    parser.add_argument("--quick", action="store_true", help="only the promised shapes")
    arguments = command.begin(parser)
    print(f"DRAM {peaks.read_bandwidth(arguments.threads) / 1e9:.1f} GB/s")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in PROMISED if arguments.quick else SHAPES:
                print(row(shape, dtype, arguments.threads, budget=2.0), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
