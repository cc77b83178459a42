"""Launchers of csrc/cpu/norm.cpp and norm_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module
from pyfuse.dispatch import Gradient

HALF = (torch.bfloat16, torch.float16)
LAYER, RMS = 0, {"llama": 1, "gemma": 2, "torch": 3}  # pyfuse::NormKind
LLAMA = RMS["llama"]
Result = Tensor | tuple[Tensor, Tensor]
Saved = tuple[Tensor | None, ...]


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
    if casting == "llama" and weight is not None and weight.dtype is not x.dtype:
        if weight.dtype is torch.float64:
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
    """One launch: y, or (y, z) with prenorm."""
    z_like = x if residual is None else residual
    y_dtype = x.dtype
    if kind == LLAMA and weight is not None and weight.dtype is not y_dtype:
        y_dtype = torch.promote_types(y_dtype, weight.dtype)
    dense = x.is_contiguous() and z_like.is_contiguous()
    if dense:
        x2, r2 = x, residual
        y = torch.empty_like(x) if y_dtype is x.dtype else torch.empty_like(x, dtype=y_dtype)
        z = torch.empty_like(z_like) if prenorm else None
    else:
        x2, r2 = rows_of(x), None if residual is None else rows_of(residual)
        y = torch.empty(x.shape, dtype=y_dtype)
        z = torch.empty(x.shape, dtype=z_like.dtype) if prenorm else None
    launch(kind, x2, r2, contiguous(weight), contiguous(bias), y, z, eps, dropout_p, dropout_seed)
    if dense:
        return y if z is None else (y, z)
    y = in_order_of(x, y)
    return y if z is None else (y, in_order_of(z_like, z))


def launch(
    kind: int,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    """x and residual are contiguous or of two dimensions; the others are contiguous."""
    d = x.shape[-1]
    dtype = DTYPE[x.dtype]
    module().norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if z is None else z.data_ptr(),
        0 if dropout_seed is None or dropout_p == 0.0 else dropout_seed.data_ptr(),
        x.numel() // d,
        d,
        x.stride(0) if x.ndim == 2 else d,
        0 if residual is None else residual.stride(0) if residual.ndim == 2 else d,
        dtype,
        dtype if residual is None else DTYPE[residual.dtype],
        DTYPE[y.dtype],
        dtype if weight is None else DTYPE[weight.dtype],
        dtype if bias is None else DTYPE[bias.dtype],
        kind,
        eps,
        dropout_p,
        torch.get_num_threads(),
    )


# ---- gradients ----------------------------------------------------------------------------------


def layer_norm_forward(*tensors: Tensor | None, **options: Any) -> tuple[Result, Saved]:
    return keep_z(layer_norm(*tensors, **options))  # type: ignore[arg-type]


def rms_norm_forward(*tensors: Tensor | None, **options: Any) -> tuple[Result, Saved]:
    return keep_z(rms_norm(*tensors, **options))  # type: ignore[arg-type]


def keep_z(result: Result) -> tuple[Result, Saved]:
    """What is saved: z where it is a result, else nothing. The backward reads x and residual, which
    autograd keeps in any case, and recomputes z from them."""
    return result, () if isinstance(result, Tensor) else (result[1],)


def layer_norm_backward(
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return norm_backward(LAYER, grads, tensors, options, saved, needs)


def rms_norm_backward(
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    kind = RMS[options["casting"]]
    return norm_backward(kind, grads, (*tensors, None), options, saved, needs)


def norm_backward(
    kind: int,
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of `needs` in one launch."""
    x, weight, bias = tensors
    residual, p = options["residual"], options["dropout_p"]
    seed = options["dropout_seed"] if p > 0.0 else None
    dy, dz = (*grads, None)[:2]
    if dy is None:
        dtype = x.dtype
        if kind == LLAMA and weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        dy = torch.zeros(x.shape, dtype=dtype)
    out = {
        name: torch.empty(t.shape, dtype=t.dtype)
        for name, t in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
        if name in needs
    }
    # Without dropout x and residual have the same gradient, as the operands of x + residual do.
    shared = residual is not None and seed is None and residual.dtype == x.dtype
    if shared and "x" in out and "residual" in out:
        out["residual"] = out["x"]
    launch_backward(
        kind,
        rows_of(x),
        None if residual is None else rows_of(residual),
        None if not saved else rows_of(saved[0]),
        contiguous(weight),
        rows_of(dy),
        None if dz is None else rows_of(dz),
        seed,
        out,
        options["eps"],
        p,
    )
    return out


def launch_backward(
    kind: int,
    x: Tensor,
    residual: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    dy: Tensor,
    dz: Tensor | None,
    dropout_seed: Tensor | None,
    out: dict[str, Tensor],
    eps: float,
    dropout_p: float,
) -> None:
    """Rows are [rows, D] with unit stride in D; those of `out` are contiguous."""
    rows = (x, residual, z, dy, dz)
    dx, dresidual, dbias = out.get("x"), out.get("residual"), out.get("bias")
    if dresidual is dx:  # one result under both names
        dresidual = None
    dtype = DTYPE[x.dtype]
    module().norm_backward(
        *(0 if t is None else t.data_ptr() for t in (x, residual, z, weight, dy, dz, dropout_seed)),
        *(0 if t is None else t.data_ptr() for t in (dx, dresidual, out.get("weight"), dbias)),
        *x.shape,
        tuple(0 if t is None else t.stride(0) for t in rows),
        dtype,
        dtype if residual is None else DTYPE[residual.dtype],
        DTYPE[dy.dtype],
        dtype if weight is None else DTYPE[weight.dtype],
        dtype if dbias is None else DTYPE[dbias.dtype],
        kind,
        eps,
        dropout_p,
        torch.get_num_threads(),
    )


def why_not_gradient(needs: frozenset[str], *tensors: Any, **options: Any) -> None:
    """Whatever the forward takes."""


GRADIENTS = {
    "layer_norm": Gradient(layer_norm_forward, layer_norm_backward, why_not_gradient),
    "rms_norm": Gradient(rms_norm_forward, rms_norm_backward, why_not_gradient),
}


# ---- layouts ------------------------------------------------------------------------------------


def contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def rows_of(t: Tensor) -> Tensor:
    """t as [rows, D] with unit stride in D: a view where its strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def in_order_of(like: Tensor, t: Tensor) -> Tensor:
    """t in the memory order that torch.empty_like(like) has, which compiled graphs count on."""
    out = torch.empty_like(like, dtype=t.dtype)
    return t if out.is_contiguous() else out.copy_(t)
