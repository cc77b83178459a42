"""The attention function that models call through transformers' AttentionInterface."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils import output_capturing

from pyfuse.hf.guards import is_tracing
from pyfuse.hf.masks import CompactMask
from pyfuse.hf.packing import PackedMask
from pyfuse.ops.attention import attention, varlen_attention

# What models pass along that no attention function uses. Any other argument that is set may change
# the result: the call then goes to the stock function, which does with it what it did before.
IGNORED = frozenset(
    [
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    ]
)
NAMES = ("pyfuse", "pyfuse-eager")  # the second: stock for this model is its own eager attention
Mask = CompactMask | PackedMask | Tensor | None
Result = tuple[Tensor, Tensor | None]


def pyfuse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """softmax(scaling · query keyᵀ + bias, over what the mask allows) value, and None for weights.

    query [B, Hq, M, D], key [B, Hk, N, D], value [B, Hk, N, Dv], as models call it; the result is
    [B, M, Hq, Dv], contiguous. attention_mask: from :func:`pyfuse.hf.masks.pyfuse_mask`, or a
    PackedMask (B is 1), or the user's own 4-D tensor. As with stock sdpa the mask is the whole
    truth about the window (``sliding_window`` is only a hint), and None means causal where the
    module is.
    """
    if (
        dropout
        or (kwargs and _needs_stock(kwargs))
        or _gradient_wanted(query, key, value, position_bias, s_aux, attention_mask)
        or not _plain_call(query, key, value)
    ):
        options = {"is_causal": is_causal, "position_bias": position_bias, "s_aux": s_aux, **kwargs}
        if softcap is not None:
            options["softcap"] = softcap
        return stock(module, query, key, value, attention_mask, dropout, scaling, options)

    if position_bias is not None:
        position_bias = _prepared(position_bias)
    if attention_mask is None:
        rows = query.shape[2]
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal = bool(is_causal) and rows > 1
        if causal and key.shape[2] > rows:  # the first pass with a static cache: the rest is empty
            key, value = key[:, :, :rows], value[:, :, :rows]
            position_bias = None if position_bias is None else position_bias[..., :rows]
        out = attention(
            query, key, value, mask=position_bias, causal=causal, softcap=softcap, sinks=s_aux,
            scale=scaling,
        )  # fmt: skip
    elif type(attention_mask) is CompactMask:
        out = _with_compact(
            query, key, value, attention_mask, position_bias, softcap, s_aux, scaling
        )
    elif type(attention_mask) is PackedMask and position_bias is None:
        out = _with_packed(query, key, value, attention_mask, softcap, s_aux, scaling)
    elif isinstance(attention_mask, Tensor):
        if position_bias is not None:
            attention_mask = create_position_bias_mask(
                position_bias, attention_mask, False, query, key
            )
        out = attention(
            query, key, value, mask=attention_mask, softcap=softcap, sinks=s_aux, scale=scaling
        )
    else:
        kind = type(attention_mask).__name__
        raise TypeError(f"attention_mask: got {kind}, needs a tensor, None or pyfuse's own mask")
    return out.transpose(1, 2).contiguous(), None


def _with_compact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CompactMask,
    position_bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
) -> Tensor:
    keys, key_mask = mask.keys, mask.key_mask
    if key.shape[2] != mask.kv_length:
        raise ValueError(
            f"attention_mask: made for {mask.kv_length} keys, but key has {key.shape[2]}"
        )
    if keys != mask.kv_length:
        key, value = key[:, :, :keys], value[:, :, :keys]
        position_bias = None if position_bias is None else position_bias[..., :keys]
    if position_bias is not None:
        key_mask = position_bias if key_mask is None else mask.biased(position_bias)
    return attention(
        query, key, value, mask=key_mask, causal=mask.causal, window=mask.window, softcap=softcap,
        sinks=sinks, seqlens_k=mask.seqlens_k, scale=scale,
    )  # fmt: skip


def _with_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
) -> Tensor:
    """query, key, value [1, H, T, D]"""
    packing = mask.packing
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.key_rows is not None:
        k, v = k.index_select(0, packing.key_rows), v.index_select(0, packing.key_rows)
    out: Tensor = varlen_attention(
        q, k, v, packing.cu_queries, packing.cu_keys, window=mask.window, softcap=softcap,
        sinks=sinks, scale=scale,
    )  # fmt: skip
    return out[None].transpose(1, 2)


def _needs_stock(kwargs: dict[str, Any]) -> bool:
    """Attention weights are asked for, or there is an argument that this function does not know."""
    for name, value in kwargs.items():
        if value is not None and (name not in IGNORED or (name == "output_attentions" and value)):
            return True
    return False


_biases = WeakIdKeyDictionary()  # position bias -> (its version, what replaces it, it stays)


def _prepared(bias: Tensor) -> Tensor | None:
    """T5's position bias as the kernel likes it: contiguous, and None if it is all zeros.

    T5 makes it once per forward pass, strided by the heads, and hands it to every layer; its
    cross-attention, which has none, makes zeros.
    """
    if torch.compiler.is_compiling() or type(bias) is not Tensor:
        return bias
    version = 0 if bias.is_inference() else bias._version
    known: tuple[int, Tensor | None, bool] | None = _biases.get(bias)
    if known is None or known[0] != version:
        as_is, needed = bias.is_contiguous(), bool(bias.any())
        # A bias that is used as it is has no place in its own entry: that would keep it alive.
        known = (version, bias.contiguous() if needed and not as_is else None, needed and as_is)
        _biases[bias] = known
    return bias if known[2] else known[1]


def _gradient_wanted(*tensors: Any) -> bool:
    """Whether autograd has to see this call: stock runs then, so that training is the model's own, bit for bit."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def _plain_call(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """One dtype and batch size (learned queries broadcast), no autocast, nothing recorded."""
    if not (query.dtype == key.dtype == value.dtype and query.shape[0] == key.shape[0]):
        return False
    if torch.compiler.is_compiling():
        return True
    return not (torch._C._is_any_autocast_enabled() or is_tracing() or _weights_recorded())


def _weights_recorded() -> bool:
    """``output_attentions=True`` of a model that only records what attention returns."""
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


def stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> Result:
    """What the model ran before: torch's sdpa, or its eager attention, which returns weights."""
    compiling = torch.compiler.is_compiling()
    recording = options.get("output_attentions") or (not compiling and _weights_recorded())
    eager = recording or module.config._attn_implementation == "pyfuse-eager"  # type: ignore[union-attr]
    if not eager:
        dense = (
            attention_mask
            if attention_mask is None or isinstance(attention_mask, Tensor)
            else attention_mask.dense()
        )
        return sdpa_attention_forward(
            module, query, key, value, dense, dropout=dropout, scaling=scaling, **options
        )
    options = {name: option for name, option in options.items() if option is not None}
    mask = _additive(module, query, key, attention_mask, options.pop("is_causal", None))
    out, weights = eager_forward(module)(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
    )
    return out.contiguous(), weights


def eager_forward(module: nn.Module) -> Any:
    """The eager attention function that every model file with the interface has under this name."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise NotImplementedError(
            f"output_attentions: {type(module).__name__} has no eager attention to take them from"
        )
    return function


def _additive(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Mask,
    is_causal: bool | None,
) -> Tensor | None:
    """The float mask of eager attention, from whatever the mask function gave."""
    if isinstance(mask, CompactMask | PackedMask):
        return mask.additive(query.dtype)
    lowest = torch.finfo(query.dtype).min
    rows, keys = query.shape[2], key.shape[2]
    if mask is None:
        if rows == 1 or not (
            is_causal if is_causal is not None else getattr(module, "is_causal", True)
        ):
            return None
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1)
        return torch.zeros(1, 1, rows, keys, dtype=query.dtype, device=query.device).masked_fill(
            hidden, lowest
        )
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, lowest
    )


for _name in NAMES:
    AttentionInterface.register(_name, pyfuse_attention)
