"""Attention forward, pyfuse's CPU kernels against torch's SDPA: interleaved, best of rounds.

    make bench      or      python -m benchmarks.bench_attention [--threads N]

No case is timed before its result was compared with the eager formula in float64. GF/s count the two products
of what is visible, 4·B·Hq·M·N·D (half of it when causal); GB/s count reading K and V once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from pyfuse.cli import machine, measure


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: tuple[int, int]  # of queries and of keys
    queries: int
    keys: int
    d: int
    causal: bool = False

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        hq, hk = self.heads
        return f"B{self.batch} H{hq}/{hk} M{self.queries} N{self.keys} D{self.d} {kind}"

    @property
    def flops(self) -> float:
        visible = self.queries * self.keys * (0.5 if self.causal else 1.0)
        return 4.0 * self.batch * self.heads[0] * visible * self.d

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q as models hand it over: a transposed view of [B, M, H, D]."""
        q = torch.randn(self.batch, self.queries, self.heads[0], self.d).to(dtype).transpose(1, 2)
        k, v = (
            torch.randn(self.batch, self.heads[1], self.keys, self.d).to(dtype) for _ in range(2)
        )
        return q, k, v


SHAPES = (
    Shape(1, (12, 12), 2048, 2048, 64),
    Shape(1, (12, 12), 2048, 2048, 64, causal=True),
    Shape(1, (12, 12), 2048, 2048, 128),
    Shape(1, (12, 12), 512, 512, 64),
    Shape(32, (12, 12), 128, 128, 64),
    Shape(32, (12, 12), 256, 256, 32),
    Shape(8, (12, 12), 197, 197, 64),
    Shape(1, (9, 3), 2048, 2048, 64, causal=True),
    Shape(1, (32, 32), 1, 4096, 64),
    Shape(1, (9, 3), 1, 2048, 64),
)


def check(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless the kernel's error is within twice eager's own, plus 2 ulp of the largest value."""
    one = [t[:1] for t in (q, k, v)]  # a batch alone: the truth is slow
    exact = pyfuse.attention(*(t.double() for t in one), causal=shape.causal, backend="eager")
    eager = pyfuse.attention(*one, causal=shape.causal, backend="eager")
    ours = pyfuse.attention(*one, causal=shape.causal, backend="cpu")
    own, error = ((x.double() - exact).abs().max().item() for x in (eager, ours))
    budget = 2 * own + 2 * torch.finfo(q.dtype).eps * exact.abs().max().item()
    if not error <= budget:
        raise AssertionError(f"{shape}: error {error:.2e}, allowed {budget:.2e}")


def row(shape: Shape, dtype: torch.dtype) -> str:
    q, k, v = shape.tensors(dtype)
    check(shape, q, k, v)
    calls = {
        "torch": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=shape.causal, enable_gqa=shape.heads[0] != shape.heads[1]
        ),
        "pyfuse": lambda: pyfuse.attention(q, k, v, causal=shape.causal, backend="cpu"),
    }
    runs = {name: measure.stopwatch(call) for name, call in calls.items()}
    best = measure.interleave(runs, rounds=30, budget=3.0)
    ours, theirs = best["pyfuse"], best["torch"]
    if shape.queries == 1:
        rate = f"{(k.nbytes + v.nbytes) / ours / 1e9:6.1f} GB/s"
    else:
        rate = f"{shape.flops / ours / 1e9:6.0f} GF/s"
    kind = str(dtype).removeprefix("torch.")
    return f"{kind:9}{shape!s:36}{1e3 * ours:9.3f} ms {rate}  {theirs / ours:6.2f} x torch"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_attention")
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    torch.set_num_threads(parser.parse_args().threads)
    from pyfuse.backends.cpu import isa

    print(
        f"{machine.cpu_model()}, {torch.get_num_threads()} threads, {isa()}, torch {torch.__version__}"
    )
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                print(row(shape, dtype), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
