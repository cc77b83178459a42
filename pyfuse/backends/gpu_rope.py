"""The rotary embedding of backends for GPUs: all but the launch, which each of them has its own of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.rope_pair import pair_of
from pyfuse.dispatch import Gradient, Impl

MOST_TOKENS = (1 << 31) - (1 << 16)  # counted in 32 bits
LARGEST_HEAD = 8192

Pairs = Sequence[tuple[Tensor, Tensor]]
# (pairs, cos, sin, layout, positions, sign): write x rotated by its tokens' angles (sign 1) or back by them (-1) into
# y, for one or two pairs (x, y) of which none is empty; there are angles, and cos and sin have the same strides and
# unit stride in their last dimension.
Turn = Callable[[Pairs, Tensor, Tensor, str, Tensor | None, float], None]


class Rope:
    """rope, rope_pair and their gradients of a backend that has `turn`; why_not: what it says of a tensor by name."""

    def __init__(self, turn: Turn, why_not: Callable[[str, Tensor], str | None]) -> None:
        self._turn, self._why_not_tensor = turn, why_not

    def impls(self) -> dict[str, Impl]:
        gradient = Gradient(self.forward, self.backward, why_not_backward, restore)
        one = Impl(self.rope, self.why_not, gradient)
        return {"rope": one, "rope_pair": pair_of(one, self.rope_pair, self.pair_backward)}

    def why_not(self, x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> str | None:
        reason = self._why_not_tensor("x", x)
        if reason is not None:
            return reason
        if x.stride(3) != 1 and x.shape[3] > 1:
            return f"x has stride {x.stride(3)} in its last dimension, the kernel needs 1"
        if x.shape[3] > LARGEST_HEAD:
            return f"head size {x.shape[3]}, the kernel has up to {LARGEST_HEAD}"
        if x.shape[0] * x.shape[2] > MOST_TOKENS:
            return f"{x.shape[0] * x.shape[2]} tokens, the kernel counts to {MOST_TOKENS}"
        return None

    def rope(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: str,
        positions: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """See pyfuse.rope. The turned elements of a token whose position is outside the table are NaN: to raise
        IndexError, the host would have to wait for the GPU."""
        y = x if inplace else torch.empty_like(x)
        self.turn(((x, y),), cos, sin, layout, positions, 1.0)
        return y

    def rope_pair(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: str,
        positions: Tensor | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See pyfuse.rope_pair: one launch, which reads cos and sin once."""
        q_turned, k_turned = (x if inplace else torch.empty_like(x) for x in (q, k))
        self.turn(((q, q_turned), (k, k_turned)), cos, sin, layout, positions, 1.0)
        return q_turned, k_turned

    def pair_backward(
        self,
        dq_turned: Tensor,
        dk_turned: Tensor,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: str,
        positions: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Gradients turned back, in one launch too."""
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        grads = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq_turned, dk_turned))
        self.turn(tuple(zip(grads, (dq, dk), strict=True)), cos, sin, layout, positions, -1.0)
        return dq, dk

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.rope(x, cos, sin, **options), ()

    def backward(
        self,
        grads: Sequence[Tensor | None],
        tensors: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
        saved: tuple[Tensor, ...],
        needs: frozenset[str],
    ) -> dict[str, Tensor]:
        """dx = dy turned back by the same angles."""
        (dy,), (x, cos, sin) = grads, tensors
        dx = torch.empty_like(x)
        if dy is None:
            return {"x": dx.zero_()}
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        self.turn(((dy, dx),), cos, sin, options["layout"], options["positions"], -1.0)
        return {"x": dx}

    def turn(
        self,
        pairs: Pairs,
        cos: Tensor,
        sin: Tensor,
        layout: str,
        positions: Tensor | None,
        sign: float,
    ) -> None:
        """As Turn, of any tensors that rope takes."""
        pairs = [pair for pair in pairs if pair[0].numel() > 0]
        if not pairs:
            return
        if cos.shape[-1] == 0:
            for source, target in pairs:
                target.copy_(source)
            return
        if sin.stride() != cos.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        self._turn(pairs, cos, sin, layout, positions, sign)


def restore(*_: Any) -> tuple[Tensor, ...]:
    """What forward saves is nothing."""
    return ()


def why_not_backward(
    needs: frozenset[str], x: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False, **_: Any
) -> str | None:
    if not needs <= {"x"}:
        return "the kernel has no gradient of cos and sin"
    if inplace:
        return "inplace overwrites x"
    return None


def table_strides(t: Tensor) -> tuple[int, int]:
    """Of batch and row in cos and sin [B, M, R/2], or of row in [M, R/2]."""
    return (t.stride(0) if t.ndim == 3 else 0, t.stride(-2))


def position_strides(positions: Tensor | None) -> tuple[int, int]:
    """Of batch and token in positions [B, M], or of token in [M]."""
    if positions is None:
        return (0, 0)
    return (0 if positions.ndim == 1 else positions.stride(0), positions.stride(-1))
