"""LayerNorm and RMSNorm on the Triton kernels: what they take, and the forward's call."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.triton_device import dropout_words, kernels

Result = Tensor | tuple[Tensor, Tensor]
Statistics = tuple[Tensor | None, Tensor | None]  # mean (None for RMSNorm) and rstd
PARAMETER_DTYPES = (*triton_device.DTYPES, torch.float64)


def why_not_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    **_: Any,
) -> str | None:
    if bias is not None and bias.dtype not in PARAMETER_DTYPES:
        return f"bias is {bias.dtype}; the kernels have float64, float32, bfloat16 and float16"
    return why_not(x, weight, residual)


def why_not_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    casting: str = "llama",
    **_: Any,
) -> str | None:
    reason = why_not(x, weight, residual)
    if reason is not None or weight is None or casting != "llama":
        return reason
    if weight.dtype is torch.float64:
        return f"casting 'llama' of {x.dtype} x with a float64 weight gives float64"
    return None


def why_not(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> str | None:
    reason = triton_device.why_not("x", x)
    if reason is not None:
        return reason
    if weight is not None and weight.dtype not in PARAMETER_DTYPES:
        return f"weight is {weight.dtype}; the kernels have float64, float32, bfloat16 and float16"
    if residual is not None and residual.dtype not in triton_device.DTYPES:
        return f"residual is {residual.dtype}; the kernels have float32, bfloat16 and float16"
    return None


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Result:
    """See pyfuse.layer_norm."""
    return norm(None, x, weight, bias, eps, residual, prenorm, dropout_p, dropout_seed)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    casting: str = "llama",
) -> Result:
    """See pyfuse.rms_norm."""
    return norm(casting, x, weight, None, eps, residual, prenorm, dropout_p, dropout_seed)


def norm(
    casting: str | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    prenorm: bool,
    p: float,
    seed: Tensor | None,
    statistics: Statistics = (None, None),
) -> Result:
    """y, or (y, z) with prenorm. casting: None for LayerNorm. statistics: (mean, rstd) to write, float32 [rows]."""
    dtype, z = x.dtype, None
    if casting == "llama" and weight is not None and weight.dtype is not dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    y, wanted_y = result_like(x, dtype)
    if prenorm and (residual is not None or p != 0.0):
        like = x if residual is None else residual
        z, wanted_z = result_like(like, like.dtype)
    write_norm(casting, x, residual, weight, bias, y, z, statistics, eps, p, seed)
    if wanted_y is not y:
        y = wanted_y.copy_(y)
    if z is None:
        return (y, x) if prenorm else y
    return y, z if wanted_z is z else wanted_z.copy_(z)


def write_norm(
    casting: str | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    statistics: Statistics,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> None:
    """Write those results that are not None; y and z are contiguous."""
    d = x.shape[-1]
    count = x.numel() // d
    if count == 0:
        return
    device = triton_device.of(x)
    size = widest(x, residual, y)
    (x, x_stride), (residual, r_stride) = rows_of(x), rows_of(residual)
    align = gcd(16, x_stride, r_stride)
    bare = residual is None and p == 0.0
    plan = kernels("norm_configs").forward(
        d, align, size, widest(weight, bias), device.arch, casting, bare
    )
    unit = plan.unit
    size_of = (count, d) if plan.wide else (count,)
    rest = (x_stride // unit, r_stride // unit, *size_of, eps, *dropout_words(p, seed))
    args: tuple[Any, ...]
    if casting is None:
        module = kernels("layer_norm")
        kernel = module.layer_norm_wide_kernel if plan.wide else module.layer_norm_kernel
        args = (x, residual, dense(weight), dense(bias), y, z, *statistics, *rest)
    else:
        module = kernels("rms_norm")
        kernel = module.rms_norm_wide_kernel if plan.wide else module.rms_norm_kernel
        args = (x, residual, dense(weight), y, z, statistics[1], *rest)
    device.launch(kernel, (plan.programs(count),), args, plan.options)


def widest(*tensors: Tensor | None) -> int:
    """Bytes of an element of the widest; 1 if there is none."""
    widest = 1
    for t in tensors:
        if t is not None and t.element_size() > widest:
            widest = t.element_size()
    return widest


def rows_of(t: Tensor | None) -> tuple[Any, int]:
    """(t, the stride of its rows): of t itself where it is [rows, D] with dense rows and one stride, else of a copy."""
    if t is None:
        return None, 0
    if t.is_contiguous():
        return t, t.shape[-1]
    t = t.reshape(-1, t.shape[-1])
    if t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0)


def result_like(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a contiguous tensor for the kernel to write, one in the memory order of torch.empty_like(t), which compiled
    graphs count on): the same one where that order is contiguous."""
    wanted = torch.empty_like(t, dtype=dtype)
    if wanted.is_contiguous():
        return wanted, wanted
    return torch.empty_like(wanted, memory_format=torch.contiguous_format), wanted


def dense(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()
