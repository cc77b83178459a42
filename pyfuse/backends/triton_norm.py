"""LayerNorm and RMSNorm by the Triton kernels, forward. What they take and give is in gpu_norm."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.gpu_norm import Inputs, Statistics, dense, rows_of
from pyfuse.backends.triton_device import dropout_words, kernels


def write(
    given: Inputs, eps: float, y: Tensor | None, z: Tensor | None, statistics: Statistics
) -> None:
    """Write those results that are not None."""
    casting, x, weight, bias, residual, p, seed = given
    d = x.shape[-1]
    count = x.numel() // d
    device = triton_device.of(x)
    size = widest(x, residual, y)
    (source, x_stride), (added, r_stride) = rows_of(x), rows_of(residual)
    align = gcd(16, x_stride, r_stride)
    bare = given.alias
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
        args = (source, added, dense(weight), dense(bias), y, z, *statistics, *rest)
    else:
        module = kernels("rms_norm")
        kernel = module.rms_norm_wide_kernel if plan.wide else module.rms_norm_kernel
        args = (source, added, dense(weight), y, z, statistics[1], *rest)
    device.launch(kernel, (plan.programs(count),), args, plan.options)


def widest(*tensors: Tensor | None) -> int:
    """Bytes of an element of the widest; 1 if there is none."""
    widest = 1
    for t in tensors:
        if t is not None and t.element_size() > widest:
            widest = t.element_size()
    return widest
