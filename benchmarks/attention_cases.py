"""Attention problems for benchmarks: inputs as models hand them over, the same call by pyfuse and by torch, and the
check that comes before any time is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from benchmarks.command import require
from pyfuse.cli import measure

Pass = Literal["forward", "backward"]
Call = Callable[[], object]
CHECKED_SCORES = 2**20  # about a second of eager in float64 at worst


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: tuple[int, int]  # of queries and of keys
    queries: int
    keys: int
    d: int
    causal: bool = False
    mask: Literal["padding", "bias"] | None = None  # bool [1, 1, 1, N]; float [1, 1, M, N]

    def __str__(self) -> str:
        kind = "causal" if self.causal else self.mask or "full"
        hq, hk = self.heads
        return f"B{self.batch} H{hq}/{hk} M{self.queries} N{self.keys} D{self.d} {kind}"

    def flops(self, which: Pass = "forward") -> float:
        """The products of what is visible: two forward, five backward."""
        visible = self.queries * self.keys * (0.5 if self.causal else 1.0)
        forward = 4.0 * self.batch * self.heads[0] * visible * self.d
        return forward if which == "forward" else 2.5 * forward


@dataclass
class Problem:
    """Tensors of a shape: q, k, v (leaves of autograd), mask, and the gradient of the result."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    upstream: Tensor
    dropout_p: float = 0.0

    def by_torch(self) -> Tensor:
        """With torch's alignment of causal, which is pyfuse's where M = N."""
        hq, hk = self.shape.heads
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.dropout_p,
            is_causal=self.shape.causal, enable_gqa=hq != hk,
        )  # fmt: skip

    def by_pyfuse(self, backend: str | None = "cpu") -> Tensor:
        o: Tensor = pyfuse.attention(
            self.q, self.k, self.v, mask=self.mask, causal=self.shape.causal,
            dropout_p=self.dropout_p, backend=backend,
        )  # fmt: skip
        return o

    def gradients(self, o: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, (self.q, self.k, self.v), self.upstream, retain_graph=True)

    def part(self, dtype: torch.dtype | None = None) -> Problem:
        """What is compared with the truth: all heads where that is little, since the worst of few roundings is luck;
        else the first batch, the first key head and the query heads of its group."""
        shape = self.shape
        hq, hk = shape.heads
        batch = shape.batch
        if batch * hq * shape.queries * shape.keys > CHECKED_SCORES:
            batch, hq, hk = 1, hq // hk, 1

        def take(t: Tensor, heads: int) -> Tensor:
            return t.detach()[:batch, :heads].to(dtype or t.dtype).requires_grad_()

        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype or mask.dtype)
        q, upstream = take(self.q, hq), take(self.upstream, hq).detach()
        k, v = take(self.k, hk), take(self.v, hk)
        return Problem(self.shape, q, k, v, mask, upstream, self.dropout_p)


def build(shape: Shape, dtype: torch.dtype, dropout_p: float = 0.0) -> Problem:
    """q and the result's gradient are transposed views of [B, M, H, D], as in models."""
    b, (hq, hk), m, n, d = shape.batch, shape.heads, shape.queries, shape.keys, shape.d
    q, upstream = (torch.randn(b, m, hq, d).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(b, hk, n, d).to(dtype) for _ in range(2))
    mask = None
    if shape.mask == "padding":
        mask = (torch.arange(n) < n - n // 4).expand(1, 1, 1, n)
    elif shape.mask == "bias":
        mask = torch.randn(1, 1, m, n).to(dtype)
    for t in (q, k, v):
        t.requires_grad_()
    return Problem(shape, q, k, v, mask, upstream, dropout_p)


def check(problem: Problem, which: Pass) -> None:
    """Raise unless the error is within twice eager's own (gradients: three times), plus 2 ulp of the largest value;
    truth is eager in float64."""
    small, exact = problem.part(), problem.part(torch.float64)
    o, own_o, exact_o = _seeded(problem, "cpu"), _seeded(small, "eager"), _seeded(exact, "eager")
    require(str(problem.shape), _part(o, own_o), own_o, exact_o, factor=2)
    if which == "forward":
        return
    for name, ours, own, truth in zip(
        ("dq", "dk", "dv"), problem.gradients(o), small.gradients(own_o), exact.gradients(exact_o), strict=True
    ):  # fmt: skip
        require(f"{problem.shape} {name}", _part(ours, own), own, truth, factor=3)


def _seeded(problem: Problem, backend: str) -> Tensor:
    """With the dropout mask that all backends have in common."""
    torch.manual_seed(0)
    return problem.by_pyfuse(backend)


def _part(whole: Tensor, like: Tensor) -> Tensor:
    return whole[: like.shape[0], : like.shape[1]]


def runs(problem: Problem, which: Pass) -> dict[str, Callable[[], float]]:
    """Runs for in_turns: the forward pass without a graph, or the backward pass alone."""
    if which == "forward":
        calls: dict[str, Call] = {"torch": problem.by_torch, "pyfuse": problem.by_pyfuse}
        return {name: measure.stopwatch(_without_graph(call)) for name, call in calls.items()}
    results = {"torch": problem.by_torch(), "pyfuse": problem.by_pyfuse()}
    return {name: measure.stopwatch(_gradients_of(problem, o)) for name, o in results.items()}


def _without_graph(call: Call) -> Call:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _gradients_of(problem: Problem, o: Tensor) -> Call:
    return lambda: problem.gradients(o)
