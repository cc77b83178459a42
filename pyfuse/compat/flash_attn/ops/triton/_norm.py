"""The sum, the dropout and the norms of ops.triton.layer_norm, in terms of pyfuse's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import pyfuse


class Norm(NamedTuple):
    """LayerNorm or RMSNorm with its parameters."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool
    zero_centered: bool

    def parameters(self, acc: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias in acc, which is float32 or wider; weight as it multiplies."""
        weight = None if self.weight is None else self.weight.to(acc)
        if weight is not None and self.zero_centered:
            weight = weight + 1.0
        return weight, None if self.bias is None else self.bias.to(acc)

    def suits(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether `fused` can: pyfuse's RMSNorm has no bias, and a residual is no narrower than x."""
        wide = residual is None or torch.promote_types(residual.dtype, x.dtype) == residual.dtype
        return wide and not (self.rms and self.bias is not None)

    def fused(self, x: Tensor, residual: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
        """(y, z) for z = dropout(x) + residual, in one call."""
        weight, bias = self.weight, self.bias
        if self.zero_centered:
            weight, bias = self.parameters(accumulate_dtype(x.dtype))
        if self.rms:
            return pyfuse.rms_norm(
                x, weight, self.eps,
                residual=residual, prenorm=True, dropout_p=dropout_p, casting="torch",
            )  # fmt: skip
        return pyfuse.layer_norm(
            x, weight, bias, self.eps, residual=residual, prenorm=True, dropout_p=dropout_p
        )

    def of(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """y in dtype, rounded to it from float32 or wider."""
        acc = accumulate_dtype(z.dtype)
        biased_rms = self.rms and self.bias is not None
        x = z.to(acc) if biased_rms or dtype != z.dtype else z
        weight, bias = self.parameters(acc)
        if self.rms:
            y = pyfuse.rms_norm(x, weight, self.eps, casting="torch")
            y = y if bias is None else y + bias
        else:
            y = pyfuse.layer_norm(x, weight, bias, self.eps)
        return y.to(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Summed(NamedTuple):
    """z and the dropout masks (True: kept) of x and x1; None where there is no dropout."""

    z: Tensor
    mask: Tensor | None
    mask1: Tensor | None


def sum_of(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Summed:
    """z = dropout(x · rowscale) + dropout(x1) + residual, taken in float32 or wider, rounded once to dtype."""
    acc = accumulate_dtype(x.dtype)
    z = x.to(acc)
    if rowscale is not None:
        z = z * rowscale.to(acc).reshape(*x.shape[:-1], 1)
    z, mask = _dropped(z, dropout_p)
    mask1 = None
    if x1 is not None:
        term, mask1 = _dropped(x1.to(acc), dropout_p)
        z = z + term
    if residual is not None:
        z = z + residual
    return Summed(z.to(dtype), mask, mask1)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0.0:
        return x, None
    keep = torch.rand(x.shape, dtype=torch.float32, device=x.device) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0), keep
