"""Launcher of csrc/cpu/dropout.cpp: dropout with the activation before it, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import ACTIVATION, DTYPE, in_order_of, module, rows_of
from pyfuse.backends.dropout_impl import impl_of


def _why_not(x: Tensor) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPE:
        return f"x is {x.dtype}; the kernel has float32, bfloat16, float16 and float64"
    return None


def _write(
    x: Tensor, flow: Tensor | None, p: float, seed: Tensor | None, activation: str | None
) -> Tensor:
    """See dropout_impl.Write."""
    like = x if flow is None else flow
    y = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        return in_order_of(like, y)
    flows = None if flow is None else rows_of(flow)
    rows = rows_of(x) if flows is None or activation is not None else flows
    module().dropout(
        rows.data_ptr(),
        0 if flows is None else flows.data_ptr(),
        y.data_ptr(),
        0 if seed is None or p == 0.0 else seed.data_ptr(),
        *rows.shape,
        rows.stride(0),
        0 if flows is None else flows.stride(0),
        DTYPE[x.dtype],
        ACTIVATION[activation],
        p,
        torch.get_num_threads(),
    )
    return in_order_of(like, y)


DROPOUT = impl_of(_write, _why_not)
