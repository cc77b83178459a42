"""Rotary embedding of q and k, pyfuse's CPU kernels against Hugging Face's formula: interleaved, best of rounds.

    python -m benchmarks.bench_rope [--threads N]

The peer is q·cos + rotate_half(q)·sin for both, and its autograd. No case is timed before its result was compared
with the eager formula in float64. GB/s count reading and writing q and k once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pyfuse
from benchmarks import command
from benchmarks.command import Calls, require, row


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: tuple[int, int]  # of queries and of keys
    rows: int
    d: int

    def __str__(self) -> str:
        hq, hk = self.heads
        return f"B{self.batch} H{hq}/{hk} M{self.rows} D{self.d}"

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k as models hand them over, views of [B, M, H, D]; cos and sin [B, M, D], halves alike."""
        q, k = (
            torch.randn(self.batch, self.rows, h, self.d).to(dtype).transpose(1, 2)
            for h in self.heads
        )
        inv_freq, _ = pyfuse.rope_frequencies(self.d)
        angles = torch.outer(torch.arange(self.rows).float(), inv_freq.float())
        angles = torch.cat((angles, angles), -1).expand(self.batch, -1, -1)
        return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


SHAPES = (Shape(1, (9, 3), 2048, 64), Shape(8, (12, 12), 512, 64), Shape(1, (32, 8), 2048, 128))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def hugging_face(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    half = q.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    qr, kr = (pyfuse.rope(x, c, s, layout="half", backend=backend) for x in (q, k))
    return qr, kr


def forward_calls(given: list[Tensor]) -> Calls:
    exact = ours(*(t.double() for t in given), backend="eager")
    triples = zip(ours(*given, backend="cpu"), hugging_face(*given), exact, strict=True)
    for result in triples:
        require("forward", *result)
    return {"peer": lambda: hugging_face(*given), "pyfuse": lambda: ours(*given, backend="cpu")}


def backward_calls(given: list[Tensor]) -> Calls:
    q, k, cos, sin = given
    grads = [torch.randn_like(q), torch.randn_like(k)]
    q, k = leaves = [t.detach().requires_grad_() for t in (q, k)]
    with torch.enable_grad():
        results = hugging_face(q, k, cos, sin), ours(q, k, cos, sin, backend="cpu")

    def gradients(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, leaves, grads, retain_graph=True)

    theirs, mine = (partial(gradients, result) for result in results)
    exact = ours(*(t.double() for t in (*grads, cos, -sin)), backend="eager")
    for result in zip(mine(), theirs(), exact, strict=True):
        require("backward", *result)
    return {"peer": theirs, "pyfuse": mine}


def main() -> int:
    command.begin(command.parser("bench_rope"))
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                given = shape.tensors(dtype)
                kind, moved = (
                    str(dtype).removeprefix("torch."),
                    2 * sum(t.nbytes for t in given[:2]),
                )
                for step, calls in (("forward", forward_calls), ("backward", backward_calls)):
                    name = f"{kind:9}{shape!s:20}{step:9}"
                    print(row(name, moved, calls(given), peer="Hugging Face"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
