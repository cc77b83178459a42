"""Launcher of csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, in_order_of, module, rows_of

HALF = (torch.bfloat16, torch.float16)
LAYER, RMS = 0, {"llama": 1, "gemma": 2, "torch": 3}  # pyfuse::NormKind
LLAMA = RMS["llama"]
Result = Tensor | tuple[Tensor, Tensor]


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
    return norm(LAYER, x, weight, bias, eps, residual, prenorm, dropout_p, dropout_seed)


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
    kind = RMS[casting]
    return norm(kind, x, weight, None, eps, residual, prenorm, dropout_p, dropout_seed)


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
    return why_not(x, residual)


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
    mixed = weight is not None and weight.dtype is torch.float64 and x.dtype is not torch.float64
    if casting == "llama" and mixed:
        return f"casting 'llama' of {x.dtype} x with a float64 weight gives float64"
    return why_not(x, residual)


def why_not(x: Tensor, residual: Tensor | None) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    dtype = x.dtype
    if dtype not in DTYPE:
        return f"x is {dtype}; the kernel has float32, bfloat16, float16 and float64"
    if residual is None or residual.dtype is dtype:
        return None
    if residual.dtype is torch.float32 and dtype in HALF:
        return None
    return f"residual is {residual.dtype} and x {dtype}: the kernel does not mix these"


def norm(
    kind: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    prenorm: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Result:
    """y, or (y, z) with prenorm. Plain cases make few calls: each is a twentieth of a microsecond."""
    dtype, d = x.dtype, x.shape[-1]
    code = z_code = weight_code = bias_code = DTYPE[dtype]
    z_like = x
    if prenorm and residual is None and dropout_p == 0.0:  # z is x itself
        return norm(kind, x, weight, bias, eps, None, False, 0.0, None), x  # type: ignore[return-value]
    if residual is not None:
        z_like, z_code = residual, DTYPE[residual.dtype]
    if weight is not None:
        weight_code = DTYPE[weight.dtype]
        if not weight.is_contiguous():
            weight = weight.contiguous()
    if bias is not None:
        bias_code = DTYPE[bias.dtype]
        if not bias.is_contiguous():
            bias = bias.contiguous()
    if kind == LLAMA and weight_code != code:
        dtype = llama_dtype(x, weight)
    rows, added, z = x, residual, None
    dense = x.is_contiguous() and z_like.is_contiguous()
    if dense:
        y = torch.empty_like(x, dtype=dtype)
        if prenorm:
            z = torch.empty_like(z_like)
    else:
        rows, added = rows_of(x), None if residual is None else rows_of(residual)
        y = torch.empty(x.shape, dtype=dtype)
        if prenorm:
            z = torch.empty(x.shape, dtype=z_like.dtype)
    module().norm(
        rows.data_ptr(),
        0 if added is None else added.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if z is None else z.data_ptr(),
        0 if dropout_seed is None or dropout_p == 0.0 else dropout_seed.data_ptr(),
        x.numel() // d,
        d,
        d if dense else rows.stride(0),
        d if dense or added is None else added.stride(0),
        code,
        z_code,
        DTYPE[dtype],
        weight_code,
        bias_code,
        kind,
        eps,
        dropout_p,
        torch.get_num_threads(),
    )
    if not dense:
        y, z = in_order_of(x, y), None if z is None else in_order_of(z_like, z)
    return y if z is None else (y, z)


def llama_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """Of y = weight · n.to(x.dtype)."""
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
