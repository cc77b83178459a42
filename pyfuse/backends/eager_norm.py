"""LayerNorm and RMSNorm in plain torch: the oracle of every other backend, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.eager_dropout import dropped


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over `dtype` are taken: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def add_residual(x: Tensor, residual: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """z = dropout(x) + residual in the residual's dtype, summed in float32 or wider, rounded once.

    The norm reads z as rounded, as it does where a model adds and normalises in two steps.
    """
    if residual is None and p == 0.0:
        return x
    acc = accumulate_dtype(x.dtype)
    z = dropped(x.to(acc), p, seed)
    if residual is None:
        return z.to(x.dtype)
    return (z + residual).to(residual.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.layer_norm."""
    z = add_residual(x, residual, dropout_p, dropout_seed)
    acc = accumulate_dtype(z.dtype)
    w = None if weight is None else weight.to(acc)
    b = None if bias is None else bias.to(acc)
    y = torch.layer_norm(z.to(acc), (x.shape[-1],), w, b, eps).to(x.dtype)
    return (y, z) if prenorm else y


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    casting: str = "llama",
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.rms_norm."""
    z = add_residual(x, residual, dropout_p, dropout_seed)
    zf = z.to(accumulate_dtype(z.dtype))
    normalised = zf * torch.rsqrt(zf.square().mean(-1, keepdim=True) + eps)
    y = scale_normalised(normalised, weight, x.dtype, casting)
    return (y, z) if prenorm else y


def scale_normalised(n: Tensor, weight: Tensor | None, dtype: torch.dtype, casting: str) -> Tensor:
    """Apply RMSNorm's weight to n, where `casting` says when n [..., D] is rounded to dtype."""
    if weight is None or casting == "llama":
        rounded = n.to(dtype)
        return rounded if weight is None else weight * rounded
    w = weight.to(n.dtype)
    return (n * (1.0 + w if casting == "gemma" else w)).to(dtype)
