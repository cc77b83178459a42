"""flash_attn.ops.triton.layer_norm 2.8.3: dropout, residual add and LayerNorm or RMSNorm in one call.

    z = dropout(x · rowscale) + dropout(x1) + residual
    y = norm(z) · weight + bias, y1 = norm(z) · weight1 + bias1

with norm(z) = (z - mean(z)) / sqrt(var(z) + eps) (Ba et al., arXiv:1607.06450), or z / sqrt(mean(z²) + eps) (Zhang and
Sennrich, arXiv:1910.07467). Computed in float32 (float64 for float64); y is rounded once. The statistics are those of z
as it is rounded to its dtype, the value that prenorm returns; the library takes them before that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfuse.compat.flash_attn.ops.triton import _norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """y, or a tuple (y, y1 with weight1, z with prenorm, both masks with return_dropout_mask).

    x, x1, residual [..., D] of one shape: float32, bfloat16, float16 or float64. x1: a second branch, not together with
      rowscale. weight, bias, weight1, bias1 [D], floating-point; weight None is 1. bias1 needs weight1.
    rowscale: as many values as x has rows [...].
    z has residual's dtype; without one float32 with residual_in_fp32, else x's. residual_out: a tensor of x's shape
      that z is written to (2.8.3 itself takes it and leaves it alone).
    zero_centered_weight: multiply by 1 + weight (and 1 + weight1).
    return_dropout_mask: masks of x and of x1, bool [..., D], True where kept; None without dropout, or without x1.
    out: a tensor of x's shape that y is written to, in its own dtype. out_dtype: y's dtype otherwise, by default x's.

    Dropout draws from torch's default generators; the masks are not the library's.
    ValueError, TypeError: an argument that does not fit.
    """
    _check(x, residual, x1, rowscale, dropout_p)
    _check_parameters(x, weight=weight, bias=bias, weight1=weight1, bias1=bias1)
    for name, buffer in (("out", out), ("residual_out", residual_out)):
        if buffer is not None and buffer.shape != x.shape:
            raise ValueError(
                f"{name}: expected x's shape {tuple(x.shape)}, got {tuple(buffer.shape)}"
            )
    dtype = out.dtype if out is not None else out_dtype or x.dtype
    z_dtype = torch.float32 if residual_in_fp32 and x.dtype != torch.float64 else x.dtype
    z_dtype = z_dtype if residual is None else residual.dtype
    z_dtype = z_dtype if residual_out is None else residual_out.dtype
    norm = _norm.Norm(weight, bias, eps, is_rms_norm, zero_centered_weight)
    plain = x1 is None and rowscale is None and not (return_dropout_mask and dropout_p > 0.0)
    natural = dtype == x.dtype and z_dtype == (x if residual is None else residual).dtype
    mask = mask1 = None
    if plain and natural and norm.suits(x, residual):
        y, z = norm.fused(x, residual, dropout_p)
    else:
        z, mask, mask1 = _norm.sum_of(x, x1, residual, rowscale, dropout_p, z_dtype)
        y = norm.of(z, dtype)
    returned = [y if out is None else out.copy_(y)]
    if weight1 is not None:
        returned.append(norm._replace(weight=weight1, bias=bias1).of(z, dtype))
    if prenorm or residual_out is not None:
        z = z if residual_out is None else residual_out.copy_(z)
        returned += [z] * prenorm
    if return_dropout_mask:
        return *returned, mask, mask1
    return returned[0] if len(returned) == 1 else tuple(returned)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with RMSNorm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """`rms_norm_fn` with a weight [hidden_size], and dropout while training."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        drops = self.drop is not None and self.training
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if drops and self.drop is not None else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """linear(y) for the y of `layer_norm_fn`, or (linear(y), z) with prenorm.

    linear_weight [out, D] and linear_bias [out] are taken in y's dtype, or in that of torch.autocast.
    """
    y, z = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), bias)
    return (out, z) if prenorm else out


def _check(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
    dropout_p: float,
) -> None:
    """What pyfuse's norms do not look at themselves."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    for name, term in (("residual", residual), ("x1", x1)):
        if term is None:
            continue
        if term.shape != x.shape:
            raise ValueError(
                f"{name}: expected x's shape {tuple(x.shape)}, got {tuple(term.shape)}"
            )
        if not term.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {term.dtype}")
        if term.device != x.device:
            raise ValueError(f"{name}: is on {term.device}, but x is on {x.device}")
    if rowscale is None:
        return
    if x1 is not None:
        raise ValueError("rowscale: given beside x1, needs one of the two")
    if rowscale.numel() * x.shape[-1] != x.numel():
        raise ValueError(
            f"rowscale: expected a value for each of x's rows {tuple(x.shape[:-1])}, got "
            f"{tuple(rowscale.shape)}"
        )


def _check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    if parameters["bias1"] is not None and parameters["weight1"] is None:
        raise ValueError("bias1: given without weight1, needs it")
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: expected shape {tuple(x.shape[-1:])}, got {tuple(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {parameter.dtype}")
