"""Embeddings, pyfuse's CPU kernels against torch's modules: interleaved, best of rounds.

    python -m benchmarks.bench_embed [--threads N]

The peer is what models write: F.embedding for each table, additions, F.layer_norm, F.dropout, and its autograd.
No case is timed before its result was compared with the eager formula in float64. GB/s count the rows
read and the result written (backward: its gradient read, and the dense gradients of the tables written).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from benchmarks import command
from benchmarks.command import Calls, require, row

Tables = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    rows: int
    vocabulary: int
    d: int
    bert: bool  # positions, segments and a norm; else tokens alone
    dropout: float = 0.0

    def tables(self, dtype: torch.dtype) -> Tables:
        tables = {"weight": torch.randn(self.vocabulary, self.d)}
        if self.bert:
            tables["position_weight"] = torch.randn(512, self.d)
            tables["segment_weight"] = torch.randn(2, self.d)
            tables["norm_weight"] = torch.randn(self.d)
            tables["norm_bias"] = torch.randn(self.d)
        return {name: t.to(dtype) for name, t in tables.items()}

    def ids(self) -> tuple[Tensor, Tensor | None]:
        shape = (self.batch, self.rows)
        segments = torch.randint(0, 2, shape) if self.bert else None
        return torch.randint(0, self.vocabulary, shape), segments


SHAPES = (
    Shape("BERT 32x256x768", 32, 256, 30522, 768, bert=True),
    Shape("BERT 32x256x768 dropout", 32, 256, 30522, 768, bert=True, dropout=0.1),
    Shape("BERT 1x16x768", 1, 16, 30522, 768, bert=True),
    Shape("tokens 32x256x768", 32, 256, 30522, 768, bert=False),
    Shape("tokens 4x512x2048", 4, 512, 49152, 2048, bert=False),
    Shape("tokens 1x1x576", 1, 1, 49152, 576, bert=False),
)


def torch_embed(ids: Tensor, segments: Tensor | None, t: Tables, p: float) -> Tensor:
    e = F.embedding(ids, t["weight"])
    if segments is not None:
        e = e + F.embedding(segments, t["segment_weight"])
        e = e + F.embedding(torch.arange(ids.shape[1]), t["position_weight"])
        e = F.layer_norm(e, e.shape[-1:], t["norm_weight"], t["norm_bias"])
    return F.dropout(e, p) if p > 0.0 else e


class Case:
    """The calls of one shape and dtype, checked when it is made."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.tables = shape, shape.tables(dtype)
        self.ids, self.segments = shape.ids()
        self.dy = torch.randn(shape.batch, shape.rows, shape.d).to(dtype)
        self._check()

    def _embed(self, tables: Tables, backend: str) -> Tensor:
        options: dict[str, Any] = {"dropout_p": self.shape.dropout, **tables}
        return pyfuse.embed(self.ids, segment_ids=self.segments, backend=backend, **options)

    def _results(self, backend: str, dtype: torch.dtype) -> Tables:
        leaves = {k: t.to(dtype).detach().requires_grad_() for k, t in self.tables.items()}
        torch.manual_seed(0)  # one dropout mask for all
        with torch.enable_grad():
            y = self._embed(leaves, backend)
            grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def _check(self) -> None:
        exact = self._results("eager", torch.float64)
        eager, ours = (self._results(name, self.dy.dtype) for name in ("eager", "cpu"))
        for name, result in ours.items():
            factor = 2.0 if name == "y" else 3.0
            require(name, result, eager[name], exact[name], factor=factor)

    def forward_calls(self) -> Calls:
        p, given = self.shape.dropout, (self.ids, self.segments, self.tables)
        return {
            "peer": lambda: torch_embed(*given, p),
            "pyfuse": lambda: self._embed(self.tables, "cpu"),
        }

    def backward_calls(self) -> Calls:
        leaves = {k: t.detach().requires_grad_() for k, t in self.tables.items()}
        points = list(leaves.values())
        with torch.enable_grad():
            theirs = torch_embed(self.ids, self.segments, leaves, self.shape.dropout)
            ours = self._embed(leaves, "cpu")
        return {
            "peer": lambda: torch.autograd.grad(theirs, points, self.dy, retain_graph=True),
            "pyfuse": lambda: torch.autograd.grad(ours, points, self.dy, retain_graph=True),
        }


def main() -> int:
    command.begin(command.parser("bench_embed"))
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                case = Case(shape, dtype)
                result = case.dy.nbytes
                tables = sum(t.nbytes for t in case.tables.values())
                name = f"{str(dtype).removeprefix('torch.'):9}{shape.name:24}"
                print(row(f"{name}forward  ", 2 * result, case.forward_calls()), flush=True)
                print(row(f"{name}backward ", result + tables, case.backward_calls()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
