"""Launcher of csrc/cpu/norm_gradient.cpp: the gradients of layer_norm and rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cpu_norm
from pyfuse.backends.cpu_module import DTYPE, module, rows_of
from pyfuse.backends.cpu_norm import LAYER, RMS, Result

Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]


def layer_norm_forward(*tensors: Any, **options: Any) -> tuple[Result, Saved]:
    result = cpu_norm.layer_norm(*tensors, **options)
    return result, _saved(result)


def rms_norm_forward(*tensors: Any, **options: Any) -> tuple[Result, Saved]:
    result = cpu_norm.rms_norm(*tensors, **options)
    return result, _saved(result)


def _saved(result: Result) -> Saved:
    """z, where it is a result. Else nothing: x and residual are kept in any case, and z made again from them."""
    return () if isinstance(result, Tensor) else result[1:]


def restore(results: tuple[Tensor, ...], *_: Any) -> Saved:
    return results[1:]


def why_not(needs: frozenset[str], *tensors: Any, **options: Any) -> str | None:
    return None  # whatever the forward takes


def layer_norm_backward(
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return _backward(LAYER, grads, tensors, options, saved, needs)


def rms_norm_backward(
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return _backward(RMS[options["casting"]], grads, (*tensors, None), options, saved, needs)


def _backward(
    kind: int,
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    x, weight, bias = tensors
    residual = options["residual"]
    # Without dropout both have the same gradient, as the operands of x + residual do: written once.
    shared = (
        {"x", "residual"} <= needs and options["dropout_p"] == 0.0 and residual.dtype is x.dtype
    )
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    out = {name: _empty(named[name]) for name in (needs - {"residual"} if shared else needs)}
    dy, dz = grads if len(grads) == 2 else (*grads, None)
    if dy is None:
        dy = torch.zeros(x.shape, dtype=_result_dtype(kind, x, weight))
    rows = (None, None, saved[0], dy, dz) if saved else (x, residual, None, dy, dz)
    _launch(kind, tensors, [_rows(t) for t in rows], options, out)
    if shared:
        out["residual"] = out["x"]
    return out


def _empty(t: Tensor) -> Tensor:
    return torch.empty_like(t) if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype)


def _result_dtype(kind: int, x: Tensor, weight: Tensor | None) -> torch.dtype:
    return cpu_norm.llama_dtype(x, weight) if kind == cpu_norm.LLAMA else x.dtype


def _rows(t: Tensor | None) -> tuple[Tensor | None, int]:
    """(t, the stride of its rows), copied if these have no common stride or are not dense."""
    if t is None:
        return None, 0
    if not t.is_contiguous():
        t = rows_of(t)
        return t, t.stride(0)
    return t, t.shape[-1]


def _launch(
    kind: int,
    tensors: tuple[Any, ...],
    rows: list[tuple[Tensor | None, int]],
    options: dict[str, Any],
    out: dict[str, Tensor],
) -> None:
    """rows: x, residual, z, dy and dz, those that are read, each with its stride; out: contiguous."""
    x, weight, bias = tensors
    residual, p = options["residual"], options["dropout_p"]
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    d = x.shape[-1]
    dtype = DTYPE[x.dtype]
    addresses, strides = [], []
    for t, stride in rows:
        addresses.append(0 if t is None else t.data_ptr())
        strides.append(stride)
    for name in ("x", "residual", "weight", "bias"):
        t = out.get(name)
        addresses.append(0 if t is None else t.data_ptr())
    module().norm_gradient(
        *addresses,
        0 if weight is None else weight.data_ptr(),
        0 if p == 0.0 else options["dropout_seed"].data_ptr(),
        x.numel() // d,
        d,
        tuple(strides),
        dtype,
        dtype if residual is None else DTYPE[residual.dtype],
        DTYPE[_result_dtype(kind, x, weight)],
        dtype if weight is None else DTYPE[weight.dtype],
        dtype if bias is None else DTYPE[bias.dtype],
        kind,
        options["eps"],
        p,
        torch.get_num_threads(),
    )
