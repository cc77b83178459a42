"""pyfuse._C, the compiled module: whether it is there, and what its launchers have in common."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch  # first: pyfuse._C then shares the libgomp that torch has loaded
from torch import Tensor

NOT_BUILT = (
    "pyfuse._C is not built (pyfuse was installed without a C++17 compiler): "
    "install g++ or clang++ and install pyfuse again"
)

_C: Any = None
try:
    from pyfuse import _C as _compiled

    _C = _compiled
except ImportError as error:  # absent is an answer; anything else that went wrong is not
    if not (error.name in ("pyfuse", "pyfuse._C") and "cannot import name '_C'" in str(error)):
        raise

# The numbers of pyfuse::DType (csrc/include/pyfuse/params.h).
DTYPE: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}
# Those of pyfuse::Activation.
ACTIVATION: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


def why_unavailable() -> str | None:
    return NOT_BUILT if _C is None else None


def module() -> ModuleType:
    if _C is None:
        raise ImportError(NOT_BUILT, name="pyfuse._C")
    return _C


def isa() -> str:
    """The instruction set that the kernels use; ValueError if PYFUSE_ISA names none of this machine's."""
    name: str = module().isa()
    return name


def available_isas() -> list[str]:
    """The instruction sets that this build carries and this CPU runs, best first."""
    names: list[str] = module().available_isas()
    return names


def select_isa(name: str) -> None:
    """Use this instruction set from now on, in the whole process (tests and comparisons)."""
    module().select_isa(name)


def why_not_on_cpu(*tensors: torch.Tensor | None) -> str | None:
    """The objection that every kernel here has to tensors on another device."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"tensors are on {t.device}, not on the CPU"
    return None


def rows_of(t: Tensor) -> Tensor:
    """t as [rows, D] with unit stride in D: a view where its strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def in_order_of(like: Tensor, t: Tensor) -> Tensor:
    """t in the memory order that torch.empty_like(like) has, which compiled graphs count on."""
    out = torch.empty_like(like, dtype=t.dtype)
    return t if out.is_contiguous() else out.copy_(t)
