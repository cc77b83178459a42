"""Rotary embedding, the embedding sum in plain torch: the oracle and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfuse.backends.eager_dropout import dropped
from pyfuse.backends.eager_norm import accumulate_dtype
from pyfuse.sinusoids import sinusoids


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """See pyfuse.rope."""
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, M, R/2]: the same for every head
    acc = accumulate_dtype(x.dtype)
    r = 2 * cos.shape[-1]
    rotated = rotate(x[..., :r].to(acc), cos.to(acc), sin.to(acc), layout).to(x.dtype)
    if inplace:
        x[..., :r] = rotated
        return x
    return rotated if r == x.shape[-1] else torch.cat((rotated, x[..., r:]), -1)


def rope_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """See pyfuse.rope_pair."""
    return rope(q, cos, sin, **options), rope(k, cos, sin, **options)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn each pair (x1, x2) of the last dimension by its angle; layout says which two pair up."""
    if layout == "half":
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)


def embed(
    token_ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """See pyfuse.embed. Everything in float32 or wider, rounded once."""
    acc = accumulate_dtype(weight.dtype)
    d = weight.shape[-1]
    e = F.embedding(token_ids, weight, sparse=sparse).to(acc) * scale
    if positions is None:
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
    if sinusoidal:
        e = e + sinusoids(positions, d, 10000.0, acc)
    elif position_weight is not None:
        e = e + F.embedding(positions, position_weight).to(acc)
    if segment_ids is not None and segment_weight is not None:
        e = e + F.embedding(segment_ids, segment_weight).to(acc)
    if norm_weight is not None:
        b = None if norm_bias is None else norm_bias.to(acc)
        e = torch.layer_norm(e, (d,), norm_weight.to(acc), b, eps)
    return dropped(e, dropout_p, dropout_seed).to(weight.dtype)
