"""The embedding sum of backends for GPUs: what they take, and what their kernels are told alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLES = frozenset(("weight", "position_weight", "segment_weight"))
MOST_TOKENS = (1 << 31) - (1 << 16)  # counted in 32 bits, and rounded up to tiles
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(
    why_not_tensor: Callable[[str, Tensor], str | None],
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
    reason = why_not_tensor("weight", weight)
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


def new_statistics(
    token_ids: Tensor, weight: Tensor, norm_weight: Tensor | None = None, **_: Any
) -> Tensor | None:
    """Mean and 1/deviation of each token, [tokens, 2], where there is a norm."""
    if norm_weight is None:
        return None
    return weight.new_empty((token_ids.numel(), 2), dtype=torch.float32)


class Sources(NamedTuple):
    """Of token, position and segment the tables and the ids; length: tokens after which positions start again (None:
    every token has its own); turns: of a sinusoid."""

    tables: tuple[Tensor, Tensor | None, Tensor | None]
    ids: tuple[Tensor, Tensor | None, Tensor | None]
    length: int | None
    turns: Tensor | None


def sources(
    token_ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    **_: Any,
) -> Sources:
    length = None
    if sinusoidal or position_weight is not None:
        length = token_ids.shape[-1]
        if (length if positions is None else positions.numel()) == token_ids.numel():
            length = None
    return Sources(
        (weight, position_weight, segment_weight),
        (token_ids.contiguous(), _dense(positions), _dense(segment_ids)),
        length,
        turns(weight.shape[1], weight.device) if sinusoidal else None,
    )


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def vector(t: Tensor | None) -> Tensor | None:
    """A parameter of the norm as the kernels take it."""
    if t is None or t.dtype in KERNEL_DTYPES:
        return t if t is None else t.contiguous()
    return t.float().contiguous()


# 2^192 / 2π, rounded.
_TURN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E410


@lru_cache(maxsize=16)
def turns(d: int, device: torch.device) -> Tensor:
    """[D/2] int64: by how much of a turn the angle of each pair of columns grows with the position, in 2^-64."""
    pairs = torch.arange(0, d, 2, dtype=torch.float64, device="cpu")
    angles = 10000.0 ** (-pairs / max(d, 1))  # the float64 of pyfuse.sinusoids
    found = []
    for angle in angles.tolist():
        numerator, denominator = angle.as_integer_ratio()
        part = (numerator * _TURN // denominator >> 128) & (1 << 64) - 1
        found.append(part - (1 << 64) if part >> 63 else part)
    return torch.tensor(found, dtype=torch.int64, device="cpu").to(device)
