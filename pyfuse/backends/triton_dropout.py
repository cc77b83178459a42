"""Launcher of kernels/dropout.py."""

from __future__ import annotations

from math import gcd

from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.dropout_impl import impl_of
from pyfuse.backends.gpu_norm import result_like, rows_of
from pyfuse.backends.triton_device import dropout_words, kernels


def _write(
    x: Tensor, flow: Tensor | None, p: float, seed: Tensor | None, activation: str | None
) -> Tensor:
    """See dropout_impl.Write."""
    y, wanted = result_like(x if flow is None else flow, x.dtype)
    if x.numel() > 0:
        _launch(x, flow, y, p, seed, activation)
    return wanted if y is wanted else wanted.copy_(y)


def _launch(
    x: Tensor, flow: Tensor | None, y: Tensor, p: float, seed: Tensor | None, activation: str | None
) -> None:
    d = x.shape[-1]
    flows, flow_stride = rows_of(flow)
    rows, x_stride = rows_of(x) if flow is None or activation is not None else (flows, flow_stride)
    *numbers, keep_scale = dropout_words(p, seed)
    if flow is not None and activation == "relu":
        numbers = [None, None, None]
    device, count = triton_device.of(x), x.numel() // d
    align = gcd(16, x_stride, flow_stride)
    plan = kernels("norm_configs").elementwise(d, align, x.element_size(), device.arch)
    strides = (x_stride // plan.unit, flow_stride // plan.unit)
    programs = -(-count // plan.rows) * plan.options["STRETCHES"]
    options = plan.options | {"ACTIVATION": activation}
    args = (rows, flows, y, *strides, count, *numbers, keep_scale)
    device.launch(kernels("dropout").dropout_kernel, (programs,), args, options)


DROPOUT = impl_of(_write, lambda x: triton_device.why_not("x", x))
