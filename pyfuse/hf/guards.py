"""When a patched method may leave the model's own code: when plain values are all it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, nn.Parameter))
_is_compiling = torch.compiler.is_compiling
is_tracing = torch._C._is_tracing  # by torch.jit.trace, which sees no call of a kernel
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active


def values_only(x: Tensor, *parameters: Tensor | None) -> bool:
    """Neither a gradient, a graph, a transform, autocast nor a tensor subclass is in play.

    Where one is, the model's own code runs: it is differentiable and traceable, and a compiler
    fuses it better than a call into a library could.
    """
    if _is_compiling() or type(x) not in _PLAIN or _is_any_autocast_enabled():
        return False
    if wants_gradient(x, *parameters):
        return False
    return (
        _len_torch_dispatch_stack() == 0
        and not is_tracing()
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    if not _is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)
