"""What the torch.library operators return, without computing it: shapes, dtypes and memory order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None, return_lse: bool = False, **__: Any
) -> list[Tensor]:
    """o keeps the memory order of q ([B, M, Hq, D] as a rule)."""
    batch, heads, rows, _d = q.shape
    dv = v.shape[-1]
    if q.stride(1) < q.stride(2):
        o = q.new_empty((batch, rows, heads, dv)).transpose(1, 2)
    else:
        o = q.new_empty((batch, heads, rows, dv))
    return [o, q.new_empty((batch, heads, rows), dtype=_lse_dtype(q))] if return_lse else [o]


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor, return_lse: bool = False, **__: Any
) -> list[Tensor]:
    rows, heads, _d = q.shape
    o = q.new_empty((rows, heads, v.shape[-1]))
    return [o, q.new_empty((heads, rows), dtype=_lse_dtype(q))] if return_lse else [o]


def _norm(
    x: Tensor,
    weight: Tensor | None,
    *_: Any,
    residual: Tensor | None = None,
    prenorm: bool = False,
    casting: str = "",
    **__: Any,
) -> list[Tensor]:
    dtype = x.dtype
    if casting == "llama" and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype)
    return [y, torch.empty_like(x if residual is None else residual)] if prenorm else [y]


def _like_x(x: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [torch.empty_like(x)]


def _rope_pair(q: Tensor, k: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [torch.empty_like(q), torch.empty_like(k)]


def _embed(token_ids: Tensor, weight: Tensor, **_: Any) -> list[Tensor]:
    return [weight.new_empty((*token_ids.shape, weight.shape[1]))]


FAKES: dict[str, Callable[..., list[Tensor]]] = {
    "attention": _attention,
    "varlen_attention": _varlen_attention,
    "decode_attention": _attention,
    "dropout": _like_x,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "rope": _like_x,
    "rope_pair": _rope_pair,
    "embed": _embed,
}
