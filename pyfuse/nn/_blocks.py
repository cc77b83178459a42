"""What the layers of encoder and decoder share: the sum with its norm, the feed-forward block, causal masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from pyfuse import ops
from pyfuse.guards import hooked
from pyfuse.nn import _fallbacks
from pyfuse.nn._suits import is_large, why_not_dropout, why_not_norm, why_not_tensors
from pyfuse.nn.attention import MultiheadAttention
from pyfuse.nn.layers import Dropout, LayerNorm, Linear, RMSNorm

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Dropout: Dropout,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
}

# What the activation of a feed-forward block may be, by ops.dropout's names.
_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (torch.nn.functional.relu, "relu"),
    (torch.relu, "relu"),
    (torch.nn.functional.gelu, "gelu"),
    (torch.nn.functional.silu, "silu"),
)
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}


def adopt(module: nn.Module) -> None:
    """Give every submodule of torch's own type the type that it has here.

    Constructors are torch's, so that parameters are drawn in its order: the same seed, the same values.
    """
    for part in module.modules():
        ours = OURS.get(type(part))
        if ours is not None:
            part.__class__ = ours


def fusable(module: nn.Module) -> bool:
    """Whether a call runs nothing but its forward, so that a fused form may go around it, backward as well."""
    backward = module._backward_hooks or module._backward_pre_hooks
    everywhere = module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks
    return not (hooked(module) or backward or everywhere)


def norm_of_sum(
    update: Tensor, x: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) of z = x + dropout(update): in one pass where the modules are plain ones."""
    p = _fused_dropout(update, x, dropout, norm)
    if p is None:
        z = x + dropout(update)
        return norm(z), z
    assert isinstance(norm, nn.LayerNorm)
    _fallbacks.ran("layer_norm")
    return ops.layer_norm(
        update, norm.weight, norm.bias, norm.eps, residual=x, prenorm=True, dropout_p=p
    )


def _fused_dropout(update: Tensor, x: Tensor, dropout: nn.Module, norm: nn.Module) -> float | None:
    """dropout's p in this call, if sum and norm can be one operation; else None."""
    p = _share(dropout)
    if p is None or p >= 1.0 or type(norm) not in (nn.LayerNorm, LayerNorm):
        return None
    assert isinstance(norm, nn.LayerNorm)
    if len(norm.normalized_shape) != 1 or not fusable(norm):
        return None
    if x.shape != update.shape or x.dtype != update.dtype:
        return None
    if why_not_tensors((x, update)) is not None:
        return None
    if why_not_norm(update, norm.normalized_shape, norm.eps, norm.weight, norm.bias) is not None:
        return None
    return p


def _share(dropout: nn.Module) -> float | None:
    """Of the elements, what a call of this module drops, if it is a plain Dropout; else None."""
    if type(dropout) not in (nn.Dropout, Dropout) or not fusable(dropout):
        return None
    assert isinstance(dropout, nn.Dropout)
    return dropout.p if dropout.training else 0.0


def attend(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What `attention` gives for queries x over the keys and values of memory."""
    o: Tensor = attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]  # fmt: skip
    return o


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x))))"""
    h = layer.linear1(x)
    p, name = _share(layer.dropout), _activation_name(layer.activation)
    if p and name is not None and not torch.compiler.is_compiling() and _droppable(h, p):
        _fallbacks.ran("dropout")
        h = ops.dropout(h, p, activation=name)
    else:
        h = layer.dropout(layer.activation(h))
    y: Tensor = layer.linear2(h)
    return y


def _droppable(h: Tensor, p: float) -> bool:
    # Whether it is in place matters to none: h is no one else's.
    return why_not_dropout(h, p, inplace=False) is None and is_large(h)


def _activation_name(activation: Any) -> str | None:
    """ops.dropout's name of what this function or module does; None if it has none."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in _FUNCTIONS if function is activation), None)
    if not fusable(activation):
        return None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return _MODULES.get(type(activation))


def is_causal_mask(mask: Tensor | None, is_causal: bool | None, size: int | None) -> bool:
    """Whether a stack of layers may take its mask for the causal one. Where the caller does not say, it is compared."""
    if is_causal is not None:
        return is_causal
    if mask is None or size is None or mask.shape[-2:] != (size, size):
        return False
    if mask.dtype is torch.bool:
        causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    else:
        causal = nn.Transformer.generate_square_subsequent_mask(size, mask.device, mask.dtype)
    return bool((mask == causal).all())


def sequence_length(x: Tensor, batch_first: bool) -> int | None:
    """L of [L, E], [B, L, E] or [L, B, E]; None for what has no one length."""
    if x.is_nested:
        return None
    return x.shape[1] if x.dim() == 3 and batch_first else x.shape[0]
