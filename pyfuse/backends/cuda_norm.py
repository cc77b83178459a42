"""LayerNorm and RMSNorm by the CUDA kernels, forward. What they take and give is in gpu_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_device import DTYPE, address
from pyfuse.backends.gpu_norm import Inputs, Statistics, dense, rows_of

KINDS = {None: 0, "llama": 1, "gemma": 2, "torch": 3}  # pyfuse::cuda::NormKind
MOST_COLUMNS = 1 << 30  # the kernels count them in 32 bits
NO_ROWS = (0, 0, 0)
Arguments = tuple[Any, ...]
Tensors = tuple[Tensor | None, ...]


def why_not(name: str, t: Tensor) -> str | None:
    if t.shape[-1] > MOST_COLUMNS:
        return f"{name} has {t.shape[-1]} columns, the kernels count to {MOST_COLUMNS}"
    return cuda_device.why_not(name, t)


def write(
    given: Inputs, eps: float, y: Tensor | None, z: Tensor | None, statistics: Statistics
) -> None:
    """Write those results that are not None."""
    call, tensors = call_arguments(given, statistics)
    y_rows, z_rows = written(y), written(z)
    cuda_device.of(given.x).call(
        "norm_forward", (*call, *y_rows, *z_rows, eps), (*tensors, *statistics, y, z)
    )


def call_arguments(given: Inputs, statistics: Statistics) -> tuple[Arguments, Tensors]:
    """The call in the order in which csrc/api reads it, and the tensors that it tells of beside the statistics."""
    x_rows, x = read(given.x)
    residual_rows, residual = read(given.residual)
    weight, bias = _parameter(given.weight), _parameter(given.bias)
    d = given.x.shape[-1]
    arguments = (
        *x_rows, *residual_rows, *vector(weight), *vector(bias), *map(address, statistics),
        given.x.numel() // d, d, KINDS[given.casting],
        *cuda_device.dropout_words(given.dropout_p, given.dropout_seed),
    )  # fmt: skip
    return arguments, (x, residual, weight, bias)


def read(t: Tensor | None) -> tuple[tuple[int, int, int], Tensor | None]:
    """Rows as the kernels are told of them, (address, stride, dtype), and the tensor that holds them."""
    rows, stride = rows_of(t)
    return NO_ROWS if rows is None else (rows.data_ptr(), stride, DTYPE[rows.dtype]), rows


def written(t: Tensor | None) -> tuple[int, int, int]:
    """Of a contiguous tensor."""
    return NO_ROWS if t is None else (t.data_ptr(), t.shape[-1], DTYPE[t.dtype])


def vector(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), DTYPE[t.dtype])


def _parameter(t: Tensor | None) -> Tensor | None:
    """Without gaps; the kernels compute in float32, and so would round one in float64."""
    if t is not None and t.dtype is torch.float64:
        t = t.float()
    return dense(t)
