"""How linear_cross_entropy runs: its formula, its chunks, autograd over these, and which backend does it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfuse import dispatch
from pyfuse.backends import BACKENDS
from pyfuse.backends.chunked_loss import (
    ChunkedLoss,
    Gradients,
    LossOptions,
    Products,
    block_rows,
    chunk_rows,
    wide,
)
from pyfuse.backends.cpu_matmul import choose
from pyfuse.guards import formula_reason, plain, wants_second_derivatives
from pyfuse.ops._autocast import autocast_enabled
from pyfuse.ops.linear import able


class Call(NamedTuple):
    """The options of a call; dtype: that of the result; backend: "cpu" or "eager" once it is chosen."""

    loss: LossOptions
    ignore_index: int
    reduction: str
    dtype: torch.dtype
    backend: str | None


def chosen_backend(call: Call, *tensors: Tensor | None) -> str:
    """The first that can run this call, or the named one. Raises what :func:`pyfuse.explain` asks for."""
    x = tensors[0]
    assert x is not None
    named = dispatch._name_of(call.backend)
    candidates = []
    for name in BACKENDS if named is None else (named,):
        reason: str | None = None
        if name == "cpu":
            reason = _why_not_cpu(x, tensors)
        elif name != "eager":
            reason = "does not implement linear_cross_entropy"
        candidates.append(dispatch.Candidate(name, reason))
        if reason is None:
            break
    if dispatch._explaining.get():
        needs = needed(*tensors[:3])
        raise dispatch._Explained(
            dispatch.Explanation("linear_cross_entropy", tuple(candidates), needs)
        )
    if candidates[-1].reason is not None:
        reasons = "".join(f"\n  {c.backend}: {c.reason}" for c in candidates)
        raise NotImplementedError(f"no backend can run linear_cross_entropy:{reasons}")
    return candidates[-1].backend


def _why_not_cpu(x: Tensor, tensors: tuple[Tensor | None, ...]) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if not plain(tensors):
        return "tensor subclasses and dispatch modes need the formula"
    return formula_reason()


def needed(*tensors: Tensor | None) -> tuple[str, ...]:
    if not torch.is_grad_enabled():
        return ()
    named = zip(("x", "weight", "bias"), tensors, strict=True)
    return tuple(sorted(name for name, t in named if t is not None and t.requires_grad))


def formula(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The definition, with all logits: differentiable any number of times, transformable."""
    smoothing, z_loss, softcap = call.loss
    target = target.reshape(-1)
    logits = F.linear(x.reshape(target.numel(), x.shape[-1]), weight, bias).to(wide(x.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits,
        target,
        ignore_index=call.ignore_index,
        label_smoothing=smoothing,
        reduction="none",
    )
    kept = target != call.ignore_index
    if z_loss > 0.0:
        losses = losses + z_loss * logits.logsumexp(1).square().masked_fill(~kept, 0.0)
    return _reduced(call, losses, kept.sum(), x.shape[:-1])


def _reduced(call: Call, losses: Tensor, count: Tensor | int, shape: torch.Size) -> Tensor:
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
) -> tuple[Tensor, Gradients, int]:
    """The result, the gradients of sum(losses · flows) in chunks, and the number of tokens not left out.

    flows: for each token; None for ones.
    """
    rows, flat = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    kept = (flat != call.ignore_index).nonzero().squeeze(1)
    some = len(kept) < len(flat)
    if some:
        rows, flat = rows[kept], flat[kept]
        flows = None if flows is None else flows[kept]
    _check_range(flat, weight.shape[0])
    products = _products(call, rows, weight, bias, needs)
    chunks = ChunkedLoss(rows.contiguous(), weight, flat, bias, call.loss, products)
    # The casts of autocast have been made.
    with torch.autocast(x.device.type, enabled=False) if autocast_enabled() else nullcontext():
        losses, found = chunks.run(needs, flows)
    if some:
        losses = losses.new_zeros(target.numel()).index_copy_(0, kept, losses)
        if found.x is not None:
            all_rows = x.new_zeros(target.numel(), x.shape[-1])
            found = found._replace(x=all_rows.index_copy_(0, kept, found.x))
    return _reduced(call, losses, len(kept), x.shape[:-1]), found, len(kept)


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
) -> Products:
    fast = call.backend == "cpu" and rows.dtype == torch.float32
    if not fast or not able(rows, weight, bias):
        return Products()
    v, k = weight.shape
    count = min(chunk_rows(v, rows.dtype), len(rows))
    return Products(
        choose("forward", count, v, k).way,
        choose("input", count, v, k).way if needs[0] else "torch",
        choose("weight", count, min(v, block_rows(k)), k).way if needs[1] else "torch",
    )


def scaled(call: Call, found: Gradients, flow: Tensor, count: int | Tensor) -> Gradients:
    """The gradients of the sum, multiplied by what arrives at the result: in place where rounding allows it.

    count: of the tokens that are not left out.
    """
    flow = flow.to(torch.promote_types(call.dtype, torch.float32))
    if call.reduction == "mean":
        flow = torch.where(torch.as_tensor(count, device=flow.device) > 0, flow / count, 0.0)
    return Gradients(*(None if t is None else _times(t, flow) for t in found))


def _times(t: Tensor, flow: Tensor) -> Tensor:
    if t.dtype in (torch.float32, torch.float64):
        return t.mul_(flow)
    return (t.to(flow.dtype) * flow).to(
        t.dtype
    )  # the factor is not to be rounded to a half precision


def chunked(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The result in chunks, under autograd where a gradient is wanted. Plain tensors only."""
    if needed(x, weight, bias):
        result: Tensor = _Chunked.apply(call, x, weight, bias, target)
        return result
    return evaluate(call, x, weight, bias, target)[0]


class _Chunked(torch.autograd.Function):
    """Only plain tensors come here, and never under a functorch transform."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        needs = (False, False, False)
        if call.reduction != "none":
            needs = ctx.needs_input_grad[1:4]
        result, found, count = evaluate(call, x, weight, bias, target, needs)
        ctx.call, ctx.count = call, count
        # Not saved for backward: the backward pass takes them, to scale them in place.
        ctx.found = None if call.reduction == "none" else found
        ctx.save_for_backward(x, weight, bias, target)
        return result

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[1:4]
        if wants_second_derivatives((flow,)) or not plain((flow, x, weight, bias)):
            return None, *_formula_gradients(call, (x, weight, bias), target, flow, needs), None
        found, ctx.found = ctx.found, None
        if call.reduction == "none":
            flows = flow.reshape(-1).to(wide(x.dtype))
            _, found, _ = evaluate(call, x, weight, bias, target, needs, flows)
        else:
            if found is None:  # a second pass through the graph
                _, found, _ = evaluate(call, x, weight, bias, target, needs)
            found = scaled(call, found, flow, ctx.count)
        return None, *finished(found, x, weight), None


def finished(found: Gradients, x: Tensor, weight: Tensor) -> Gradients:
    """In the shapes and dtypes of their tensors."""
    dx, dw, db = found
    return Gradients(
        None if dx is None else dx.reshape(x.shape),
        None if dw is None else dw.to(weight.dtype),
        None if db is None else db.to(weight.dtype),
    )


def _formula_gradients(
    call: Call,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    flow: Tensor,
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Differentiable themselves where grad mode is on."""
    create_graph = torch.is_grad_enabled()
    off = torch.autocast(target.device.type, enabled=False) if autocast_enabled() else nullcontext()
    with torch.enable_grad(), off:
        # Aliases, so that one tensor given for two arguments counts apart for each.
        x, weight, bias = (
            t.view_as(t) if need and t is not None else t
            for t, need in zip(tensors, needs, strict=True)
        )
        assert x is not None and weight is not None
        result = formula(call, x, weight, bias, target)
        wanted = [
            t for t, need in zip((x, weight, bias), needs, strict=True) if need and t is not None
        ]
        found = iter(torch.autograd.grad(result, wanted, flow, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
