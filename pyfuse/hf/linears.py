"""nn.Linear and GPT-2's Conv1D on packed weights, for inference on the CPU; what they do in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyfuse.activations import FORMULA
from pyfuse.guards import hooked
from pyfuse.hf.guards import values_only, wants_gradient
from pyfuse.hf.slots import LinearSlot
from pyfuse.hf.state import ATTRIBUTE, bind, state_of
from pyfuse.nn.functional import linear as trained_linear

if TYPE_CHECKING:
    from pyfuse.linear import PackedLinear


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def patch_linear(module: nn.Module) -> str | None:
    """Pack this layer's weight and route its calls there; the reason if it stays as it is."""
    stock = Conv1D if isinstance(module, Conv1D) else nn.Linear
    if type(module).forward is not stock.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter:
        return "its weight is no plain parameter"
    if not weight.is_cpu:
        return f"its weight is on {weight.device}, not on the CPU"
    slot = LinearSlot(transposed=stock is Conv1D)
    _pack(module, slot)
    if slot.packed is None:
        return "no packed form is faster for this shape on this machine"
    state_of(module).linear = slot
    bind(module, "forward", conv1d_forward if stock is Conv1D else linear_forward)
    return None


@torch.no_grad()
def _pack(module: nn.Module, slot: LinearSlot) -> None:
    from pyfuse.linear import plan  # here, since linear=False does without

    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    slot.packed = None
    if weight is not None:
        slot.packed = plan(weight, bias, transposed=slot.transposed, activation=slot.activation)
    slot.weight, slot.bias, slot.dtype = weight, bias, None if weight is None else weight.dtype


def expect_activation(linear: nn.Module, activation: str) -> None:
    """Choose again for a patched layer whose fused calls take this activation along."""
    slot: LinearSlot = state_of(linear).linear  # type: ignore[assignment]
    before, slot.activation = slot.packed, activation
    _pack(linear, slot)
    if slot.packed is None:
        slot.activation, slot.packed = None, before


def packed_of(linear: nn.Module, x: Tensor) -> PackedLinear | None:
    """The packed weight to use for ``x`` in place of ``linear(x)``; None where the call is needed.

    A weight that has been replaced since (as in a deepcopy) is packed again. ``values_only(x)`` is
    the caller's to check.
    """
    state = linear.__dict__.get(ATTRIBUTE)
    if state is None or state.linear is None or not state.enabled or hooked(linear):
        return None
    slot = state.linear
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or wants_gradient(x, weight, bias):
        return None
    if weight is not slot.weight or bias is not slot.bias or weight.dtype is not slot.dtype:
        # Another tensor. (One that was written to in place, the packed layer notices by itself.)
        _pack(linear, slot)
    if x.dtype != weight.dtype or x.numel() == 0:
        return None
    return slot.packed


def projected(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), without the call of a module where that is all it does. ``x``: plain values."""
    packed = packed_of(linear, x)
    return linear(x) if packed is None else packed(x)


def projected_together(linears: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """linear(x) of each, in one kernel call where x has few rows. ``x``: plain values."""
    packed = [packed_of(linear, x) for linear in linears]
    known = [p for p in packed if p is not None]
    if len(known) < len(packed):
        return [projected(linear, x) for linear in linears]
    from pyfuse.linear import together  # loaded: something is packed

    return together(x, known, (None,) * len(known))


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    packed = packed_of(self, input) if values_only(input) else None
    if packed is not None:
        return packed(input)
    if wants_gradient(input, self.weight, self.bias):
        return trained_linear(input, self.weight, self.bias)
    return nn.Linear.forward(self, input)


def conv1d_forward(self: Conv1D, x: Tensor) -> Tensor:
    packed = packed_of(self, x) if values_only(x) else None
    if packed is not None:
        return packed(x)
    if wants_gradient(x, self.weight, self.bias):
        return trained_linear(x, self.weight.t(), self.bias)
    return Conv1D.forward(self, x)


@torch.no_grad()
def activation_name(activation: Any) -> str | None:
    """Which of PackedLinear's activations this function or module computes, found by calling it."""
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None
    x = torch.cat([torch.linspace(-8.0, 8.0, 257), torch.tensor([-300.0, -30.0, 30.0, 300.0])])
    theirs = activation(x)
    for name, function in FORMULA.items():
        if isinstance(theirs, Tensor) and torch.allclose(theirs, function(x), rtol=0, atol=2e-6):
            return name
    return None
