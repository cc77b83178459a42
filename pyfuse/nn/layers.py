"""torch.nn's Linear, Dropout, LayerNorm and RMSNorm on pyfuse's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.nn import functional as F


class Linear(torch.nn.Linear):
    """y = x·Wᵀ + b; torch.nn.Linear documents it, `pyfuse.ops.linear` says how it is computed."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout documents it. Srivastava et al., JMLR 15 (2014)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm documents it. Ba et al., arXiv:1607.06450."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm documents it. Zhang and Sennrich, arXiv:1910.07467."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
