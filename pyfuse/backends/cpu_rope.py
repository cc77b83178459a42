"""Launcher of csrc/cpu/rope.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    return turn(x, x if inplace else torch.empty_like(x), cos, sin, layout, positions, False)


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return rope(x, cos, sin, **options), ()


def backward(
    grads: Sequence[Tensor | None],
    tensors: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    saved: tuple[Tensor, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """dx = dy turned back by the same angles."""
    (dy,), (x, cos, sin) = grads, tensors
    dx = torch.empty_like(x)
    if dy is None:
        return {"x": dx.zero_()}
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    return {"x": turn(dy, dx, cos, sin, options["layout"], options["positions"], True)}


def restore(*_: Any) -> tuple[Tensor, ...]:
    """What forward saves is nothing."""
    return ()


def why_not_backward(
    needs: frozenset[str],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> str | None:
    if not needs <= {"x"}:
        return "the kernel has no gradient of cos and sin"
    if inplace:
        return "inplace overwrites x"
    return None


def turn(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    positions: Tensor | None,
    inverse: bool,
) -> Tensor:
    """x rotated by its tokens' angles, or back by them, into y."""
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
        inverse,
        torch.get_num_threads(),
    )
    return y
