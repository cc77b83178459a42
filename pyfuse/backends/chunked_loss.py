"""Cross-entropy of a linear layer's logits, chunk by chunk over the tokens, with its gradients in the same pass.

For one token with logits l [V] (after bias and softcap), its target y, lse = log(sum exp l) and p = exp(l - lse),
with label smoothing e, z-loss factor z and weight g (the gradient that arrives at its loss):

    loss = (1 - e) (lse - l[y]) + e (lse - mean l) + z lse²
    dl = g ((1 + 2 z lse) p - (1 - e) onehot(y) - e / V)

and softcap c, l = c·tanh(r / c), turns dl into dr = dl (1 - tanh(r / c)²). Of the logits one chunk exists at a time,
and dr takes its place in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.backends.cpu_matmul import Way, multiply

CHUNK_BYTES = (
    64 * 2**20
)  # of logits; with 32 it takes 1.1 x as long (dW is read more often), with 128 no less
BLOCK_BYTES = 4 * 2**20  # of a product that is added to dW: it comes from a cache then


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


@dataclass(frozen=True)
class Products:
    """The ways of the three matrix products of a chunk; that of dW is chosen for blocks of it."""

    forward: Way = "torch"
    input: Way = "torch"
    weight: Way = "torch"


def chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of one chunk."""
    return max(1, CHUNK_BYTES // (vocabulary * wide(dtype).itemsize))


def block_rows(k: int) -> int:
    """Rows of a block of dW [V, k]."""
    return max(1, BLOCK_BYTES // (4 * k))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of this one are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkedLoss:
    """The losses of tokens x [T, K] with targets [T], all of them in 0 .. V - 1, for W [V, K] and bias [V]."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        options: LossOptions,
        products: Products,
    ) -> None:
        self.x, self.weight, self.target, self.bias = x, weight, target, bias
        self.options, self.products = options, products
        self.wide = wide(x.dtype)

    def run(
        self, needs: tuple[bool, bool, bool], flows: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """The losses [T], and the gradients of sum(losses · flows) by x, weight and bias, where needed.

        flows [T]: None for ones.
        """
        x, weight, target = self.x, self.weight, self.target
        count, v = x.shape[0], weight.shape[0]
        losses = x.new_empty(count, dtype=self.wide)
        found = self._no_gradients(needs)
        step = min(chunk_rows(v, x.dtype), max(count, 1))
        memory = x.new_empty(min(step, count), v)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            logits = memory[: part.stop - start]
            multiply(self.products.forward, x[part], weight, self.bias, logits)
            flow = None if flows is None else flows[part]
            losses[part], d = self._loss(logits.to(self.wide), target[part], flow, any(needs))
            if any(needs):
                # Rounded as autograd rounds the gradient of logits in a half precision.
                d = d if d.dtype == logits.dtype else logits.copy_(d)
                self._accumulate(found, part, d)
            del d  # before the next chunk's is taken
        return losses, found

    def _no_gradients(self, needs: tuple[bool, bool, bool]) -> Gradients:
        x, weight = self.x, self.weight
        return Gradients(
            torch.empty_like(x) if needs[0] else None,
            torch.zeros_like(weight, dtype=self.wide) if needs[1] else None,
            x.new_zeros(weight.shape[0], dtype=self.wide) if needs[2] else None,
        )

    def _loss(
        self, r: Tensor, target: Tensor, flow: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The losses [C] of a chunk of products r [C, V], which is overwritten: by dr if `gradient`."""
        smoothing, z_loss, softcap = self.options
        slope = None
        if softcap is not None:
            r.div_(softcap).tanh_()
            slope = r.square().neg_().add_(1.0) if gradient else None
            r.mul_(softcap)
        index = target[:, None]
        largest = r.amax(1, keepdim=True)
        r.sub_(largest)
        loss = r.gather(1, index).mul_(smoothing - 1.0)
        if smoothing > 0.0:
            loss -= smoothing * r.mean(1, keepdim=True)
        total = r.exp_().sum(1, keepdim=True)
        from_largest = total.log()
        loss += from_largest
        lse = from_largest + largest
        if z_loss > 0.0:
            loss += z_loss * lse.square()
        if gradient:
            g = torch.ones_like(lse) if flow is None else flow[:, None].to(lse.dtype)
            r.mul_(g * (1.0 + 2.0 * z_loss * lse) / total)
            if smoothing > 0.0:
                r.sub_(g * (smoothing / r.shape[1]))
            r.scatter_(1, index, r.gather(1, index).add_(g * (smoothing - 1.0)))
            if slope is not None:
                r.mul_(slope)
        return loss.squeeze(1), r

    def _accumulate(self, found: Gradients, part: slice, d: Tensor) -> None:
        """Fold in the gradient d [C, V] of a chunk's products."""
        if found.x is not None:
            multiply(self.products.input, d, self.weight.t(), out=found.x[part])
        if found.bias is not None:
            found.bias.add_(d.sum(0, dtype=self.wide))
        if found.weight is None:
            return
        x, way = self.x[part], self.products.weight
        if way == "torch" and d.dtype == self.wide:
            found.weight.addmm_(d.t(), x)
            return
        step = block_rows(x.shape[1])
        for i in range(0, d.shape[1], step):
            found.weight[i : i + step].add_(multiply(way, d[:, i : i + step].t(), x.t()))
