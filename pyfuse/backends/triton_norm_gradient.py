"""The gradients of layer_norm and rms_norm by the Triton kernels."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import triton_device, triton_norm
from pyfuse.backends.triton_device import dropout_words, kernels
from pyfuse.backends.triton_norm import Result, Statistics, dense, rows_of, widest

Saved = tuple[Tensor | None, ...]  # mean, rstd and z: None for RMSNorm, and where z is no result
Grads = tuple[Tensor | None, ...]


def layer_norm_forward(*tensors: Any, **options: Any) -> tuple[Result, Saved]:
    return _forward(None, tensors, options)


def rms_norm_forward(*tensors: Any, **options: Any) -> tuple[Result, Saved]:
    return _forward(options["casting"], (*tensors, None), options)


def _forward(
    casting: str | None, tensors: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Result, Saved]:
    x, weight, bias = tensors
    statistics = _statistics(casting, x)
    result = triton_norm.norm(
        casting,
        x,
        weight,
        bias,
        options["eps"],
        options["residual"],
        options["prenorm"],
        options["dropout_p"],
        options["dropout_seed"],
        statistics,
    )
    return result, (*statistics, None if isinstance(result, Tensor) else result[1])


def _statistics(casting: str | None, x: Tensor) -> Statistics:
    """mean and rstd, to be written."""
    rows = x.numel() // x.shape[-1]
    rstd = x.new_empty(rows, dtype=torch.float32)
    return (torch.empty_like(rstd) if casting is None else None), rstd


def restore_layer_norm(
    results: tuple[Tensor, ...], tensors: tuple[Any, ...], options: dict[str, Any]
) -> Saved:
    return _restore(None, results, tensors, options)


def restore_rms_norm(
    results: tuple[Tensor, ...], tensors: tuple[Any, ...], options: dict[str, Any]
) -> Saved:
    return _restore(options["casting"], results, tensors, options)


def _restore(
    casting: str | None,
    results: tuple[Tensor, ...],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
) -> Saved:
    """The statistics are those of z, where this is a result; else of what it is made of. One reads it again."""
    x, residual, p, seed = (
        tensors[0], options["residual"], options["dropout_p"], options["dropout_seed"]
    )  # fmt: skip
    z = results[1] if len(results) == 2 else None
    if z is not None:
        x, residual, p, seed = z, None, 0.0, None
    statistics = _statistics(casting, x)
    eps = options["eps"]
    triton_norm.write_norm(casting, x, residual, None, None, None, None, statistics, eps, p, seed)
    return (*statistics, z)


def why_not(needs: frozenset[str], *tensors: Any, **options: Any) -> str | None:
    return None  # whatever the forward takes


def layer_norm_backward(
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return _backward(None, grads, tensors, options, saved, needs)


def rms_norm_backward(
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return _backward(options["casting"], grads, (*tensors, None), options, saved, needs)


def _backward(
    casting: str | None,
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
    fill = torch.zeros_like if x.numel() == 0 else torch.empty_like
    out = {
        name: fill(named[name], memory_format=torch.contiguous_format)
        for name in (needs - {"residual"} if shared else needs)
    }
    if x.numel() > 0:
        _write(casting, grads, tensors, options, saved, out)
    if shared:
        out["residual"] = out["x"]
    return out


class _Call(NamedTuple):
    """What the kernels of one backward pass share."""

    device: triton_device.Device
    casting: str | None
    rows: tuple[Any, ...]  # x (or z), residual, dy and dz, as [rows, D]
    strides: tuple[int, ...]  # of their rows
    statistics: Statistics
    height: int  # how many rows
    dropout: triton_device.DropoutWords

    def scalars(self, inputs: int, unit: int, *sizes: int) -> tuple[Any, ...]:
        """Strides of so many inputs, sizes, dropout."""
        return (*[stride // unit for stride in self.strides[:inputs]], *sizes, *self.dropout)

    def launch(
        self,
        plan: Any,
        weight: Tensor | None,
        dx: Tensor | None,
        dresidual: Tensor | None,
        *sums: Any,
    ) -> None:
        """The kernel that goes through the rows; sums: for dweight and dbias."""
        x, residual, dy, dz = self.rows
        mean, rstd = self.statistics
        sizes = (self.height, x.shape[-1]) if plan.wide else (self.height,)
        rest = self.scalars(4, plan.unit, *sizes)
        args: tuple[Any, ...]
        if self.casting is None:
            module = kernels("layer_norm")
            once, wide = module.layer_norm_backward_kernel, module.layer_norm_wide_backward_kernel
            args = (x, residual, weight, dy, dz, mean, rstd, dx, dresidual, *sums, *rest)
        else:
            module = kernels("rms_norm")
            once, wide = module.rms_norm_backward_kernel, module.rms_norm_wide_backward_kernel
            args = (x, residual, weight, dy, dz, rstd, dx, dresidual, *sums[:1], *rest)
        kernel = wide if plan.wide else once
        self.device.launch(kernel, (plan.programs(self.height),), args, plan.options)


def _write(
    casting: str | None,
    grads: Grads,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    saved: Saved,
    out: dict[str, Tensor],
) -> None:
    """Write the tensors of out, which are contiguous."""
    x, weight, _ = tensors
    mean, rstd, z = saved
    residual, p = options["residual"], options["dropout_p"]
    if z is not None:
        x, residual = z, None
    dy, dz = grads if len(grads) == 2 else (*grads, None)
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    d, size, device = x.shape[-1], widest(x, residual, dy, dz), triton_device.of(x)
    bare, drop = p == 0.0 and residual is None and dz is None, p != 0.0 and z is None
    count = x.numel() // d
    rows, strides = zip(*map(rows_of, (x, residual, dy, dz)), strict=True)
    words = dropout_words(p, options["dropout_seed"])
    call = _Call(device, casting, rows, strides, (mean, rstd), count, words)

    configs, row = kernels("norm_configs"), kernels("norm_row")
    align, arch = gcd(16, *strides), device.arch
    plan = configs.backward(d, align, size, widest(weight), arch, casting, bare, p != 0.0, drop)
    sums_plan = configs.parameter_sums(d, align, size, arch, drop) if plan.wide else plan
    programs = sums_plan.programs(count)
    dx, dresidual, dweight, dbias = [out.get(n) for n in ("x", "residual", "weight", "bias")]
    sums = [
        None if t is None else t.new_empty((programs, d), dtype=torch.float32)
        for t in (dweight, dbias)
    ]
    if not plan.wide:
        call.launch(plan, dense(weight), dx, dresidual, *sums)
    elif dx is not None or dresidual is not None:
        call.launch(plan, dense(weight), dx, dresidual)
    if dweight is None and dbias is None:
        return
    if plan.wide:
        args = (*rows[:3], mean, rstd, *sums, *call.scalars(3, sums_plan.unit, count))
        grid = (programs, -(-d // configs.SUM_COLUMNS))
        device.launch(row.parameter_sums_kernel, grid, args, sums_plan.options)
    added = configs.add_programs(d, arch)
    args = (*sums, dweight, dbias, programs)
    device.launch(row.add_programs_kernel, (added.most,), args, added.options)
