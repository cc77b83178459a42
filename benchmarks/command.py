"""What the benchmarks of single kernels have in common: how they begin, what they refuse to time, how they time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyfuse.cli import machine, measure

Calls = Mapping[str, Callable[[], object]]


def parser(name: str) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.<name>`."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    made.add_argument("--threads", type=int, default=machine.default_threads())
    return made


def begin(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; torch uses that many threads from here on, and the machine is named."""
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    from pyfuse.backends.cpu import isa

    print(
        f"{machine.cpu_model()}, {torch.get_num_threads()} threads, {isa()}, torch {torch.__version__}"
    )
    return arguments


def require(name: str, actual: Tensor, peer: Tensor, exact: Tensor, *, factor: float = 2) -> None:
    """AssertionError unless the error of `actual` is within `factor` times that of a peer of the same dtype, plus
    2 ulp of the largest value: a wrong kernel gets no time."""
    with torch.no_grad():
        own, error = ((x.double() - exact).abs().max().item() for x in (peer, actual))
        budget = factor * own + 2 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.2e}, allowed {budget:.2e}")


def row(name: str, moved: float, calls: Calls, peer: str = "torch") -> str:
    """calls["pyfuse"] and calls["peer"] in turns, best of the rounds; moved: bytes read and written."""
    runs = {label: measure.stopwatch(call) for label, call in calls.items()}
    best = measure.interleave(runs, rounds=200, budget=3.0)
    ours, theirs = best["pyfuse"], best["peer"]
    return (
        f"{name}{1e3 * ours:9.4f} ms {moved / ours / 1e9:6.1f} GB/s  {theirs / ours:6.2f} x {peer}"
    )
