"""Multi-head attention with its projections, without a copy between them.

    q, k, v = x·W_qᵀ + b_q, …          [B, L, H·D], read in place as [B, H, L, D]
    o = attention(q, k, v)             written as [B, L, H·D]
    y = o·W_oᵀ + b_o                   Vaswani et al., arXiv:1706.03762, section 3.2.2

Sequence first or batch first, what differs is the strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse import ops
from pyfuse.nn._suits import why_not_dtypes, why_not_tensors


class Projections(NamedTuple):
    """The parameters: W_q, W_k, W_v as one [3E, E] (`packed`), or apart (`separate`)."""

    embed_dim: int
    heads: int
    packed: Tensor | None
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        separate = self.separate or ()
        return (self.packed, *separate, self.bias, self.out_weight, self.out_bias)


class Call(NamedTuple):
    """Inputs [L, B, E] or [B, L, E], unbatched [L, E]; masks as torch.nn.MultiheadAttention has them."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    dropout_p: float


def why_not(p: Projections, call: Call, need_weights: bool, *, batch_first: bool) -> str | None:
    """Why torch has to answer this call; None if `attend` can."""
    query, key, value = call[:3]
    if need_weights:
        return "need_weights: attention weights are asked for"
    reason = why_not_tensors((*call[:5], *p.tensors()))
    if reason is not None:
        return reason
    if not query.is_floating_point() or not (query.dtype == key.dtype == value.dtype):
        return "query, key and value of different dtypes"
    if not (query.dim() == key.dim() == value.dim()) or query.dim() not in (2, 3):
        return "sizes that do not fit"
    batch = 0 if batch_first else 1
    if query.dim() == 3 and not (query.shape[batch] == key.shape[batch] == value.shape[batch]):
        return "sizes that do not fit"
    if query.shape[-1] != p.embed_dim or key.shape[:-1] != value.shape[:-1]:
        return "sizes that do not fit"
    if p.embed_dim % p.heads or (p.packed is None and (not p.separate or None in p.separate)):
        return "parameters that do not fit"
    if p.packed is not None and not (key.shape[-1] == value.shape[-1] == p.embed_dim):
        return "sizes that do not fit"
    if 0 in query.shape or 0 in key.shape:
        return "an empty tensor"
    if not 0.0 <= call.dropout_p < 1.0:
        return "dropout outside of [0, 1)"
    return why_not_dtypes(query, *p.tensors()) or _why_not_masks(p, call, batch_first)


def _why_not_masks(p: Projections, call: Call, batch_first: bool) -> str | None:
    mask, padding = call.attn_mask, call.key_padding_mask
    if call.is_causal and mask is None:
        return "is_causal without attn_mask"
    for given in (mask, padding):
        if given is not None and given.dtype not in (torch.bool, call.query.dtype):
            return f"a mask of {given.dtype} beside {call.query.dtype}"
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        return "attn_mask and key_padding_mask of different types"
    batch, m, n = _sizes(call, batch_first)
    if padding is not None and padding.shape != ((batch, n) if call.query.dim() == 3 else (n,)):
        return "a mask's size that does not fit"
    if mask is not None and mask.shape not in ((m, n), (batch * p.heads, m, n)):
        return "a mask's size that does not fit"
    return None


def _sizes(call: Call, batch_first: bool) -> tuple[int, int, int]:
    """B, M, N."""
    query, key = call.query, call.key
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    sequence = 1 if batch_first else 0
    return query.shape[1 - sequence], query.shape[sequence], key.shape[sequence]


def attend(p: Projections, call: Call, *, batch_first: bool) -> Tensor:
    """The output, in query's shape, of a call that `why_not` has nothing against."""
    batched = call.query.dim() == 3
    if not batched:
        batch_first = True
    # [B, L, H, D] or [L, B, H, D] to [B, H, L, D], and back.
    there, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    q, k, v = (
        x.unflatten(-1, (p.heads, -1)).permute(there)
        for x in _project(p, *((x if batched else x[None]) for x in call[:3]))
    )
    mask = _mask(p, call, q.shape[0])
    causal = call.is_causal and mask is None
    o = ops.scaled_dot_product_attention(q, k, v, mask, call.dropout_p, causal)
    y = ops.linear(o.permute(back).flatten(-2), p.out_weight, p.out_bias)
    return y if batched else y[0]


def _project(p: Projections, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """q, k, v of width E: one product for those that share an input."""
    if p.packed is None:
        assert p.separate is not None
        biases = (None,) * 3 if p.bias is None else p.bias.chunk(3)
        inputs = zip((query, key, value), p.separate, biases, strict=True)
        return tuple(ops.linear(x, _there(w), b) for x, w, b in inputs)
    if key is value and query is key:
        return ops.linear(query, p.packed, p.bias).chunk(3, dim=-1)
    e = p.embed_dim
    inputs_of, parts = [query, key, value], [e, e, e]
    if key is value:
        inputs_of, parts = [query, key], [e, 2 * e]
    weights = p.packed.split(parts)
    split = [None] * len(parts) if p.bias is None else p.bias.split(parts)
    found = [ops.linear(x, w, b) for x, w, b in zip(inputs_of, weights, split, strict=True)]
    return (found[0], *found[1].chunk(2, dim=-1)) if key is value else tuple(found)


def _there(weight: Tensor | None) -> Tensor:
    assert weight is not None  # why_not() has looked
    return weight


def _mask(p: Projections, call: Call, batch: int) -> Tensor | None:
    """The masks as one that attention takes: True where a query may attend, or what is added."""
    padding, mask = call.key_padding_mask, call.attn_mask
    if call.is_causal and padding is None:
        return None  # the hint stands for the mask, as in torch
    if mask is not None:
        mask = mask.view(1, 1, *mask.shape) if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
        mask = ~mask if mask.dtype is torch.bool else mask
    if padding is not None:
        padding = padding.view(batch, 1, 1, -1)
        padding = ~padding if padding.dtype is torch.bool else padding
    if mask is None or padding is None:
        return padding if mask is None else mask
    return mask & padding if mask.dtype is torch.bool else mask + padding
