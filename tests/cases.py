"""Attention cases: a covering design of fixed seed over what can be combined.

``CORE`` combines sizes, heads, dtypes, memory layouts and masks, without the options that only some
backends take; ``OPTIONS`` adds softcap, sinks, ALiBi, dropout and scale. In each, every pair of
values of any two factors occurs in at least one case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations, product
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
Window = int | tuple[int, int] | None


@dataclass(frozen=True)
class Case:
    """One call of attention. The id holds whatever is not the default."""

    batch: int = 2
    heads: tuple[int, int] = (4, 2)  # Hq, Hk
    sizes: tuple[int, int] = (65, 111)  # M, N
    head_sizes: tuple[int, int] = (64, 64)  # D, Dv
    dtype: str = "f32"
    layout: str = "BMHD"
    causal: bool = False
    window: Window = None
    mask: str = "none"
    seqlens: str = "none"
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    dropout: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        (hq, hk), (m, n), (d, dv) = self.heads, self.sizes, self.head_sizes
        words = [
            f"B{self.batch}",
            f"H{hq}" if hq == hk else f"H{hq}/{hk}",
            f"M{m}",
            f"N{n}",
            f"D{d}" if d == dv else f"D{d}/{dv}",
            self.dtype,
            self.layout,
        ]
        words += [f.name for f in fields(self) if getattr(self, f.name) is True]
        if self.window is not None:
            window = self.window
            words.append(f"window{window if isinstance(window, int) else '{}/{}'.format(*window)}")
        words += [f"{self.mask}mask"] * (self.mask != "none")
        words += [f"{self.seqlens}lens"] * (self.seqlens != "none")
        for name in ("softcap", "dropout", "scale"):
            value = getattr(self, name)
            words += [f"{name}{value}"] * bool(value)
        return "-".join(words)


# Options that change nothing, however they are put, of a call of the default sizes and heads.
WITHOUT_EFFECT: tuple[dict[str, Any], ...] = (
    {"window": (111, 111)},
    {"window": (2**40, -1)},
    {"softcap": 1e5},
    {"mask": torch.ones(1, dtype=torch.bool)},
    {"mask": torch.zeros(65, 1)},
    {"seqlens_k": torch.tensor([111, 5000])},
    {"sinks": torch.full((4,), -torch.inf)},
    {"alibi_slopes": torch.zeros(4)},
)


@dataclass
class Inputs:
    """The tensors q, k, v of a call and its options."""

    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Inputs:
        """The same numbers in float64."""

        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        q, k, v = self.tensors
        options = {name: wide(x) for name, x in self.options.items()}
        return Inputs((wide(q), wide(k), wide(v)), options)

    def differentiable(self) -> dict[str, Tensor]:
        """A leaf for each floating-point tensor, by name; they take its place in the call."""
        q, k, v = (x.detach().requires_grad_() for x in self.tensors)
        self.tensors = (q, k, v)
        leaves = {"q": q, "k": k, "v": v}
        for name, x in self.options.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                leaves[name] = self.options[name] = x.detach().requires_grad_()
        return leaves


def build(case: Case) -> Inputs:
    """The tensors of a case: a function of the case alone."""
    generator = torch.Generator().manual_seed(crc32(str(case).encode()))
    dtype = DTYPES[case.dtype]
    (hq, hk), (m, n), (d, dv) = case.heads, case.sizes, case.head_sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = laid_out(normal(case.batch, hq, m, d).to(dtype), case.layout)
    k = laid_out(normal(case.batch, hk, n, d).to(dtype), case.layout)
    v = laid_out(normal(case.batch, hk, n, dv).to(dtype), case.layout)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "dropout_p": case.dropout,
        "scale": case.scale,
    }
    if case.mask != "none":
        options["mask"] = make_mask(case.mask, (case.batch, hq, m, n), dtype, generator)
    if case.seqlens != "none":
        lengths = torch.randint(1, n + 1, (case.batch,), generator=generator)
        if case.seqlens == "zero":
            lengths[0] = 0
        options["seqlens_k"] = lengths.to(torch.int32 if case.batch % 2 else torch.int64)
    if case.sinks:
        options["sinks"] = normal(hq)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, hq + 1)
    return Inputs((q, k, v), options)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, H, M, D] with the same values in another memory order, always dense in D."""
    if layout == "BHMD":
        return x.contiguous()
    if layout == "BMHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "MBHD":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert layout == "slice", layout  # of a fused projection: wider rows, and an odd first element
    batch, heads, rows, d = x.shape
    wide = torch.full((batch, rows, heads, 2 * d + 3), float("nan"), dtype=x.dtype)
    part = wide[..., 1 : d + 1].transpose(1, 2)
    part.copy_(x)
    return part


def make_mask(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """The masks of the design, by name; those that hide hide a third."""
    batch, heads, m, n = shape

    def keep(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator) > 1 / 3

    def bias(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    if kind == "bool":
        return keep(batch, heads, m, n)
    if kind == "rows":  # whole queries see nothing
        return keep(batch, 1, m, n) & keep(batch, 1, m, 1)
    if kind == "padding":
        return keep(batch, 1, 1, n)
    if kind == "float":
        return bias(batch, heads, m, n)
    if kind == "bias":  # T5's: one for all sequences, and not dense in its last dimension
        return bias(1, m, n, heads).permute(0, 3, 1, 2)
    if kind == "inf":  # Hugging Face's float masks
        return bias(m, n).masked_fill(~keep(m, n), float("-inf"))
    assert kind == "float32", kind  # wider than the inputs
    return torch.randn(batch, 1, m, n, generator=generator)


_SIZES = ((1, 1), (1, 197), (3, 63), (63, 3), (65, 111), (111, 65), (64, 64), (197, 197), (17, 130))
_HEADS = ((4, 4), (4, 2), (6, 1), (1, 1), (3, 3))
_HEAD_SIZES = (
    (64, 64),
    (16, 16),
    (32, 32),
    (128, 128),
    (80, 80),
    (1, 1),
    (40, 40),
    (64, 33),
    (65, 96),
)
_LAYOUTS = ("BMHD", "BHMD", "MBHD", "slice")
_WINDOWS = (None, 1, 16, (7, 9), (-1, 4), (5, -1), (300, 300))
_MASKS = ("none", "bool", "rows", "padding", "float", "bias", "inf", "float32")
_SEQLENS = ("none", "any", "zero")


def covering(seed: int, factors: dict[str, Sequence[Any]], kind: Any = Case) -> list[Any]:
    """Greedy pairwise cover: of 60 random rows each time the one with the most new pairs."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        (a, x, b, y)
        for a, b in combinations(range(len(names)), 2)
        for x, y in product(range(len(factors[names[a]])), range(len(factors[names[b]])))
    }
    cases = []
    while missing:
        a, x, b, y = min(missing)  # each row takes one missing pair for certain, so that this ends
        rows = []
        for _ in range(60):
            row = [rng.randrange(len(factors[name])) for name in names]
            row[a], row[b] = x, y
            rows.append(row)
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        cases.append(kind(**{name: factors[name][i] for name, i in zip(names, best, strict=True)}))
    return cases


def _pairs(row: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)}


CORE = covering(
    1,
    {
        "sizes": _SIZES,
        "head_sizes": _HEAD_SIZES,
        "mask": _MASKS,
        "window": _WINDOWS,
        "heads": _HEADS,
        "dtype": tuple(DTYPES),
        "layout": _LAYOUTS,
        "seqlens": _SEQLENS,
        "batch": (1, 2, 3),
        "causal": (False, True),
    },
)
OPTIONS = covering(
    2,
    {
        "sizes": ((1, 65), (65, 111), (111, 63), (130, 130)),
        "mask": ("none", "rows", "bias"),
        "dtype": tuple(DTYPES),
        "window": (None, 16, (-1, 4)),
        "heads": ((4, 2), (3, 3)),
        "head_sizes": ((64, 64), (40, 33)),
        "causal": (False, True),
        "seqlens": ("none", "zero"),
        "softcap": (None, 2.0),
        "sinks": (False, True),
        "alibi": (False, True),
        "dropout": (0.0, 0.25),
        "scale": (None, 0.3),
    },
)
# One case per option alone: what a backend says to it does not depend on the others.
SINGLE = [
    Case(softcap=2.0),
    Case(sinks=True),
    Case(alibi=True),
    Case(dropout=0.25),
    Case(scale=0.3),
    Case(window=16),
    Case(causal=True),
    Case(mask="bias"),
    Case(seqlens="zero"),
]
# What was wrong once, and takes more than two options: products with bytes among what leads to them, tiles of 16 keys.
FOUND = [
    Case(mask="rows", dropout=0.25),
    Case(mask="rows", dropout=0.25, dtype="bf16", head_sizes=(256, 256)),
    Case(mask="rows", softcap=2.0, alibi=True, dtype="f16", sizes=(130, 130)),
]
ALL = list({str(case): case for case in CORE + OPTIONS + SINGLE + FOUND}.values())
