"""y = act(x·Wᵀ + b) · multiply + residual on the CPU: one kernel for few rows, one for many.

``RowsWeight`` multiplies by W as it lies in memory, reading it once; ``PackedWeight`` by a copy of W laid out for
register tiles. Both fuse all that follows the product into its last step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import ACTIVATION, DTYPE, module, why_unavailable


def why_not_linear(weight: Tensor) -> str | None:
    """Why these kernels cannot multiply by this weight [N, K]; None if they can."""
    reason = why_unavailable()
    if reason is not None:
        return reason
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}, not on the CPU"
    if weight.dtype not in DTYPE:
        return f"dtype {weight.dtype} is none of float32, bfloat16, float16, float64"
    return None


class RowsWeight:
    """W [N, K] (unit last stride) for few rows of x. Holds W; copies nothing."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.stride(1) != 1:
            raise ValueError(f"weight: got strides {weight.stride()}, needs a unit last stride")
        self._launch = module().linear
        self._hold(weight, weight.data_ptr(), weight.stride(0), bias)
        self._weight = weight

    def _hold(self, weight: Tensor, address: int, stride: int, bias: Tensor | None) -> None:
        self.n, self.k = weight.shape
        if bias is not None:
            if bias.shape != (self.n,) or bias.dtype != weight.dtype:
                got = f"shape {tuple(bias.shape)} and {bias.dtype}"
                raise ValueError(f"bias: got {got}, needs shape ({self.n},) and {weight.dtype}")
            bias = bias.contiguous()
        self._bias = bias  # keeps its memory alive
        self.dtype = weight.dtype
        self._w = (address, stride, 0 if bias is None else bias.data_ptr())
        self._dtype = DTYPE[weight.dtype]

    def __call__(
        self,
        x: Tensor,
        activation: str | None = None,
        multiply: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [..., K]; multiply, residual and out (contiguous; written) [..., N]; all of W's dtype."""
        n, k = self.n, self.k
        y = x.new_empty((*x.shape[:-1], n)) if out is None else out
        if not x.is_contiguous():
            x = x.contiguous()
        if multiply is not None:
            multiply = multiply.expand(y.shape).contiguous()
        if residual is not None:
            residual = residual.expand(y.shape).contiguous()
        self._launch(
            x.data_ptr(), k, *self._w, y.data_ptr(), n, y.numel() // n if n else 0, n, k, self._dtype,
            ACTIVATION[activation], 0 if multiply is None else multiply.data_ptr(), n,
            0 if residual is None else residual.data_ptr(), n, torch.get_num_threads(),
        )  # fmt: skip
        return y


MOST_TOGETHER = 4  # layers of one call


def rows_together(
    x: Tensor, weights: Sequence[RowsWeight], activations: Sequence[str | None]
) -> list[Tensor]:
    """act(x·Wᵀ + b) of up to four weights (no packed ones) for the same few rows, in one call."""
    if not x.is_contiguous():
        x = x.contiguous()
    lead, k = x.shape[:-1], weights[0].k
    results = [x.new_empty((*lead, w.n)) for w in weights]
    layers = [
        (*w._w, y.data_ptr(), w.n, ACTIVATION[activation])
        for w, y, activation in zip(weights, results, activations, strict=True)
    ]
    module().linear_together(
        x.data_ptr(),
        x.numel() // k if k else 0,
        k,
        weights[0]._dtype,
        torch.get_num_threads(),
        layers,
    )
    return results


class PackedWeight(RowsWeight):
    """A packed copy of W [N, K] for many rows of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._launch = module().linear_packed
        self.packed = pack(weight)
        self._hold(weight, self.packed.data_ptr(), 0, bias)


def pack(weight: Tensor) -> Tensor:
    """W [N, K] in panels of 64 outputs, one flat tensor; the layout is that of csrc/cpu/linear_packed.cpp."""
    n, k = weight.shape
    panel = module().packed_linear_panel
    length = k + k % 2 if weight.dtype == torch.bfloat16 else k
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    packed = weight.new_empty(-(-n // panel) * panel * length)
    module().pack_linear(
        weight.data_ptr(), weight.stride(0), packed.data_ptr(), n, k, DTYPE[weight.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return packed
