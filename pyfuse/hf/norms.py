"""LayerNorm and RMSNorm modules, one instance at a time: which of pyfuse's formulas a module computes, and its forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pyfuse.hf.guards import hooked, values_only
from pyfuse.hf.slots import NormSlot
from pyfuse.hf.state import ATTRIBUTE, bind, state_of
from pyfuse.ops.norm import layer_norm, rms_norm

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_CASTINGS = ("llama", "gemma", "torch")


def is_norm(module: nn.Module) -> bool:
    """A LayerNorm of torch, or a class that calls itself an RMSNorm or is T5's (an RMSNorm by another name)."""
    name = type(module).__name__
    return isinstance(module, nn.LayerNorm) or name.endswith("RMSNorm") or name.endswith("T5LayerNorm")


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
    best = min(_CASTINGS, key=lambda casting: _difference(module, x.bfloat16(), weight.bfloat16(), eps, casting))
    return best if _difference(module, x, weight, eps, best) <= 4 * torch.finfo(torch.float32).eps else None


def _difference(module: nn.Module, x: Tensor, weight: Tensor, eps: float, casting: str) -> float:
    """max |module's - pyfuse's| / max |module's| for this weight; infinite where the kinds of result differ."""
    probe = copy.copy(module)  # shares everything but the weight
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    theirs = probe.forward(x)
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape or theirs.dtype != x.dtype:
        return float("inf")
    ours = rms_norm(x, weight, eps, casting=casting)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def layer_norm_forward(self: nn.LayerNorm, input: Tensor) -> Tensor:
    weight = self._parameters.get("weight")
    if weight is None or weight.dtype != input.dtype or not values_only(input, weight):
        return nn.LayerNorm.forward(self, input)
    return layer_norm(input, weight, self._parameters.get("bias"), self.eps)


@lru_cache(maxsize=None)
def _rms_forward(eps_name: str, casting: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None or weight.dtype != hidden_states.dtype or not values_only(hidden_states, weight):
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, weight, self.__dict__[eps_name], casting=casting)

    return forward


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
    """(norm(x + residual), x + residual) in one pass; None if ``norm`` is not patched, or calling it runs more."""
    state = norm.__dict__.get(ATTRIBUTE)
    weight = norm._parameters.get("weight")
    if (
        state is None
        or state.norm is None
        or not state.enabled
        or weight is None
        or hooked(norm)
        or not x.dtype == residual.dtype == weight.dtype
    ):
        return None
    eps_name, casting = state.norm
    eps = norm.__dict__[eps_name]
    if casting is None:
        bias = norm._parameters.get("bias")
        return layer_norm(x, weight, bias, eps, residual=residual, prenorm=True)
    return rms_norm(x, weight, eps, residual=residual, prenorm=True, casting=casting)
