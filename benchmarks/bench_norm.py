"""LayerNorm and RMSNorm, pyfuse's CPU kernels against torch's: interleaved, best of rounds.

    python -m benchmarks.bench_norm [--threads N]

The peers are F.layer_norm and F.rms_norm, with `x + residual` before them where the sum is fused, and their
autograd. No case is timed before its results were compared with the eager formula in float64. GB/s count the
rows of x, residual, y and z (backward: z, dy, dz and dx) once each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from pyfuse.cli import machine, measure

SHAPES = ((1, 768), (512, 576), (4096, 768), (8192, 4096))
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    name: str
    rms: bool
    fused: bool  # x + residual goes in, and comes out as z

    @property
    def tensors_moved(self) -> int:
        return 4 if self.fused else 2


KINDS = (
    Kind("layer_norm", rms=False, fused=False),
    Kind("rms_norm", rms=True, fused=False),
    Kind("add+layer_norm", rms=False, fused=True),
    Kind("add+rms_norm", rms=True, fused=True),
)


def require_close(name: str, actual: Tensor, eager: Tensor, exact: Tensor, factor: float) -> None:
    """Raise unless the kernel's error is within a few times eager's, plus 2 ulp of the largest value."""
    own, error = ((x.double() - exact).abs().max().item() for x in (eager, actual))
    budget = factor * own + 2 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.2e}, allowed {budget:.2e}")


class Case:
    """The calls of one kind, shape and dtype, checked when it is made."""

    def __init__(self, kind: Kind, rows: int, d: int, dtype: torch.dtype) -> None:
        self.kind = kind
        self.leaves = {"x": torch.randn(rows, d), "weight": torch.randn(d)}
        if not kind.rms:
            self.leaves["bias"] = torch.randn(d)
        if kind.fused:
            self.leaves["residual"] = torch.randn(rows, d)
        self.leaves = {k: t.to(dtype).requires_grad_() for k, t in self.leaves.items()}
        self.flow = [torch.randn(rows, d).to(dtype) for _ in range(1 + kind.fused)]
        self._check()

    def ours(self, leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"backend": backend}
        if self.kind.fused:
            options |= {"residual": leaves["residual"], "prenorm": True}
        if self.kind.rms:
            y = pyfuse.rms_norm(leaves["x"], leaves["weight"], casting="torch", **options)
        else:
            y = pyfuse.layer_norm(leaves["x"], leaves["weight"], leaves["bias"], **options)
        return y if isinstance(y, tuple) else (y,)

    def peer(self) -> tuple[Tensor, ...]:
        t = self.leaves
        z = t["x"] + t["residual"] if self.kind.fused else t["x"]
        shape = z.shape[-1:]
        if self.kind.rms:
            y = F.rms_norm(z, shape, t["weight"], 1e-6)
        else:
            y = F.layer_norm(z, shape, t["weight"], t["bias"])
        return (y, z) if self.kind.fused else (y,)

    def _check(self) -> None:
        found = []
        wide = {k: t.detach().double().requires_grad_() for k, t in self.leaves.items()}
        for leaves, backend in ((self.leaves, "cpu"), (self.leaves, "eager"), (wide, "eager")):
            results = self.ours(leaves, backend)
            flow = [g.to(y.dtype) for g, y in zip(self.flow, results, strict=True)]
            grads = torch.autograd.grad(results, list(leaves.values()), flow)
            found.append((*[y.detach() for y in results], *grads))
        for i, (actual, eager, exact) in enumerate(zip(*found, strict=True)):
            factor = 2.0 if i < len(self.flow) else 3.0
            require_close(f"{self.kind.name}, tensor {i}", actual, eager, exact, factor)

    def forward_calls(self) -> Calls:
        return {"peer": self.peer, "pyfuse": lambda: self.ours(self.leaves, "cpu")}

    def backward_calls(self) -> Calls:
        points = list(self.leaves.values())
        graphs = {"peer": self.peer(), "pyfuse": self.ours(self.leaves, "cpu")}

        def backward(results: tuple[Tensor, ...]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(results, points, self.flow, retain_graph=True)

        return {name: backward(results) for name, results in graphs.items()}


def row(name: str, gigabytes: float, calls: Calls) -> str:
    runs = {label: measure.stopwatch(call) for label, call in calls.items()}
    best = measure.interleave(runs, rounds=200, budget=3.0)
    ours, theirs = best["pyfuse"], best["peer"]
    return f"{name}{1e3 * ours:9.4f} ms {gigabytes / ours:6.1f} GB/s  {theirs / ours:6.2f} x torch"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_norm")
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    torch.set_num_threads(parser.parse_args().threads)
    from pyfuse.backends.cpu import isa

    print(
        f"{machine.cpu_model()}, {torch.get_num_threads()} threads, {isa()}, torch {torch.__version__}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for rows, d in SHAPES:
            for kind in KINDS:
                case = Case(kind, rows, d, dtype)
                unit = case.leaves["x"].nbytes / 1e9
                shape = f"{rows}x{d}"
                name = f"{str(dtype).removeprefix('torch.'):9}{shape:10} {kind.name:15}"
                moved = kind.tensors_moved
                with torch.no_grad():
                    print(row(f"{name}forward  ", moved * unit, case.forward_calls()), flush=True)
                moved = 3 + kind.fused
                print(row(f"{name}backward ", moved * unit, case.backward_calls()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
