"""Which GPU backend goes first where both can run: the CUDA kernels do, but for what this table names.

Of Hopper the table is what an H100 measured (docs/h100.md). Of other GPUs the reasons are properties of the compiled
code: the tensor cores it uses, its instructions. `use_backend("triton")` or ``backend=`` overrules the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPTIONS = ("mask", "softcap", "alibi_slopes", "dropout_seed")


class Rule(NamedTuple):
    """Triton first for these operations where `when(arch, q, d, gradient, options)`; d: the larger head size."""

    operations: tuple[str, ...]
    when: Callable[[int, Tensor, int, bool, dict[str, Any]], bool]
    reason: str


ATTENTION = ("attention", "varlen_attention")
RULES = (
    Rule(
        ATTENTION,
        lambda arch, q, d, gradient, options: arch in (100, 103) and q.dtype != torch.float32,
        "on this GPU Triton multiplies by tcgen05, these kernels by mma.sync at a part of that rate",
    ),
    Rule(
        ATTENTION,
        lambda arch, q, d, gradient, options: (
            arch == 90 and q.dtype != torch.float32 and (gradient or not 32 < d <= 128)
        ),
        "on this GPU Triton multiplies by wgmma, these kernels, but for the forward of head sizes from 33 to 128, by "
        "mma.sync at about half that rate",
    ),
    Rule(
        ATTENTION,
        lambda arch, q, d, gradient, options: arch == 90 and q.dtype == torch.float32 and d <= 128,
        "on this GPU Triton's six products in bfloat16 by wgmma take about 0.6 of the time of these kernels' three in "
        "tf32 by mma.sync",
    ),
    Rule(
        ATTENTION,
        lambda arch, q, d, gradient, options: any(
            options.get(name) is not None for name in OPTIONS
        ),
        "Triton compiles the loop for just these options, these kernels look at each when they run",
    ),
)


def triton_first(
    operation: str, arch: int, q: Tensor, v: Tensor, gradient: bool, options: dict[str, Any]
) -> str | None:
    """Why Triton's kernels should be asked first; None if there is no reason."""
    d = max(q.shape[-1], v.shape[-1])
    for rule in RULES:
        if operation in rule.operations and rule.when(arch, q, d, gradient, options):
            return rule.reason
    return None
