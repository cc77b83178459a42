"""Attention, pyfuse's CPU kernels against torch's SDPA, forward and backward: every shape measured, losses included.

    make bench      or      python -m benchmarks.bench_attention [--threads N] [--quick] [--pass forward|backward]

No case is timed before its result was compared with the eager formula in float64. Times are medians of rounds in
turns; the ratio is torch's time over pyfuse's with, in brackets, where the middle 60 % of the rounds lie. GF/s count
the products of what is visible: 4·B·Hq·M·N·D forward, 2.5 times that backward, half of it when causal. The sweep ends
with the shapes at which torch was faster, in a section of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import torch

from benchmarks import command
from benchmarks.attention_cases import Pass, Shape, build, check, runs
from benchmarks.turns import Spread, in_turns, ratio

F32, BF16 = torch.float32, torch.bfloat16
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
LENGTHS = (16, 32, 64, 128, 197, 256, 512, 1024, 2048, 4096)


def sweep() -> Iterator[Shape]:
    """Every length with every head size, then with masks, several sequences, grouped heads and one head."""
    for n in LENGTHS:
        base = Shape(1, (12, 12), n, n, 64)
        for d in (32, 64, 80, 128):
            yield replace(base, d=d)
            yield replace(base, d=d, causal=True)
        yield replace(base, mask="padding")
        yield replace(base, mask="bias")
        yield replace(base, heads=(9, 3), causal=True)
        yield replace(base, heads=(1, 1))
        if n <= 512:
            yield replace(base, batch=8)
            yield replace(base, batch=8, causal=True)
            yield replace(base, batch=8, mask="padding")
        yield replace(base, queries=1)


@dataclass(frozen=True)
class Result:
    shape: Shape
    dtype: torch.dtype
    which: Pass
    seconds: float  # of pyfuse
    gain: Spread  # torch's time over it

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        rate = self.shape.flops(self.which) / self.seconds / 1e9
        gain = f"{self.gain.median:6.2f} x torch ({self.gain.low:.2f} to {self.gain.high:.2f})"
        return f"{self.which:9}{kind:9}{self.shape!s:38}{1e3 * self.seconds:9.3f} ms {rate:6.0f} GF/s {gain}"


def measured(shape: Shape, dtype: torch.dtype, which: Pass, budget: float, least: int) -> Result:
    problem = build(shape, dtype)
    check(problem, which)
    rounds = in_turns(runs(problem, which), budget=budget, least=least)
    return Result(
        shape, dtype, which, Spread.of(rounds["pyfuse"]).median, ratio(rounds, "torch", "pyfuse")
    )


def table(shapes: list[Shape], passes: tuple[Pass, ...], budget: float, least: int) -> list[Result]:
    results = []
    for which in passes:
        for dtype in (F32, BF16):
            for shape in shapes:
                results.append(measured(shape, dtype, which, budget, least))
                print(results[-1], flush=True)
    return results


def summary(results: list[Result]) -> None:
    lost = sorted((r for r in results if r.gain.median < 1), key=lambda r: r.gain.median)
    print(f"\ntorch was faster at {len(lost)} of {len(results)} measured:")
    for r in lost:
        print(f"{r}{'  in the noise' if r.gain.holds(1.0) else ''}")


def main() -> int:
    parser = command.parser("bench_attention")
    parser.add_argument("--quick", action="store_true", help="without the sweep")
    parser.add_argument("--pass", dest="which", choices=get_args(Pass), help="only this one")
    arguments = command.begin(parser)
    passes: tuple[Pass, ...] = (arguments.which,) if arguments.which else get_args(Pass)
    results = table(list(SHAPES), passes, budget=2.0, least=7)
    if not arguments.quick:
        print("\nsweep")
        results += table([s for s in sweep() if s not in SHAPES], passes, budget=0.4, least=3)
    summary(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
