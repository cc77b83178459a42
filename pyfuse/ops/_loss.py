"""How linear_cross_entropy runs: its formula, autograd over its chunks, and which backend does it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfuse import dispatch
from pyfuse.backends import BACKENDS
from pyfuse.backends.chunked_loss import Gradients, wide
from pyfuse.guards import formula_reason, plain, wants_second_derivatives
from pyfuse.ops._autocast import autocast_enabled
from pyfuse.ops._loss_chunks import Call, evaluate, reduced


def chosen_backend(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> str:
    """The first that can run this call, or the named one. Raises what :func:`pyfuse.explain` asks for."""
    tensors = (x, weight, bias, target)
    named = dispatch._name_of(call.backend)
    candidates = []
    for name in BACKENDS if named is None else (named,):
        candidates.append(dispatch.Candidate(name, _why_not(name, tensors)))
        if candidates[-1].reason is None:
            break
    if dispatch._explaining.get():
        needs = needed(x, weight, bias)
        raise dispatch._Explained(
            dispatch.Explanation("linear_cross_entropy", tuple(candidates), needs)
        )
    if candidates[-1].reason is not None:
        reasons = "".join(f"\n  {c.backend}: {c.reason}" for c in candidates)
        raise NotImplementedError(f"no backend can run linear_cross_entropy:{reasons}")
    return candidates[-1].backend


def _why_not(name: str, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> str | None:
    """Why this backend cannot run the call; None if it can."""
    x, weight, _, _ = tensors
    if name == "eager":
        return None
    if name == "cpu":
        reason = None if x.is_cpu else f"x is on {x.device}, not on the CPU"
    elif name == "triton":
        from pyfuse.backends import triton_loss  # here: of no use where there is no GPU

        reason = dispatch._unavailable(name) or triton_loss.why_not(x, weight)
    else:
        reason = "does not implement linear_cross_entropy"
    if reason is None and not plain(tensors):
        reason = "tensor subclasses and dispatch modes need the formula"
    return reason or formula_reason()


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
    return reduced(call, losses, kept.sum(), x.shape[:-1])


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
