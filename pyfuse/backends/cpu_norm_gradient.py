"""Launcher of csrc/cpu/norm_gradient.cpp: the gradients of layer_norm and rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cpu_norm
from pyfuse.backends.cpu_module import DTYPE, module
from pyfuse.backends.cpu_norm import LAYER, RMS, Result, contiguous, rows_of

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
    out = {
        name: torch.empty(named[name].shape, dtype=named[name].dtype)
        for name in (needs - {"residual"} if shared else needs)
    }
    dy, dz = grads if len(grads) == 2 else (*grads, None)
    if dy is None:
        dy = torch.zeros(x.shape, dtype=cpu_norm.result_dtype(kind, x, weight))
    rows = (None, None, saved[0], dy, dz) if saved else (x, residual, None, dy, dz)
    _launch(kind, tensors, [None if t is None else rows_of(t) for t in rows], options, out)
    if shared:
        out["residual"] = out["x"]
    return out


def _launch(
    kind: int,
    tensors: tuple[Any, ...],
    rows: list[Any],
    options: dict[str, Any],
    out: dict[str, Tensor],
) -> None:
    """rows: x, residual, z, dy and dz as [rows, D] with unit stride in D, those that are read; out: contiguous."""
    x, weight, bias = tensors
    residual, p = options["residual"], options["dropout_p"]
    weight = contiguous(weight)
    dy = rows[3]
    dtype = DTYPE[x.dtype]
    module().norm_gradient(
        *(_address(t) for t in rows),
        _address(weight),
        0 if p == 0.0 else options["dropout_seed"].data_ptr(),
        *(_address(out.get(name)) for name in ("x", "residual", "weight", "bias")),
        dy.shape[0],
        dy.shape[1],
        tuple([0 if t is None else t.stride(0) for t in rows]),
        dtype,
        dtype if residual is None else DTYPE[residual.dtype],
        DTYPE[dy.dtype],
        dtype if weight is None else DTYPE[weight.dtype],
        dtype if bias is None else DTYPE[bias.dtype],
        kind,
        options["eps"],
        p,
        torch.get_num_threads(),
    )


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
