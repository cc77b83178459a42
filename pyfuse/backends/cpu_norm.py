"""Launchers of csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module

HALF = (torch.bfloat16, torch.float16)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.layer_norm."""
    return norm(x, weight, bias, eps, residual, prenorm, False, False, 0.0)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.rms_norm."""
    plus = 1.0 if casting == "gemma" else 0.0
    return norm(x, weight, None, eps, residual, prenorm, True, casting == "llama", plus)


def why_not_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> str | None:
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight is {weight.dtype} and bias {bias.dtype}: they must agree"
    return why_not(x, bias if weight is None else weight, residual, dropout_p)


def why_not_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    casting: str = "llama",
) -> str | None:
    if weight is not None and weight.dtype != x.dtype and casting == "llama":
        return f"casting 'llama' of {x.dtype} x with a {weight.dtype} weight changes the dtype"
    return why_not(x, weight, residual, dropout_p)


def why_not(
    x: Tensor, parameter: Tensor | None, residual: Tensor | None, dropout_p: float
) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPE:
        return f"x is {x.dtype}; the kernel has float32, bfloat16, float16 and float64"
    if dropout_p > 0.0:
        return "the kernel has no dropout yet"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype} and x {x.dtype}: the kernel needs one dtype"
    if parameter is None or parameter.dtype == x.dtype:
        return None
    if parameter.dtype == torch.float32 and x.dtype in HALF:
        return None
    return f"a parameter is {parameter.dtype} and x {x.dtype}: the kernel does not mix these"


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    prenorm: bool,
    rms: bool,
    round_first: bool,
    weight_plus: float,
) -> Tensor | tuple[Tensor, Tensor]:
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        y, z = torch.empty_like(x), torch.empty_like(x) if prenorm else None
        launch(x, residual, y, z, weight, bias, eps, rms, round_first, weight_plus)
    else:
        x2, y2 = rows_of(x), torch.empty(x.shape, dtype=x.dtype)
        r2 = None if residual is None else rows_of(residual)
        z2 = torch.empty_like(y2) if prenorm else None
        launch(x2, r2, y2, z2, weight, bias, eps, rms, round_first, weight_plus)
        y = in_order_of(x, y2)
        z = z2 if z2 is None or residual is None else in_order_of(residual, z2)
    return y if z is None else (y, z)


def launch(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    weight_plus: float,
) -> None:
    """x and residual are contiguous or of two dimensions; y and z are contiguous."""
    d = x.shape[-1]
    dtype = DTYPE[x.dtype]
    parameter = bias if weight is None else weight
    module().norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if z is None else z.data_ptr(),
        x.numel() // d,
        d,
        x.stride(0) if x.ndim == 2 else d,
        0 if residual is None else residual.stride(0) if residual.ndim == 2 else d,
        dtype,
        dtype if parameter is None else DTYPE[parameter.dtype],
        eps,
        rms,
        round_first,
        weight_plus,
        torch.get_num_threads(),
    )


def rows_of(t: Tensor) -> Tensor:
    """t as [rows, D] with unit stride in D: a view where its strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def in_order_of(like: Tensor, t: Tensor) -> Tensor:
    """t in the memory order that torch.empty_like(like) has, which compiled graphs count on."""
    out = torch.empty_like(like)
    return t if out.is_contiguous() else out.copy_(t)
