"""LayerNorm and RMSNorm modules: which of pyfuse's formulas an instance computes, its forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyfuse.dispatch import run
from pyfuse.guards import hooked
from pyfuse.hf.guards import values_only, wants_gradient
from pyfuse.hf.slots import NormSlot
from pyfuse.hf.state import ATTRIBUTE, bind, state_of
from pyfuse.ops.norm import layer_norm, rms_norm

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_CASTINGS = ("llama", "gemma", "torch")
# Elements. Torch's LayerNorm is one kernel too: below this size (measured: 12 to 49 thousand) it is
# done before pyfuse has checked its arguments. Its RMSNorm is six operations, slower at any size.
SMALL = 16_384


def is_norm(module: nn.Module) -> bool:
    """A LayerNorm of torch, or a class that calls itself an RMSNorm, or T5's, which is one."""
    name = type(module).__name__
    return isinstance(module, nn.LayerNorm) or name.endswith(("RMSNorm", "T5LayerNorm"))


def patch_norm(module: nn.Module) -> str | None:
    """Route this instance to pyfuse; the reason if it stays as it is."""
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if isinstance(module, nn.LayerNorm):
        return _patch_layer_norm(module)
    names = set(module._parameters) | set(module._buffers)
    eps_name = next((n for n in _EPS_NAMES if isinstance(getattr(module, n, None), float)), None)
    weight = module._parameters.get("weight")
    if names != {"weight"} or weight is None or weight.ndim != 1 or eps_name is None:
        return "it has other parameters than weight [D] and an epsilon"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the input"
    casting = _recognise(module, weight.shape[0], getattr(module, eps_name))
    if casting is None:
        return "it computes none of pyfuse's formulas (llama, gemma, torch)"
    state_of(module).norm = NormSlot(eps_name, casting)
    bind(module, "forward", _rms_forward(eps_name, casting))
    return None


def _patch_layer_norm(module: nn.LayerNorm) -> str | None:
    if type(module).forward is not nn.LayerNorm.forward:
        return f"{type(module).__name__} has a forward of its own"
    if len(module.normalized_shape) != 1:
        return "it normalises more than the last dimension"
    if module._parameters.get("weight") is None:
        return "it has no weight"
    state_of(module).norm = NormSlot("eps", None)
    bind(module, "forward", layer_norm_forward)
    return None


@torch.no_grad()
def _recognise(module: nn.Module, size: int, eps: float) -> str | None:
    """The casting that gives what the module gives, on random input and weights.

    bfloat16 tells where the formula rounds; float32 then has to agree as nearly as rounding allows.
    """
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn((3, size), generator=draw), torch.rand((size,), generator=draw) + 0.5
    best = min(
        _CASTINGS,
        key=lambda casting: _difference(module, x.bfloat16(), weight.bfloat16(), eps, casting),
    )
    rounding = 4 * torch.finfo(torch.float32).eps
    return best if _difference(module, x, weight, eps, best) <= rounding else None


def _difference(module: nn.Module, x: Tensor, weight: Tensor, eps: float, casting: str) -> float:
    """max |module's - pyfuse's| / max |module's| with this weight; inf where shapes differ."""
    probe = copy.copy(module)  # shares everything but the weight
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    theirs = probe.forward(x)
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape or theirs.dtype != x.dtype:
        return float("inf")
    ours = rms_norm(x, weight, eps, casting=casting)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def layer_norm_forward(self: nn.LayerNorm, input: Tensor) -> Tensor:
    weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
    if weight is None or weight.dtype != input.dtype or not values_only(input, weight, bias):
        return nn.LayerNorm.forward(self, input)
    return _layer_norm(input, weight, bias, self.eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if x.numel() < SMALL:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return layer_norm(x, weight, bias, eps)


@cache
def _rms_forward(eps_name: str, casting: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if (
            weight is None
            or weight.dtype != hidden_states.dtype
            or not values_only(hidden_states, weight)
        ):
            return type(self).forward(self, hidden_states)
        return rms_norm(hidden_states, weight, self.__dict__[eps_name], casting=casting)

    return forward


def slot_of(norm: nn.Module) -> NormSlot | None:
    """How to compute ``norm(x)`` without calling it; None where the call is needed."""
    state = norm.__dict__.get(ATTRIBUTE)
    return None if state is None or not state.enabled or hooked(norm) else state.norm


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), without the call of a module where that is all it does. ``x``: plain values."""
    slot, weight = slot_of(norm), norm._parameters.get("weight")
    bias = norm._parameters.get("bias")
    if slot is None or weight is None or x.dtype != weight.dtype or wants_gradient(x, weight, bias):
        return norm(x)
    eps = norm.__dict__[slot.eps_name]
    if slot.casting is None:
        return _layer_norm(x, weight, bias, eps)
    return _rms_norm(x, weight, eps, slot.casting, None, False)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, casting: str, residual: Tensor | None, keep_sum: bool
) -> Any:
    """pyfuse.rms_norm, past its checks where the sizes fit: in decoding they would cost as much as
    the kernel. The dtypes are the caller's to compare."""
    if x.shape[-1:] != weight.shape or (residual is not None and residual.shape != x.shape):
        extra: dict[str, Any] = {"residual": residual, "prenorm": keep_sum}
        return rms_norm(x, weight, eps, casting=casting, **extra)
    options = {
        "eps": eps,
        "residual": residual,
        "prenorm": keep_sum and residual is not None,
        "dropout_p": 0.0,
        "dropout_seed": None,
        "casting": casting,
    }
    return run("rms_norm", (x, weight), options, None)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
    """(norm(x + residual), x + residual) in one pass; None where ``norm`` has to be called."""
    return _add_norm(norm, x, residual, keep_sum=True)


def norm_of_sum(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor | None:
    """norm(x + residual) in one pass, the sum not kept; None where ``norm`` has to be called."""
    return _add_norm(norm, x, residual, keep_sum=False)


def _add_norm(norm: nn.Module, x: Tensor, residual: Tensor, keep_sum: bool) -> Any:
    slot, weight = slot_of(norm), norm._parameters.get("weight")
    bias = norm._parameters.get("bias")
    if (
        slot is None
        or weight is None
        or not x.dtype == residual.dtype == weight.dtype
        or wants_gradient(x, residual, weight, bias)
    ):
        return None
    eps = norm.__dict__[slot.eps_name]
    if slot.casting is not None:
        return _rms_norm(x, weight, eps, slot.casting, residual, keep_sum)
    if x.numel() >= SMALL:
        options: dict[str, Any] = {"residual": residual, "prenorm": keep_sum}
        return layer_norm(x, weight, bias, eps, **options)
    z = x + residual
    y = F.layer_norm(z, weight.shape, weight, bias, eps)
    return (y, z) if keep_sum else y
