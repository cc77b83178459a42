"""What is in play at a call, and so who may run it: plain memory, a wanted gradient, a program transform.

Every call asks, so each question costs a fraction of a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_modes = torch._C._len_torch_dispatch_stack
# Not peek_interpreter_stack(): Dynamo folds that to a constant "not None".
_transforming = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def plain(tensors: Iterable[Any]) -> bool:
    """No tensor subclass (FakeTensor, DTensor, ...), no lazy negation (``x.imag`` of a conjugate) and no dispatch
    mode: memory can be handed to a kernel as it is."""
    for t in tensors:
        if isinstance(t, Tensor) and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return _modes() == 0


def values_only(
    tensors: tuple[Any, ...], options: dict[str, Any], tensor_options: tuple[str, ...]
) -> bool:
    """Plain memory in, values out: none of what the other functions here ask, in one go.

    tensor_options: the options that may be tensors.
    """
    grad = _is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or (grad and t.requires_grad)):
            return False
    for name in tensor_options:
        t = options[name]
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or (grad and t.requires_grad)):
            return False
    return _modes() == 0 and not _transforming() and forward_ad._current_level < 0


def formula_reason() -> str | None:
    """Why only the differentiable formula will do here; None if values, or gradients by kernels, will."""
    if _transforming():
        return "a functorch transform needs the differentiable formula"
    if forward_ad._current_level >= 0:
        return "forward-mode AD needs the differentiable formula"
    return None


def wants_gradient(tensors: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether autograd has to be able to differentiate this call."""
    if not _is_grad_enabled():
        return False
    given = (*tensors, *options.values())
    return any(isinstance(t, Tensor) and t.requires_grad for t in given)


def wants_second_derivatives(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward pass that got these has to be differentiable or transformable itself: it keeps a graph
    (create_graph), or its gradients are batched or dual (is_grads_batched has a vmap of its own)."""
    if _is_grad_enabled() or formula_reason() is not None:
        return True
    return any(g is not None and _is_batched(g) for g in grads)


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` runs more than its forward: no fused method may go around it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
    )
