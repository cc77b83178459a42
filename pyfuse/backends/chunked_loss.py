"""Cross-entropy of a linear layer's logits, chunk by chunk over the tokens, with its gradients in the same pass.

For one token with logits l [V] (after bias and softcap), its target y, lse = log(sum exp l) and p = exp(l - lse),
with label smoothing e, z-loss factor z and weight g (the gradient that arrives at its loss):

    loss = (1 - e) (lse - l[y]) + e (lse - mean l) + z lse²
    dl = g ((1 + 2 z lse) p - (1 - e) onehot(y) - e / V)

and softcap c, l = c·tanh(r / c), turns dl into dr = dl (1 - tanh(r / c)²). Of the logits one chunk exists at a time,
and dr takes its place in memory. Here are the chunks and their matrix products; what makes losses and dr of r is a
`RowLoss`: torch's formula (torch_loss) or a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyfuse.backends.cpu_matmul import Way, multiply


class LossOptions(NamedTuple):
    """What belongs to the loss of one token."""

    label_smoothing: float
    z_loss: float
    softcap: float | None


class Gradients(NamedTuple):
    """Gradients of a weighted sum of the losses, None where not asked for. Those of weight and bias are in the
    accumulation's dtype (float32 or wider), x's in its own."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sizes(NamedTuple):
    """rows: tokens of a chunk; block: rows of a block of dW; align: elements that a row of logits begins at a multiple
    of."""

    rows: int
    block: int
    align: int = 1


@dataclass(frozen=True)
class Products:
    """The ways of the three matrix products of a chunk; that of dW is chosen for blocks of it."""

    forward: Way = "torch"
    input: Way = "torch"
    weight: Way = "torch"


class RowLoss(Protocol):
    def __call__(
        self, r: Tensor, target: Tensor, flow: Tensor | None, losses: Tensor, gradient: bool
    ) -> None:
        """Write the losses [C] of a chunk of products r [C, V], and dr over these if `gradient`.

        target [C]; flow [C]: g in the dtype of the losses, None for ones. dr is rounded once, as autograd rounds the
        gradient of logits in a half precision.
        """


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of this one are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkedLoss:
    """The losses of tokens x [T, K] with targets [T] for W [V, K] and bias [V].

    left_out: the target whose tokens `loss` gives 0, and whose rows of x may hold anything; None if there are none.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        loss: RowLoss,
        sizes: Sizes,
        products: Products,
        left_out: int | None = None,
    ) -> None:
        self.x, self.weight, self.target, self.bias = x, weight, target, bias
        self.loss, self.sizes, self.products, self.left_out = loss, sizes, products, left_out
        self.wide = wide(x.dtype)

    def run(
        self, needs: tuple[bool, bool, bool], flows: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """The losses [T], and the gradients of sum(losses · flows) by x, weight and bias, where needed.

        flows [T]: None for ones.
        """
        x, target = self.x, self.target
        count = x.shape[0]
        losses = x.new_empty(count, dtype=self.wide)
        found = self._no_gradients(needs)
        step = min(self.sizes.rows, max(count, 1))
        memory = self._logits(min(step, count))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            r = memory[: part.stop - start]
            multiply(self.products.forward, x[part], self.weight, self.bias, r)
            flow = None if flows is None else flows[part]
            self.loss(r, target[part], flow, losses[part], any(needs))
            if any(needs):
                self._accumulate(found, part, r)
        return losses, found

    def _logits(self, rows: int) -> Tensor:
        """Memory for so many rows."""
        v, align = self.weight.shape[0], self.sizes.align
        return self.x.new_empty(rows, -(-v // align) * align)[:, :v]

    def _no_gradients(self, needs: tuple[bool, bool, bool]) -> Gradients:
        x, weight = self.x, self.weight
        return Gradients(
            torch.empty_like(x) if needs[0] else None,
            torch.zeros_like(weight, dtype=self.wide) if needs[1] else None,
            x.new_zeros(weight.shape[0], dtype=self.wide) if needs[2] else None,
        )

    def _accumulate(self, found: Gradients, part: slice, d: Tensor) -> None:
        """Fold in the gradient d [C, V] of a chunk's products."""
        if found.x is not None:
            multiply(self.products.input, d, self.weight.t(), out=found.x[part])
        if found.bias is not None:
            found.bias.add_(d.sum(0, dtype=self.wide))
        if found.weight is None:
            return
        x, way = self.x[part], self.products.weight
        if self.left_out is not None:  # their d is 0, but 0 · NaN is NaN
            x = x.masked_fill((self.target[part] == self.left_out)[:, None], 0.0)
        if way == "torch" and d.dtype == self.wide:
            found.weight.addmm_(d.t(), x)
            return
        step = self.sizes.block
        for i in range(0, d.shape[1], step):
            found.weight[i : i + step].add_(multiply(way, d[:, i : i + step].t(), x.t()))
