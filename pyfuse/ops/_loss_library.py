"""linear_cross_entropy as torch.library operators: what a compiled or exported graph holds. See :mod:`._library`.

    linear_cross_entropy(tensors, options, needs) -> [result, number of tokens not left out, dx, dW, db]
    linear_cross_entropy_backward(flow, tensors, options, needs) -> [dx, dW, db]

The first gives those gradients of the sum that `needs` asks for (for the reductions to one number), the second
those of reduction "none". Gradients that are not needed are empty tensors. No default values: the dispatcher would
drop arguments equal to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyfuse.backends.chunked_loss import Gradients, LossOptions, wide
from pyfuse.guards import formula_reason
from pyfuse.ops._library import _library
from pyfuse.ops._loss import chosen_backend, finished, formula, needed, scaled
from pyfuse.ops._loss_chunks import Call, evaluate

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, float label_smoothing, float z_loss, float? softcap, "
    "SymInt ignore_index, str reduction, ScalarType dtype, str? backend, bool[] needs"
)


def run(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Put the call into the graph: as an operator, or as the formula where only that will do."""
    tensors = (x, weight, bias, target)
    # A wrapper of tensors (DTensor) knows torch's own operators only.
    reason = formula_reason()
    if reason is None and any(is_traceable_wrapper_subclass(t) for t in tensors if t is not None):
        reason = "tensor subclasses need the formula"
    if reason is not None or 0 in weight.shape:
        if reason is not None and call.backend not in (None, "eager"):
            raise NotImplementedError(
                f"no backend can run linear_cross_entropy:\n  {call.backend}: {reason}"
            )
        return formula(call, *tensors)
    names = needed(x, weight, bias)
    needs = [name in names for name in ("x", "weight", "bias")]
    found: list[Tensor] = torch.ops.pyfuse.linear_cross_entropy(
        *tensors, *call.loss, call.ignore_index, call.reduction, call.dtype, call.backend, needs
    )
    return found[0]


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _parsed(arguments: tuple[Any, ...]) -> tuple[Call, Tensors, tuple[bool, bool, bool]]:
    """The call, its tensors and what of them needs a gradient."""
    x, weight, bias, target, smoothing, z_loss, softcap, *others, needs = arguments
    x, weight = x.resolve_neg(), weight.resolve_neg()
    bias = None if bias is None else bias.resolve_neg()
    ignore_index, reduction, dtype, backend = others
    loss = LossOptions(smoothing, z_loss, softcap)
    call = Call(loss, ignore_index, reduction, dtype, backend)
    return call, (x, weight, bias, target), (needs[0], needs[1], needs[2])


def _kernel(*arguments: Any) -> list[Tensor]:
    call, tensors, needs = _parsed(arguments)
    call = call._replace(backend=chosen_backend(call, *tensors))
    asked = (False, False, False) if call.reduction == "none" else needs
    result, found, count = evaluate(call, *tensors, asked)
    return [result, torch.as_tensor(count, device=result.device), *_listed(found, tensors)]


def _backward_kernel(flow: Tensor, *arguments: Any) -> list[Tensor]:
    call, tensors, needs = _parsed(arguments)
    call = call._replace(backend=chosen_backend(call, *tensors))
    flows = flow.resolve_neg().reshape(-1).to(wide(tensors[0].dtype))
    return _listed(evaluate(call, *tensors, needs, flows)[1], tensors)


def _listed(found: Gradients, tensors: Tensors) -> list[Tensor]:
    x = tensors[0]
    dx, *others = found
    dx = None if dx is None else dx.reshape(x.shape)
    return [x.new_empty(0) if t is None else t for t in (dx, *others)]


def _fake(*arguments: Any) -> list[Tensor]:
    call, (x, _, _, target), needs = _parsed(arguments)
    result = x.new_empty(target.shape if call.reduction == "none" else (), dtype=call.dtype)
    if call.reduction == "none":
        arguments = (*arguments[:-1], [False] * len(needs))
    count = torch.empty((), dtype=torch.int64, device=x.device)
    return [result, count, *_fake_gradients(*arguments)]


def _fake_backward(flow: Tensor, *arguments: Any) -> list[Tensor]:
    return _fake_gradients(*arguments)


def _fake_gradients(*arguments: Any) -> list[Tensor]:
    _, (x, weight, _, _), needs = _parsed(arguments)
    dtype = wide(x.dtype)
    shapes = ((x.shape, x.dtype), (weight.shape, dtype), (weight.shape[:1], dtype))
    return [
        x.new_empty(shape, dtype=kind) if need else x.new_empty(0)
        for (shape, kind), need in zip(shapes, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.others = inputs[4:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, bias, target, count, *gradients = ctx.saved_tensors
    nothing = (None,) * len(ctx.others)
    flow = grads[0]
    if flow is None:
        return (None,) * 4 + nothing
    arguments = (x, weight, bias, target, *ctx.others)
    call, _, needs = _parsed(arguments)
    if call.reduction == "none":
        gradients = torch.ops.pyfuse.linear_cross_entropy_backward(flow, *arguments)
    else:
        gradients = [t.clone() for t in gradients]  # scaled in place, and perhaps asked for again
    found = Gradients(*(t if need else None for t, need in zip(gradients, needs, strict=True)))
    if call.reduction != "none":
        found = scaled(call, found, flow, count)
    return *finished(found, x, weight), None, *nothing


_library.define(
    f"linear_cross_entropy({_ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"linear_cross_entropy_backward(Tensor flow, {_ARGUMENTS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear_cross_entropy", _kernel, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pyfuse::linear_cross_entropy", _fake, lib=_library)
torch.library.register_fake("pyfuse::linear_cross_entropy_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "pyfuse::linear_cross_entropy", _backward, setup_context=_setup_context, lib=_library
)
