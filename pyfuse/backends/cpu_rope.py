"""Launcher of csrc/cpu/rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module


def why_not_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPE:
        return f"x is {x.dtype}; the kernel has float32, bfloat16, float16 and float64"
    if x.stride(3) != 1 and x.shape[3] > 1:
        return f"x has stride {x.stride(3)} in its last dimension, the kernel needs 1"
    return None


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
    y = x if inplace else torch.empty_like(x)
    if sin.stride() != cos.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    batch_stride = cos.stride(0) if cos.ndim == 3 else 0
    position_stride: tuple[int, int] = (0, 0)
    if positions is not None:
        positions = positions.to(torch.int64)
        position_stride = (0 if positions.ndim == 1 else positions.stride(0), positions.stride(-1))
    module().rope(
        x.data_ptr(),
        x.stride(),
        y.data_ptr(),
        y.stride(),
        cos.data_ptr(),
        sin.data_ptr(),
        batch_stride,
        cos.stride(-2),
        cos.shape[-2],
        0 if positions is None else positions.data_ptr(),
        position_stride,
        x.shape,
        2 * cos.shape[-1],
        DTYPE[x.dtype],
        DTYPE[cos.dtype],
        layout == "interleaved",
        torch.get_num_threads(),
    )
    return y
