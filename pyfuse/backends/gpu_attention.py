"""What attention's backends for GPUs, of whatever kernels, tell them alike."""

from __future__ import annotations

import math

from torch import Tensor

MOST_KEYS = 1 << 30  # positions and their differences are 32-bit
LOG2E = math.log2(math.e)


def empty_like_q(q: Tensor, dv: int) -> Tensor:
    """o in the memory order of q: a [B, M, H, D] view gives a [B, M, H, Dv] view, so nothing is copied later."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, rows, heads, dv)).transpose(1, 2)
    return q.new_empty((batch, heads, rows, dv))


def strides(t: Tensor) -> tuple[int, ...]:
    """Of batch, head and row; a packed tensor [T, H, D] has no batch."""
    return t.stride()[:3] if t.ndim == 4 else (0, t.stride(1), t.stride(0))


def limits(
    causal: bool, window: tuple[int, int] | None, most: int
) -> tuple[int | None, int | None]:
    """How many keys before and after its own place a query sees; None for no limit."""
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    return None if left < 0 else min(left, most), None if right < 0 else min(right, most)


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """What q·k is multiplied by: for units of log 2, or for tanh; and what tanh is, for those units."""
    if softcap is None:
        return scale * LOG2E, None
    return scale / softcap, softcap * LOG2E
