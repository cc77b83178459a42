"""Where Triton kernels run: which device a tensor's kernels run on, and one launch there.

A launch is ``device.launch(kernel, grid, args, options)``: args are the kernel's run-time arguments in order, options
its constexpr arguments and Triton's own (num_warps, num_stages, ...). Kernels are compiled for a device's `arch`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from pyfuse.backends.gpu_dropout import Words, words

# Compute capability, 90 for sm_90; on AMD's GPUs the name of the instruction set, "gfx942".
Arch = int | str
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Device(Protocol):
    @property
    def arch(self) -> Arch: ...

    @property
    def name(self) -> str: ...

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Start the kernel; every size of grid is at least 1."""

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        """What launch(tiles) costs, to compare with others; None if there is no room for these tiles."""


class Gpu:
    """One of the GPUs that torch sees."""

    def __init__(self, index: int) -> None:
        self.index = index
        properties = torch.cuda.get_device_properties(index)
        self.name: str = properties.name
        if torch.version.hip:
            self.arch: Arch = properties.gcnArchName.partition(":")[0]
        else:
            self.arch = 10 * properties.major + properties.minor
        self.multiprocessors: int = properties.multi_processor_count

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if not _prepared.get():
            _prepare_triton()
        if torch.cuda.current_device() == self.index:
            kernel[grid](*args, **options)
            return
        with torch.cuda.device(self.index):
            kernel[grid](*args, **options)

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        """Milliseconds, the median of several runs."""
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        with torch.cuda.device(self.index):
            try:
                return float(do_bench(lambda: launch(tiles), return_mode="median"))
            except OutOfResources:
                return None


# Triton keeps its allocator in a context variable: a new thread has none.
_prepared: ContextVar[bool] = ContextVar("_prepared", default=False)


def _prepare_triton() -> None:
    """Once for each context: memory for tensor descriptors; and, once in all, word of what is compiled."""
    import triton

    from pyfuse.backends.triton_compiling import announce

    triton.set_allocator(_scratch)
    _prepared.set(True)
    announce()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory that generated code works in, from torch's allocator: it is kept while the stream may use it, and belongs
    to the pool of a CUDA graph that is being captured. torch aligns to 512 bytes."""
    assert alignment <= 512, alignment
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Interpreter:
    """Triton's interpreter in Python, on CPU tensors: for editing kernels (TRITON_INTERPRET=1), slow, and wrong for
    bfloat16, which it is not given."""

    arch = "interpreter"
    name = "Triton's interpreter"

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        constants = {n: x for n, x in options.items() if n != "enable_fp_fusion"}
        kernel[grid](*args, **constants)

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        raise RuntimeError("PYFUSE_AUTOTUNE: Triton's interpreter has no times worth comparing")


_gpu = cache(Gpu)
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_stand_in: Device | None = Interpreter() if _interpreted else None


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
    if _interpreted and t.dtype == torch.bfloat16:
        return f"{name} is {t.dtype}, which Triton's interpreter computes wrongly"
    return None


@cache
def kernels(name: str) -> ModuleType:
    """pyfuse.kernels.<name>, imported when first needed: with it comes Triton."""
    return importlib.import_module(f"pyfuse.kernels.{name}")


DropoutWords = Words | tuple[None, None, None, None]


def dropout_words(p: float, seed: Tensor | None) -> DropoutWords:
    """Those of the key signed, and None for no dropout.

    They go apart into a kernel's arguments: of a tuple's elements Triton compiles those that are 1 as constants."""
    found = words(p, seed)
    if found is None:
        return None, None, None, None
    low, high = ((word ^ 0x80000000) - 0x80000000 for word in found[:2])
    return low, high, *found[2:]
