"""rope_pair of a backend that has rope: both tensors in turn, where it has nothing better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyfuse.dispatch import Gradient, Impl

Grads = tuple[Tensor | None, ...]
Both = tuple[Tensor, Tensor]


def pair_of(
    rope: Impl,
    fn: Callable[..., Both] | None = None,
    turn_back: Callable[..., Both] | None = None,
) -> Impl:
    """fn: rope_pair itself, where there is a better one; turn_back(dq, dk, *tensors, **options): its gradient."""
    one = rope.gradient
    assert one is not None

    def in_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Both:
        return rope.fn(q, cos, sin, **options), rope.fn(k, cos, sin, **options)

    both = in_turn if fn is None else fn

    def why_not(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> str | None:
        for name, x in (("q", q), ("k", k)):
            reason = rope.why_not(x, cos, sin, **options)
            if reason is not None:
                return f"{name}, as rope's x: {reason}"
        return None

    def forward(*tensors: Tensor, **options: Any) -> tuple[Both, tuple[Tensor, ...]]:
        return both(*tensors, **options), ()

    def backward(
        grads: Grads,
        tensors: tuple[Tensor, ...],
        options: dict[str, Any],
        saved: tuple[Tensor, ...],
        needs: frozenset[str],
    ) -> dict[str, Tensor]:
        q, k, cos, sin = tensors
        dq, dk = grads
        if turn_back is not None and dq is not None and dk is not None and needs >= {"q", "k"}:
            found = turn_back(dq, dk, *tensors, **options)
            return dict(zip("qk", found, strict=True))
        alone = frozenset({"x"})
        return {
            name: one.backward((grad,), (x, cos, sin), options, saved, alone)["x"]
            for name, x, grad in (("q", q, dq), ("k", k, dk))
            if name in needs
        }

    def why_not_backward(
        needs: frozenset[str], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any
    ) -> str | None:
        needs = frozenset("x" if name in ("q", "k") else name for name in needs)
        return one.why_not(needs, q, cos, sin, **options)

    return Impl(both, why_not, Gradient(forward, backward, why_not_backward, one.restore))
