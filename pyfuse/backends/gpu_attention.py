"""What attention's backends for GPUs, of whatever kernels, tell them alike."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
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


# The backward ------------------------------------------------------------------------------------


def only_scaled(options: dict[str, Any]) -> bool:
    """In the backward a scale below 0 is no different, since nothing takes a maximum."""
    mask = options.get("mask")
    plain = options["softcap"] is None and options["alibi_slopes"] is None
    return plain and (mask is None or mask.dtype == torch.bool)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """d lse / d sink is the weight of the sink, which has no value: its dp is 0."""
    weight = (sinks.float()[:, None] - lse).exp_()
    return per_head(weight.mul_(delta).neg_(), sinks)


class MaskSums(NamedTuple):
    """What a kernel sums up of a mask's gradient, which leaves no number to two programs.

    Where rows or columns are shared, what each head gives is summed apart: few numbers, many programs.
    """

    sizes: tuple[int, ...]  # of what it gives
    dtype: torch.dtype
    sharing: tuple[int, int]  # how many sequences and heads one element is the sum of
    apart: tuple[bool, bool]  # whether rows and columns have their own elements

    @classmethod
    def of(cls, mask: Tensor, batch: int, heads: int, m: int, n: int) -> MaskSums:
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        apart = shape[2] == m, shape[3] == n
        if all(apart):
            return cls(shape, mask.dtype, (batch // shape[0], heads // shape[1]), apart)
        return cls((batch, heads, *shape[2:]), torch.float32, (1, 1), apart)

    def finish(self, sums: Tensor, mask: Tensor) -> Tensor:
        """The gradient of the mask, from what the kernel gave."""
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        shared = [i for i in (0, 1) if shape[i] == 1 and self.sizes[i] > 1]
        return (sums.sum(shared) if shared else sums).to(mask.dtype).view(mask.shape)


def without_pairs(
    grads: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    lse: Tensor,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """No query or no key: all gradients are 0, but for lse, which is the sink then."""
    named = {"q": q, "k": k, "v": v, **options}
    result = {name: torch.zeros_like(named[name]) for name in needs}
    if "sinks" in needs and len(grads) > 1 and grads[1] is not None:
        result["sinks"] = per_head(grads[1].float(), options["sinks"])
    return result


def per_head(rows: Tensor, parameter: Tensor) -> Tensor:
    """[B, H, M] or [H, T] summed to [H]."""
    return rows.sum((0, 2) if rows.ndim == 3 else 1).to(parameter.dtype)


def unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def dense_like(t: Tensor) -> Tensor:
    """A tensor for the gradient of t, in t's memory order where that is dense."""
    return unit_last(torch.empty_like(t))
