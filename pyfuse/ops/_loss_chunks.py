"""linear_cross_entropy in chunks, values and gradients: which tokens, by what products, with which backend's loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import torch_loss
from pyfuse.backends.chunked_loss import ChunkedLoss, Gradients, LossOptions, Products, Sizes
from pyfuse.backends.cpu_matmul import choose
from pyfuse.ops._autocast import autocast_enabled
from pyfuse.ops.linear import able


class Call(NamedTuple):
    """The options of a call; dtype: that of the result; backend: "cpu", "triton" or "eager" once it is chosen."""

    loss: LossOptions
    ignore_index: int
    reduction: str
    dtype: torch.dtype
    backend: str | None


def reduced(call: Call, losses: Tensor, count: Tensor | int, shape: torch.Size) -> Tensor:
    """The result from the losses of all tokens; count: of those that are not left out."""
    if call.reduction == "none":
        return losses.to(call.dtype).reshape(shape)
    total = losses.sum()
    return (total / count if call.reduction == "mean" else total).to(call.dtype)


@torch.no_grad()
def evaluate(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs: tuple[bool, bool, bool] = (False, False, False),
    flows: Tensor | None = None,
) -> tuple[Tensor, Gradients, int | Tensor]:
    """The result, the gradients of sum(losses · flows) in chunks, and the number of tokens not left out.

    flows: for each token; None for ones.
    """
    rows, flat = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    run = _all_tokens if call.backend == "triton" else _kept_tokens
    # The casts of autocast have been made.
    with torch.autocast(x.device.type, enabled=False) if autocast_enabled() else nullcontext():
        losses, found, count = run(call, rows, weight, bias, flat, needs, flows)
    return reduced(call, losses, count, x.shape[:-1]), found, count


def _all_tokens(
    call: Call,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs: tuple[bool, bool, bool],
    flows: Tensor | None,
) -> tuple[Tensor, Gradients, Tensor]:
    """By the kernel, all tokens: which are left out only the device knows, and the host does not wait for it."""
    from pyfuse.backends import triton_loss  # loaded: it was chosen

    loss = triton_loss.TritonRowLoss(call.loss, call.ignore_index)
    v, k = weight.shape
    sizes = triton_loss.sizes(v, k, rows.dtype)
    chunks = ChunkedLoss(
        rows.contiguous(), weight, target, bias, loss, sizes, Products(), call.ignore_index
    )
    return *chunks.run(needs, flows), (target != call.ignore_index).sum()


def _kept_tokens(
    call: Call,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs: tuple[bool, bool, bool],
    flows: Tensor | None,
) -> tuple[Tensor, Gradients, int]:
    """By torch's operations, those tokens alone that are not left out."""
    like, tokens = rows, len(target)
    kept = (target != call.ignore_index).nonzero().squeeze(1)
    some = len(kept) < tokens
    if some:
        rows, target = rows[kept], target[kept]
        flows = None if flows is None else flows[kept]
    v, k = weight.shape
    _check_range(target, v)
    sizes = torch_loss.sizes(v, k, rows.dtype)
    products = _products(call, rows, weight, bias, needs, sizes)
    loss = torch_loss.TorchRowLoss(call.loss)
    chunks = ChunkedLoss(rows.contiguous(), weight, target, bias, loss, sizes, products)
    losses, found = chunks.run(needs, flows)
    if some:
        losses = losses.new_zeros(tokens).index_copy_(0, kept, losses)
        if found.x is not None:
            all_rows = like.new_zeros(like.shape)
            found = found._replace(x=all_rows.index_copy_(0, kept, found.x))
    return losses, found, len(kept)


def _check_range(target: Tensor, vocabulary: int) -> None:
    if target.numel() == 0:
        return
    low, high = (int(t) for t in target.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise IndexError(f"target: {wrong} is out of bounds, needs 0 to {vocabulary - 1}")


def _products(
    call: Call,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    sizes: Sizes,
) -> Products:
    fast = call.backend == "cpu" and rows.dtype == torch.float32
    if not fast or not able(rows, weight, bias):
        return Products()
    v, k = weight.shape
    count = min(sizes.rows, len(rows))
    return Products(
        choose("forward", count, v, k).way,
        choose("input", count, v, k).way if needs[0] else "torch",
        choose("weight", count, min(v, sizes.block), k).way if needs[1] else "torch",
    )
