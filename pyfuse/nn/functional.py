"""torch.nn.functional's functions on pyfuse's operations: the same signatures, results and errors.

What an operation does not cover, and what is wrong about a call, is torch's to answer: its own function runs or raises.
Names that are not defined here are those of torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The originals: override_torch puts other functions under these names.
from torch.nn.functional import dropout as _torch_dropout
from torch.nn.functional import layer_norm as _torch_layer_norm
from torch.nn.functional import linear as _torch_linear
from torch.nn.functional import multi_head_attention_forward as _torch_multi_head
from torch.nn.functional import rms_norm as _torch_rms_norm
from torch.nn.functional import scaled_dot_product_attention as _torch_attention

from pyfuse import ops
from pyfuse.nn import _fallbacks, _multi_head
from pyfuse.nn._suits import (
    is_large,
    why_not_attention,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
)
from pyfuse.ops.linear import checked_linear

__all__ = [
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "multi_head_attention_forward",
    "rms_norm",
    "scaled_dot_product_attention",
]

linear_cross_entropy = ops.linear_cross_entropy


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn.functional, name)
    except AttributeError:
        message = f"neither pyfuse.nn.functional nor torch.nn.functional has {name!r}"
        raise AttributeError(message) from None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input·weightᵀ + bias, as torch.nn.functional.linear; see `pyfuse.ops.linear`."""
    reason = why_not_linear(input, weight, bias)
    if reason is not None:
        _fallbacks.left("linear", reason)
        return _torch_linear(input, weight, bias)
    _fallbacks.ran("linear")
    return checked_linear(input, weight, bias)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p, divide the others by 1 - p, as torch.nn.functional's; see `pyfuse.dropout`.

    In a compiled graph it is torch's own, which the compiler fuses with what stands around it.
    """
    if not training or p == 0.0 or torch.compiler.is_compiling():
        return _torch_dropout(input, p, training, inplace)
    reason = why_not_dropout(input, p, inplace)
    if reason is not None:
        _fallbacks.left("dropout", reason)
    if reason is not None or not is_large(input):
        return _torch_dropout(input, p, training, inplace)
    _fallbacks.ran("dropout")
    return ops.dropout(input, p)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · query · keyᵀ + attn_mask) · value, as torch.nn.functional's of this name.

    `pyfuse.scaled_dot_product_attention` says what it computes; it raises where torch takes over here.
    """
    reason = why_not_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if reason is not None:
        _fallbacks.left("scaled_dot_product_attention", reason)
        return _torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _fallbacks.ran("scaled_dot_product_attention")
    return ops.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last len(normalized_shape) dimensions, as torch.nn.functional's."""
    shape = tuple(normalized_shape)
    reason = why_not_norm(input, shape, eps, weight, bias)
    if reason is not None:
        _fallbacks.left("layer_norm", reason)
        return _torch_layer_norm(input, normalized_shape, weight, bias, eps)
    _fallbacks.ran("layer_norm")
    if len(shape) == 1:
        return ops.layer_norm(input, weight, bias, eps)
    weight, bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
    return ops.layer_norm(input.flatten(-len(shape)), weight, bias, eps).view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMSNorm over the last len(normalized_shape) dimensions, as torch.nn.functional's.

    eps: by default that of float32, or of float64 for it: of the dtype that torch computes in.
    """
    shape = tuple(normalized_shape)
    given = 0.0 if eps is None else eps
    reason = why_not_norm(input, shape, given, weight)
    if reason is not None:
        _fallbacks.left("rms_norm", reason)
        return _torch_rms_norm(input, normalized_shape, weight, eps)
    _fallbacks.ran("rms_norm")
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if len(shape) == 1:
        return ops.rms_norm(input, weight, eps, casting="torch")
    flat = None if weight is None else weight.reshape(-1)
    y = ops.rms_norm(input.flatten(-len(shape)), flat, eps, casting="torch")
    return y.view(input.shape)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention with its projections, as torch.nn.functional's: sequence first.

    Attention weights (need_weights) are torch's to compute: they exist as a matrix only there.
    """
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    projections = _multi_head.Projections(
        embed_dim_to_check, num_heads, None if separate else in_proj_weight, separate, in_proj_bias,
        out_proj_weight, out_proj_bias,
    )  # fmt: skip
    call = _multi_head.Call(
        query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p if training else 0.0
    )
    reason = _multi_head.why_not(projections, call, need_weights, batch_first=False)
    if static_k is not None or static_v is not None:
        reason = "static_k, static_v: keys and values that are given"
    elif bias_k is not None or bias_v is not None or add_zero_attn:
        reason = "bias_k, bias_v, add_zero_attn: a key that is appended"
    if reason is None:
        _fallbacks.ran("multi_head_attention_forward")
        return _multi_head.attend(projections, call, batch_first=False), None
    _fallbacks.left("multi_head_attention_forward", reason)
    return _torch_multi_head(
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
        bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias,
        training=training, key_padding_mask=key_padding_mask, need_weights=need_weights,
        attn_mask=attn_mask, use_separate_proj_weight=use_separate_proj_weight,
        q_proj_weight=q_proj_weight, k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight,
        static_k=static_k, static_v=static_v, average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )  # fmt: skip
