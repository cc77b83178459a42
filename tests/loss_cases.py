"""What the tests of linear_cross_entropy share: arguments, torch's own formula, results held to float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numerics
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfuse.ops import linear_cross_entropy

REDUCTIONS = ("mean", "sum", "none")
Given = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, weight, target, bias
ALL: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    ALL,
]


def make(
    tokens: int, v: int, k: int, dtype: torch.dtype = torch.float32, biased: bool = True
) -> Given:
    """With logits of some units, and every fourth token or so ignored."""
    x, w = torch.randn(tokens, k).to(dtype), (2.0 * torch.randn(v, k) / k**0.5).to(dtype)
    target = torch.randint(v, (tokens,))
    target[torch.rand(tokens) < 0.25] = -100
    target[0] = v - 1
    return x, w, target, torch.randn(v).to(dtype) if biased else None


def reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """The definition, written with torch's own functions alone."""
    logits = F.linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat, targets = logits.reshape(-1, weight.shape[0]), target.reshape(-1)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(flat, targets, reduction=reduction, **options)
    if z_loss:
        squares = flat.logsumexp(1).square()
        kept = targets != ignore_index
        z = {"none": squares * kept, "sum": squares[kept].sum(), "mean": squares[kept].mean()}
        loss = loss + z_loss * z[reduction]
    return loss.reshape(target.shape) if reduction == "none" else loss


def gradients(
    function: Callable[..., Tensor], given: Given, flow: Tensor | None, options: dict[str, Any]
) -> list[Tensor]:
    """The loss and the gradients of x, weight and bias."""
    x, w, target, bias = given
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, w, bias)]
    loss = function(leaves[0], leaves[1], target, leaves[2], **options)
    flow = torch.ones_like(loss) if flow is None else flow.to(loss.dtype)
    found = torch.autograd.grad(loss, [t for t in leaves if t is not None], flow)
    return [loss.detach(), *found]


def checked(
    given: Given,
    name: str,
    flow: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> None:
    """Loss and gradients against float64."""
    x, w, target, bias = given
    double = (x.double(), w.double(), target, None if bias is None else bias.double())
    exact = gradients(reference, double, flow, options)
    eager = gradients(reference, given, flow, options)
    ours = gradients(partial(linear_cross_entropy, backend=backend), given, flow, options)
    for i, kind in enumerate(("output", *["gradient"] * (len(ours) - 1))):
        shown = f"{name} {('loss', 'dx', 'dW', 'db')[i]}"
        # Sums that cancel (over a handful of words they do) leave eager's error to luck.
        few = w.shape[0] < 16
        numerics.check(ours[i], exact[i], eager[i], shown, kind, few)  # type: ignore[arg-type]


def F_cross_entropy(x: Tensor, w: Tensor, target: Tensor, b: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b), target, **options)


class Ops(TorchDispatchMode):
    """The names of torch's operations inside, and the largest memory that any tensor made there has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result
