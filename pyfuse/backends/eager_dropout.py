"""Dropout in plain torch: which elements it drops is part of what every backend has to reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.activations import FORMULA
from pyfuse.philox import dropout_mask


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero each element of x [..., D] with probability p, scale the rest by 1/(1-p).

    Element (row, column) of the [rows, D] view of x takes the random word of element
    (0, 0, row, column), so that the mask does not depend on x's leading shape or its strides.
    """
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError(f"dropout_seed: None, but dropout_p = {p} needs a (seed, offset) tensor")
    d = x.shape[-1]
    rows = x.numel() // d if d else 0
    keep = dropout_mask(seed, (1, 1, rows, d), p, x.device).reshape(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def dropout(
    x: Tensor,
    *,
    dropout_p: float,
    dropout_seed: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See pyfuse.dropout. In float32 or wider, rounded once."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if activation is not None:
        y = FORMULA[activation](y)
    return dropped(y, dropout_p, dropout_seed).to(x.dtype)
