"""Where Triton kernels run: which device a tensor's kernels run on, and one launch there.

A launch is ``device.launch(kernel, grid, args, options)``: args are the kernel's run-time arguments in order, options
its constexpr arguments and Triton's own (num_warps, num_stages, ...). Kernels are compiled for a device's `arch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

# Compute capability, 90 for sm_90; on AMD's GPUs the name of the instruction set, "gfx942".
Arch = int | str
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Device(Protocol):
    @property
    def arch(self) -> Arch: ...

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Start the kernel; every size of grid is at least 1."""


class Gpu:
    """One of the GPUs that torch sees."""

    def __init__(self, index: int) -> None:
        self.index = index
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            self.arch: Arch = properties.gcnArchName.partition(":")[0]
        else:
            self.arch = 10 * properties.major + properties.minor

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if torch.cuda.current_device() == self.index:
            kernel[grid](*args, **options)
            return
        with torch.cuda.device(self.index):
            kernel[grid](*args, **options)


_gpu = cache(Gpu)
_stand_in: Device | None = None


@contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Within this context `device` runs the kernels of CPU tensors: tests put an emulated GPU here."""
    global _stand_in
    before, _stand_in = _stand_in, device
    try:
        yield
    finally:
        _stand_in = before


def of(t: Tensor) -> Device:
    """The device of a tensor that `why_not` has no objection to."""
    if t.is_cuda:
        return _gpu(t.device.index)
    assert _stand_in is not None
    return _stand_in


def why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with torch on Linux, or by pip install triton)"
    if _stand_in is None and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def why_not(name: str, t: Tensor) -> str | None:
    """Why no kernel can take this tensor; None if one can."""
    if not t.is_cuda and (_stand_in is None or not t.is_cpu):
        return f"{name} is on {t.device}, Triton's kernels run on a GPU"
    if t.dtype not in DTYPES:
        return f"{name} is {t.dtype}; the kernels have float32, bfloat16 and float16"
    return None


@cache
def kernels(name: str) -> ModuleType:
    """pyfuse.kernels.<name>, imported when first needed: with it comes Triton."""
    return importlib.import_module(f"pyfuse.kernels.{name}")
