"""y = act(x·Wᵀ + b) · multiply + residual for few rows, on the CPU kernel that reads W once as it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module, why_unavailable

# The numbers of pyfuse::Activation (csrc/include/pyfuse/params.h).
ACTIVATION: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


def why_not_linear_rows(weight: Tensor) -> str | None:
    """Why the kernel cannot multiply by this weight [N, K]; None if it can."""
    reason = why_unavailable()
    if reason is not None:
        return reason
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}, not on the CPU"
    if weight.dtype not in DTYPE:
        return f"dtype {weight.dtype} is none of float32, bfloat16, float16, float64"
    return None


def linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K], weight [N, K] with unit last stride; multiply and residual [..., N]; all of one dtype."""
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if multiply is not None:
        multiply = multiply.reshape(-1, n).contiguous()
    if residual is not None:
        residual = residual.reshape(-1, n).contiguous()
    module().linear(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), weight.stride(0),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), n, rows.shape[0], n, k,
        DTYPE[x.dtype], ACTIVATION[activation],
        0 if multiply is None else multiply.data_ptr(), n,
        0 if residual is None else residual.data_ptr(), n, torch.get_num_threads(),
    )  # fmt: skip
    return y
