"""The promised figures of the attention kernels, each held to what the machine can do in that moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

import pyfuse
from benchmarks import bench_decode, peaks
from benchmarks.attention_cases import Pass, Problem, Shape, build, check, runs
from benchmarks.bar import Bar, share_bar, times_bar, unmeasured
from benchmarks.command import require
from benchmarks.turns import Spread, in_turns, ratio
from pyfuse.backends import cpu
from pyfuse.cli import measure

BUDGET = 4.0  # seconds of rounds for a case
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Promise:
    shape: Shape
    dtype: torch.dtype
    share: float | None = None  # of the peak
    times: float | None = None  # torch's speed
    which: Pass = "forward"

    def __str__(self) -> str:
        s, kind = self.shape, "fp32" if self.dtype == F32 else "bf16"
        size = f"{s.batch}x{s.heads[0]}x{s.keys}x{s.d}"
        return f"{self.which} {kind} {size} {'causal' if s.causal else 'full'}"


def square(n: int, d: int = 64, batch: int = 1, causal: bool = False) -> Shape:
    return Shape(batch, (12, 12), n, n, d, causal)


LONG, CAUSAL = square(2048), square(2048, causal=True)
PROMISES = (
    Promise(LONG, F32, 0.72, 2.8),
    Promise(CAUSAL, F32, 0.62, 2.8),
    Promise(square(512), F32, 0.55),
    Promise(square(128, batch=32), F32, 0.45),
    Promise(square(197, batch=8), F32, 0.45),
    Promise(LONG, BF16, 0.70, 4.2),
    Promise(square(2048, d=128), BF16, 0.77, 4.2),
    Promise(CAUSAL, BF16, 0.62, 4.2),
    Promise(square(512), BF16, 0.55),
    Promise(square(128, batch=32), BF16, 0.40),
    Promise(square(197, batch=8), BF16, 0.45),
    Promise(LONG, F32, 0.60, 2.5, "backward"),
    Promise(CAUSAL, F32, 0.52, 2.5, "backward"),
    Promise(LONG, BF16, None, 1.5, "backward"),
    Promise(CAUSAL, BF16, None, 1.5, "backward"),
)


_best: dict[str, float] = {}  # operations per second, by unit: what this run has seen


def peak_of(unit: str) -> float:
    """Measures the peak again; the best figure so far, since a neighbour can only lower it."""
    threads = torch.get_num_threads()
    now = peaks.bf16_dot_peak(threads) if unit == "bf16 dot" else peaks.fma_peak(threads, unit)
    _best[unit] = max(now, _best.get(unit, 0.0))
    return _best[unit]


def unit_of(dtype: torch.dtype, isa: str) -> str:
    """What multiplies: the yardstick of benchmarks/peaks.py."""
    if isa == "avx512_bf16":
        return "bf16 dot" if dtype == BF16 else "avx512"
    return isa if isa in peaks.BITS else "baseline"


def bars_of(promise: Promise, isa: str) -> Iterator[Bar]:
    problem = build(promise.shape, promise.dtype)
    check(problem, promise.which)
    unit = unit_of(promise.dtype, isa)
    peak_runs = {"peak": partial(peak_of, unit)} if promise.share is not None else {}
    rounds = in_turns(runs(problem, promise.which) | peak_runs, budget=BUDGET)
    if promise.share is not None:
        work = promise.shape.flops(promise.which) / peak_of(unit)  # seconds at that peak
        share = Spread.of(work / seconds for seconds in rounds["pyfuse"])
        note = f" of {_best[unit] / 1e9:.0f} GF/s"
        kind = "" if unit == "bf16 dot" else "FMA "
        yield share_bar(f"{promise}: of the {unit} {kind}peak", share, promise.share, note)
    if promise.times is not None:
        gain = ratio(rounds, "torch", "pyfuse")
        yield times_bar(f"{promise}: against torch", gain, promise.times)


def arithmetic() -> Iterator[Bar]:
    """Forward and backward on the widest instruction set, then forward on AVX2."""
    for promise in PROMISES:
        yield from bars_of(promise, cpu.isa())
    chosen = cpu.isa()
    if "avx2" not in cpu.available_isas():
        yield unmeasured("attention on AVX2", "this CPU has no avx2", ">= 60%")
        return
    cpu.select_isa("avx2")
    try:
        for bar in bars_of(Promise(LONG, F32, 0.60), "avx2"):
            yield replace(bar, name=f"AVX2, {bar.name}")
    finally:
        cpu.select_isa(chosen)


def decoding() -> Iterator[Bar]:
    """One query over a cache, against the speed of reading memory; where the cache does not fit the processor's own,
    also against reading it, which may partly come from there."""
    many, grouped = bench_decode.PROMISED
    threads = torch.get_num_threads()
    for shape, dtype in ((many, F32), (many, BF16), (grouped, BF16)):
        cache = bench_decode.build(shape, dtype)
        bench_decode.check(shape, cache)
        name = f"decode {'fp32' if dtype == F32 else 'bf16'} {shape}"
        call = Shape(1, shape.heads, 1, shape.keys, shape.d)
        problem = Problem(call, cache.q, cache.k, cache.v, None, cache.q)
        both = {
            "torch": measure.stopwatch(problem.by_torch),
            "pyfuse": measure.stopwatch(partial(cache.attend, "cpu")),
            "read": peaks.reader(threads, cache.k, cache.v),
        }
        with torch.inference_mode():
            rounds = in_turns(both, budget=BUDGET)
        speed = peaks.read_bandwidth(threads)
        reading = (cache.k.nbytes + cache.v.nbytes) / speed
        share = Spread.of(reading / seconds for seconds in rounds["pyfuse"])
        note = f" of {speed / 1e9:.0f} GB/s"
        yield share_bar(f"{name}: of the memory's speed", share, 0.80, note, at_best=False)
        if shape is many:
            yield share_bar(f"{name}: of reading it", ratio(rounds, "read", "pyfuse"), 0.80)
        else:
            yield times_bar(f"{name}: against torch", ratio(rounds, "torch", "pyfuse"), 10)


def _step(problem: Problem, by: Callable[[], torch.Tensor]) -> Callable[[], object]:
    return lambda: problem.gradients(by())


def dropout() -> Iterator[Bar]:
    """A training step with dropout, which torch computes by its formula; and the memory it takes."""
    target = 5
    shape = square(1024)
    problem = build(shape, F32, dropout_p=0.1)
    check(problem, "backward")
    calls = {"torch": problem.by_torch, "pyfuse": problem.by_pyfuse}
    both = {k: measure.stopwatch(_step(problem, call)) for k, call in calls.items()}
    rounds = in_turns(both, budget=BUDGET)
    name = "training step, dropout 0.1, fp32 1x12x1024x64: against torch"
    yield times_bar(name, ratio(rounds, "torch", "pyfuse"), target)
    yield _dropout_memory()


def _dropout_memory() -> Bar:
    name, target = "the same at N 16384: memory beyond in- and outputs", "<= 64 MiB"
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.dropout_memory", "--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return unmeasured(name, done.stderr.strip().splitlines()[-1], target)
    mebibytes = float(done.stdout)
    return Bar(name, f"{mebibytes:.1f} MiB", target, mebibytes <= 64)


def window() -> Iterator[Bar]:
    """A window costs what it covers."""
    shape = square(8192, causal=True)
    problem = build(shape, F32)
    small = problem.part()
    exact = problem.part(torch.float64)

    def attend(p: Problem, backend: str = "cpu", width: int | None = 256) -> torch.Tensor:
        with torch.no_grad():
            o: torch.Tensor = pyfuse.attention(
                p.q, p.k, p.v, causal=True, window=width, backend=backend
            )
        return o

    last = slice(-512, None)  # of the queries: truth for all of them would take gigabytes
    for p in (small, exact):
        p.q = p.q[:, :, last]
    require(
        f"{shape} window 256",
        attend(problem)[:1, :1, last],
        attend(small, "eager"),
        attend(exact, "eager"),
    )
    rounds = in_turns(
        {
            "full": measure.stopwatch(lambda: attend(problem, width=None)),
            "window": measure.stopwatch(lambda: attend(problem)),
        },
        budget=BUDGET,
    )
    yield times_bar(
        "window 256 at N 8192, causal: against no window", ratio(rounds, "full", "window"), 12
    )
