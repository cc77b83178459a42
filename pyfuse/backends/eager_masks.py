"""Which key a query sees, and the positional bias: the masks of attention in plain torch.

Positions are int64 and count keys: query i and key j of one sequence stand on the same axis, so
that causal, window and ALiBi compare them directly.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min / math.log2(math.e)


class Positions(NamedTuple):
    """Where queries and keys stand on the axis of the keys."""

    query: Tensor  # [..., M, 1]
    key: Tensor  # [N]

    def distance(self) -> Tensor:
        """|query - key|, broadcastable to [B, Hq, M, N]."""
        return (self.query - self.key).abs()


def aligned_positions(
    m: int, n: int, device: torch.device, ends: Tensor | None = None
) -> Positions:
    """Align M queries with N keys so that the last query stands on the last key.

    ends [B]: the last key of sequence b is ends[b] - 1 rather than N - 1.
    """
    query = torch.arange(m, device=device)[:, None]
    key = torch.arange(n, device=device)
    if ends is None:
        return Positions(query + (n - m), key)
    return Positions(query + (ends.to(torch.int64)[:, None, None, None] - m), key)


def in_band(positions: Positions, causal: bool, window: tuple[int, int] | None) -> list[Tensor]:
    """The conditions of causal and window: none, one or two bool tensors."""
    left, right = window if window is not None else (-1, -1)
    if causal:
        right = 0
    conditions = []
    if left >= 0 or right >= 0:
        offset = positions.key - positions.query  # compared with the limits, so that none overflows
        if right >= 0:
            conditions.append(offset <= right)
        if left >= 0:
            conditions.append(offset >= -left)
    return conditions


def before(positions: Positions, lengths: Tensor) -> Tensor:
    """[B, 1, 1, N]: True for the keys of sequence b before lengths[b]."""
    return positions.key < lengths[:, None, None, None]


def four_dims(mask: Tensor) -> Tensor:
    """mask with leading dimensions of size 1, so that it has four."""
    return mask[(None,) * (4 - mask.dim())]


def allowed_by(mask: Tensor) -> Tensor:
    """Where a bool mask is True, or an additive one does not forbid: with -inf, or with a number that no float32
    holds in units of log 2, as kernels count scores."""
    return mask if mask.dtype == torch.bool else ~(mask.float() <= _LOWEST)


def all_of(conditions: list[Tensor]) -> Tensor | None:
    """Their conjunction, broadcast as far as they need; None where there is no condition."""
    return reduce(torch.logical_and, conditions) if conditions else None


class Segments(NamedTuple):
    """Packed sequences: for each row its sequence (-1: in none) and its place within."""

    sequence: Tensor
    place: Tensor


def segments(cu_seqlens: Tensor, rows: int) -> Segments:
    """Read cu_seqlens [B + 1], the first row of each sequence and the end, for each row."""
    bounds = cu_seqlens.to(torch.int64)
    row = torch.arange(rows, device=bounds.device)
    # Counting the ends up to here, not a search: it traces everywhere and skips empty sequences.
    index = (row[:, None] >= bounds[1:]).sum(-1)
    inside = (index < bounds.shape[0] - 1) & (row >= bounds[0])
    return Segments(torch.where(inside, index, -1), row - bounds[index])


def packed_positions(
    q: Segments, k: Segments, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Positions:
    """Positions within each sequence, its last query standing on its last key."""
    excess = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).to(torch.int64)
    # The appended 0 is for the rows of no sequence, which index it as -1.
    shift = torch.cat([excess, excess.new_zeros(1)])[q.sequence]
    return Positions((q.place + shift)[:, None], k.place)
