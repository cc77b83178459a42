"""The operations of the reference Transformer by torch's own functions: what to compare with.

    model = Transformer(config, ops=pyfuse.models.stock)

Each is what a careful author writes in plain torch: scaled_dot_product_attention, layer_norm, cross_entropy of all
logits. Names and arguments are those of `pyfuse.ops`, as far as the model gives them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pyfuse.activations import FORMULA

__all__ = [
    "attention",
    "dropout",
    "embed",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope_pair",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    if window is not None or (causal and mask is not None):  # torch has the one or the other
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        seen = (j <= i) if causal else torch.ones_like(j <= i)
        if window is not None:
            seen &= i - j < window
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def dropout(x: Tensor, p: float = 0.5, *, activation: str | None = None) -> Tensor:
    return F.dropout(x if activation is None else FORMULA[activation](x), p)


def embed(
    token_ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | str | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    e = F.embedding(token_ids, weight)
    if scale != 1.0:
        e = e * scale
    if positions is None:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    if isinstance(position_weight, Tensor):
        e = e + F.embedding(positions, position_weight)
    elif position_weight == "sinusoidal":
        e = e + _sinusoids(positions, e.shape[-1]).to(e.dtype)
    if segment_ids is not None and segment_weight is not None:
        e = e + F.embedding(segment_ids, segment_weight)
    if norm_weight is not None:
        e = F.layer_norm(e, e.shape[-1:], norm_weight, norm_bias, eps)
    return F.dropout(e, dropout_p)


def _sinusoids(positions: Tensor, d: int) -> Tensor:
    """sin and cos of position / 10000^(2i / d), by turns. Vaswani et al., arXiv:1706.03762, section 3.5."""
    i = torch.arange(0, d, 2, device=positions.device)
    angles = positions[..., None] * 10000.0 ** (-i / d)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :d]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[True],
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    z = _sum(x, residual, dropout_p)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps), z


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    prenorm: Literal[True],
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As Hugging Face writes Llama's."""
    z = _sum(x, residual, dropout_p)
    wide = z.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * n.to(z.dtype), z


def _sum(x: Tensor, residual: Tensor | None, p: float) -> Tensor:
    return x if residual is None else residual + F.dropout(x, p)


def rope_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "half",
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As Hugging Face writes Llama's: x · cos + rotate_half(x) · sin."""
    if layout != "half":
        raise ValueError(f"layout: got {layout!r}, needs 'half'")
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
    cos, sin = (torch.cat((t, t), -1).to(q.dtype) for t in (cos, sin))
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    logits = linear(x, weight, bias).flatten(0, -2).float()
    target = target.flatten()
    loss = cross_entropy(logits, target, label_smoothing=label_smoothing)
    if z_loss > 0.0:
        loss = loss + z_loss * logits.logsumexp(1)[target != -100].square().mean()
    return loss
