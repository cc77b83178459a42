"""The dropout operation around a backend's kernel, which does both of its passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from pyfuse.dispatch import Gradient, Impl

Saved = tuple[Tensor, ...]


class Write(Protocol):
    def __call__(
        self, x: Tensor, flow: Tensor | None, p: float, seed: Tensor | None, activation: str | None
    ) -> Tensor:
        """dropout(act(x)); with the flow that arrives there the gradient of x. For this x may be what the forward
        returned, if act is relu, and is not read without an activation."""


def impl_of(write: Write, why_not: Callable[[Tensor], str | None]) -> Impl:
    """The operation; why_not: why the kernel cannot take this x."""

    def dropout(
        x: Tensor,
        *,
        dropout_p: float,
        dropout_seed: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        return write(x, None, dropout_p, dropout_seed, activation)

    def why_not_dropout(x: Tensor, **options: Any) -> str | None:
        return why_not(x)

    def forward(x: Tensor, **options: Any) -> tuple[Tensor, Saved]:
        return dropout(x, **options), ()

    def backward(
        grads: Sequence[Tensor | None],
        tensors: Saved,
        options: dict[str, Any],
        saved: Saved,
        needs: frozenset[str],
    ) -> dict[str, Tensor]:
        (dy,), (x,) = grads, tensors
        assert dy is not None  # there is but one result
        p, seed, activation = (options[n] for n in ("dropout_p", "dropout_seed", "activation"))
        return {"x": write(x, dy, p, seed, activation)}

    gradient = Gradient(forward, backward, _why_not_gradient, _restore, _keep)
    return Impl(dropout, why_not_dropout, gradient)


def _keep(y: Tensor, tensors: Saved, options: dict[str, Any]) -> Saved:
    """relu's result says where the gradient passes: it is positive there, and 0 elsewhere. Without an activation
    the shape is enough."""
    activation = options["activation"]
    if activation == "relu":
        return (y,)
    return tensors if activation is not None else (y.new_empty(()).expand(y.shape),)


def _restore(*_: Any) -> Saved:
    """What forward saves is nothing."""
    return ()


def _why_not_gradient(needs: frozenset[str], x: Tensor, **options: Any) -> str | None:
    return None  # whatever the forward takes
