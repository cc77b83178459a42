"""The loss of a chunk of logits by torch's own operations, on any device: see chunked_loss for the formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.backends.chunked_loss import LossOptions, Sizes, wide

# Of logits; with 32 MiB it takes 1.1 x as long (dW is read more often), with 128 no less.
CHUNK_BYTES = 64 * 2**20
BLOCK_BYTES = 4 * 2**20  # of a product that is added to dW: it comes from a cache then


def sizes(vocabulary: int, k: int, dtype: torch.dtype) -> Sizes:
    return Sizes(
        max(1, CHUNK_BYTES // (vocabulary * wide(dtype).itemsize)), max(1, BLOCK_BYTES // (4 * k))
    )


class TorchRowLoss(NamedTuple):
    """Targets are all in 0 .. V - 1."""

    options: LossOptions

    def __call__(
        self, r: Tensor, target: Tensor, flow: Tensor | None, losses: Tensor, gradient: bool
    ) -> None:
        """See RowLoss. r is overwritten in any case."""
        logits, r = r, r.to(losses.dtype)
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
        losses.copy_(loss.squeeze(1))
        if not gradient:
            return
        g = torch.ones_like(lse) if flow is None else flow[:, None].to(lse.dtype)
        r.mul_(g * (1.0 + 2.0 * z_loss * lse) / total)
        if smoothing > 0.0:
            r.sub_(g * (smoothing / r.shape[1]))
        r.scatter_(1, index, r.gather(1, index).add_(g * (smoothing - 1.0)))
        if slope is not None:
            r.mul_(slope)
        if r is not logits:
            logits.copy_(r)
