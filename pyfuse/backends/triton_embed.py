"""The embedding sum on the Triton kernels: what they take, and the forward's call."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.triton_device import dropout_words, kernels

TABLES = frozenset(("weight", "position_weight", "segment_weight"))
MOST_TOKENS = (1 << 31) - (1 << 16)  # counted in 32 bits, and rounded up to tiles


def why_not_embed(
    token_ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    **_: Any,
) -> str | None:
    reason = triton_device.why_not("weight", weight)
    if reason is not None:
        return reason
    device = weight.get_device()
    for name, t in (
        ("token_ids", token_ids),
        ("weight", weight),
        ("position_weight", position_weight),
        ("positions", positions),
        ("segment_ids", segment_ids),
        ("segment_weight", segment_weight),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
    ):
        if t is None:
            continue
        if t.get_device() != device:
            return f"{name} is on {t.device}, but weight is on {weight.device}"
        if name in TABLES and t.stride(1) != 1 and t.shape[1] > 1:
            return f"{name} has stride {t.stride(1)} in its last dimension, the kernel needs 1"
    if token_ids.numel() > MOST_TOKENS:
        return f"{token_ids.numel()} tokens, the kernel counts to {MOST_TOKENS}"
    return None


def embed(token_ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See pyfuse.embed. A token with an id outside of its table gives NaN, and nothing is read for it: to raise
    IndexError, the host would have to wait for the GPU. With TRITON_DEBUG=1 the kernel stops there, as torch's do."""
    return _embed(None, token_ids, weight, **options)


def forward(
    token_ids: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Saved: mean and 1/deviation of each token, [tokens, 2], where there is a norm."""
    statistics = None
    if options.get("norm_weight") is not None:
        statistics = weight.new_empty((token_ids.numel(), 2), dtype=torch.float32)
    return _embed(statistics, token_ids, weight, **options), (statistics,)


def _embed(
    statistics: Tensor | None,
    token_ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sparse: bool = False,
    **rows: Any,
) -> Tensor:
    tokens, d = token_ids.numel(), weight.shape[1]
    y = weight.new_empty((*token_ids.shape, d))
    if y.numel() == 0:
        return y
    device = triton_device.of(weight)
    size = weight.element_size()
    unit, source = sources(16 // size, token_ids, weight, **rows)
    launch = kernels("position_configs").gather(
        d, size, unit, norm_weight is not None, bool(rows.get("sinusoidal")), device.arch
    )
    args: tuple[Any, ...] = (
        *source, vector(norm_weight), vector(norm_bias), y, statistics,
        tokens, scale, eps, *dropout_words(dropout_p, dropout_seed),
    )  # fmt: skip
    module = kernels("embedding")
    if launch.wide:
        kernel = module.embed_wide_kernel
    else:
        kernel = module.embed_kernel
        args = (*args, launch.stretches)
    device.launch(kernel, (launch.programs(tokens),), args, launch.options)
    return y


# What all kernels of the embedding are told -------------------------------------------------------


def sources(
    unit: int,
    token_ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    **_: Any,
) -> tuple[int, tuple[Any, ...]]:
    """(what strides are counted in: `unit` elements or what of it divides them all, the arguments that say which rows
    are summed up: see kernels/embedding.py)."""
    tables = (weight, position_weight, segment_weight)
    strides = [0 if t is None else t.stride(0) for t in tables]
    unit = gcd(unit, *strides)
    length = None
    if sinusoidal or position_weight is not None:
        length = token_ids.shape[-1]
        if (length if positions is None else positions.numel()) == token_ids.numel():
            length = None  # every token has a position of its own
    return unit, (
        tables,
        *[stride // unit for stride in strides],
        *[0 if t is None else t.shape[0] for t in tables],
        tuple([None if t is None else t.contiguous() for t in (token_ids, positions, segment_ids)]),
        length,
        _turns(weight.shape[1], weight.device) if sinusoidal else None,
    )


def vector(t: Tensor | None) -> Tensor | None:
    """A parameter of the norm as the kernels take it."""
    if t is None or t.dtype in triton_device.DTYPES:
        return t if t is None else t.contiguous()
    return t.float().contiguous()


# 2^192 / 2π, rounded.
_TURN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E410


@lru_cache(maxsize=16)
def _turns(d: int, device: torch.device) -> Tensor:
    """[D/2] int64: by how much of a turn the angle of each pair of columns grows with the position, in 2^-64."""
    pairs = torch.arange(0, d, 2, dtype=torch.float64, device="cpu")
    angles = 10000.0 ** (-pairs / max(d, 1))  # the float64 of pyfuse.sinusoids
    turns = []
    for angle in angles.tolist():
        numerator, denominator = angle.as_integer_ratio()
        part = (numerator * _TURN // denominator >> 128) & (1 << 64) - 1
        turns.append(part - (1 << 64) if part >> 63 else part)
    return torch.tensor(turns, dtype=torch.int64, device="cpu").to(device)
