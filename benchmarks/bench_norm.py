"""LayerNorm and RMSNorm, pyfuse's CPU kernels against torch's: interleaved, best of rounds.

    python -m benchmarks.bench_norm [--threads N]

The peers are F.layer_norm and F.rms_norm, with `x + residual` before them where the sum is fused, and their
autograd. No case is timed before its results were compared with the eager formula in float64. GB/s count the
rows of x, residual, y and z (backward: z, dy, dz and dx) once each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from benchmarks import command
from benchmarks.command import Calls, require, row

SHAPES = ((1, 768), (512, 576), (4096, 768), (8192, 4096))


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
            require(f"{self.kind.name}, tensor {i}", actual, eager, exact, factor=factor)

    def forward_calls(self) -> Calls:
        return {"peer": self.peer, "pyfuse": lambda: self.ours(self.leaves, "cpu")}

    def backward_calls(self) -> Calls:
        points = list(self.leaves.values())
        graphs = {"peer": self.peer(), "pyfuse": self.ours(self.leaves, "cpu")}

        def backward(results: tuple[Tensor, ...]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(results, points, self.flow, retain_graph=True)

        return {name: backward(results) for name, results in graphs.items()}


def main() -> int:
    command.begin(command.parser("bench_norm"))
    for dtype in (torch.float32, torch.bfloat16):
        for rows, d in SHAPES:
            for kind in KINDS:
                case = Case(kind, rows, d, dtype)
                unit = case.leaves["x"].nbytes
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
