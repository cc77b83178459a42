"""The gradients of LayerNorm and RMSNorm by the Triton kernels."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.gpu_norm import Flow, Inputs, Statistics, dense, rows_of
from pyfuse.backends.triton_device import dropout_words, kernels
from pyfuse.backends.triton_norm import widest


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


def write_gradients(given: Inputs, flow: Flow, out: dict[str, Tensor]) -> None:
    """Write the tensors of out."""
    casting, x, weight, _, residual, p, seed = flow.source(given)
    dy, dz, (mean, rstd), z = flow
    d, size, device = x.shape[-1], widest(x, residual, dy, dz), triton_device.of(x)
    bare, drop = p == 0.0 and residual is None and dz is None, p != 0.0 and z is None
    count = x.numel() // d
    rows, strides = zip(*map(rows_of, (x, residual, dy, dz)), strict=True)
    words = dropout_words(p, seed)
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
