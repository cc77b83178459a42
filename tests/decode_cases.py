"""Cases of decode_attention: a covering design of fixed seed over what can be combined."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import pytest
import torch
from cases import DTYPES, covering
from torch import Tensor

import pyfuse
from pyfuse.backends import cuda_device, triton_device

NAN = float("nan")
# Of backends that have not all dtypes: why they cannot take a tensor.
REFUSALS = {"cuda": cuda_device.why_not, "triton": triton_device.why_not}


@dataclass(frozen=True)
class Case:
    """One call; capacity and lengths are in keys."""

    dtype: str = "f32"
    heads: tuple[int, int] = (4, 2)  # Hq, Hk
    m: int = 1
    head_sizes: tuple[int, int] = (64, 64)  # D, Dv
    page_size: int | None = None  # None: contiguous
    lengths: tuple[int, ...] = (300, 0, 1, 129)
    layout: str = "BHND"
    append: bool = False
    causal: bool = True
    window: int | tuple[int, int] | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    index: str = "int64"  # of seqlens_k and block_table

    def __str__(self) -> str:
        """The id in pytest: whatever is not the default."""
        words = []
        for name, default in vars(Case()).items():
            value = getattr(self, name)
            if value != default:
                text = re.sub(r"[(), ]+", "/", str(value)).strip("/")
                words.append(text if isinstance(value, str) else f"{name}{text}")
        return "-".join(words) or "plain"


@dataclass
class Call:
    """Arguments of decode_attention. The cache is NaN wherever no key lies."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        """o and lse, on a copy of the cache, which holds the appended keys afterwards.

        A dtype that the backend does not have skips the test."""
        refusal = REFUSALS[backend]("q", self.tensors["q"]) if backend in REFUSALS else None
        if refusal is not None:
            pytest.skip(refusal)
        for name in ("k_cache", "v_cache"):
            self.tensors[name] = copy_of(self.tensors[name])
        options = {**self.options, "return_lse": True, "backend": backend} | options
        o, lse = pyfuse.decode_attention(**self.tensors, **options)
        return o, lse

    def double(self) -> Call:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        tensors = {name: wide(x) for name, x in self.tensors.items()}
        return Call(tensors, {name: wide(x) for name, x in self.options.items()})

    def caches(self) -> tuple[Tensor, Tensor]:
        return self.tensors["k_cache"], self.tensors["v_cache"]


def copy_of(x: Tensor) -> Tensor:
    """The same numbers and strides in memory of its own."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return copy.copy_(x)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "BHND":
        return x
    if layout == "BNHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    assert layout == "wide", layout  # rows with a gap between them, of an odd size
    wide = x.new_full((*x.shape[:3], x.shape[3] + 3), NAN)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


def paged(cache: Tensor, lengths: tuple[int, ...], page_size: int, table: Tensor) -> Tensor:
    """The same keys in pages; whatever the table does not name stays NaN."""
    _, heads, _, d = cache.shape
    pages = cache.new_full((table.numel() + 2, heads, page_size, d), NAN)
    for b, length in enumerate(lengths):
        for key in range(0, length, page_size):
            end = min(key + page_size, length)
            pages[table[b, key // page_size], :, : end - key] = cache[b, :, key:end]
    return pages


def build(case: Case) -> Call:
    """The tensors of a case: a function of the case, but the same numbers for every page size."""
    seed = crc32(str(replace(case, page_size=None, append=False, layout="BHND")).encode())
    generator = torch.Generator().manual_seed(seed)
    dtype, (hq, hk), (d, dv) = DTYPES[case.dtype], case.heads, case.head_sizes
    batch, lengths = len(case.lengths), case.lengths
    page_size = case.page_size or max(*lengths, 1) + 5
    width = -(-max(lengths) // page_size) + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"q": normal(batch, case.m, hq, d).transpose(1, 2)}
    options: dict[str, Any] = {"causal": case.causal, "window": case.window}
    options |= {"softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.randn(hq, generator=generator)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, hq + 1)
    integer = {"int32": torch.int32, "int64": torch.int64}[case.index]
    options["seqlens_k"] = torch.tensor(lengths, dtype=integer)
    table = torch.arange(batch * width)
    if case.page_size is not None:
        table = torch.tensor(random.Random(seed).sample(range(batch * width + 2), batch * width))
    table = table.reshape(batch, width)
    for name, size in (("k", d), ("v", dv)):
        cache = normal(batch, hk, max(*lengths, 1), size)
        new = normal(batch, case.m, hk, size).transpose(1, 2)
        for b, length in enumerate(lengths):
            last = slice(max(length - case.m, 0), length)
            new[b, :, : case.m - (last.stop - last.start)] = NAN
            new[b, :, case.m - (last.stop - last.start) :] = cache[b, :, last]
            if case.append:
                cache[b, :, last] = NAN
            cache[b, :, length:] = NAN
        if case.page_size is not None:
            cache = paged(cache, lengths, page_size, table)
        else:
            cache = torch.nn.functional.pad(cache, (0, 0, 0, 5), value=NAN)
        tensors[f"{name}_cache"] = laid_out(cache, case.layout)
        if case.append:
            tensors[f"{name}_new"] = new
    if case.page_size is not None:
        used = torch.arange(width) * page_size < options["seqlens_k"][:, None]
        options["block_table"] = torch.where(used, table, 10**6).to(integer)
    return Call(tensors, options)


FACTORS: dict[str, Any] = {
    "dtype": tuple(DTYPES),
    "heads": ((4, 4), (4, 2), (9, 3), (6, 1), (20, 1)),
    "m": (1, 2, 5, 16),
    "head_sizes": ((64, 64), (128, 128), (40, 33), (65, 96), (1, 1), (80, 80), (256, 32)),
    "page_size": (None, 1, 7, 16, 48, 128),
    "lengths": ((300, 0, 1, 129), (257, 255), (16,), (63, 64, 65), (700,)),
    "layout": ("BHND", "BNHD", "wide"),
    "causal": (True, False),
    "window": (None, 1, 16, (7, 9), (-1, 4), (300, -1)),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "alibi": (False, True),
    "index": ("int32", "int64"),
}
CASES: list[Case] = covering(3, FACTORS, Case)
APPENDED = [
    replace(case, append=True) for case in CASES if min(case.lengths) >= case.m
]  # seqlens_k counts what is appended
