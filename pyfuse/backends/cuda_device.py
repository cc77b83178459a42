"""Where the CUDA kernels run: pyfuse._cuda, and which GPU a tensor's kernels run on.

A call is ``device.call(name, arguments, tensors)``: pyfuse._cuda's function of that name, its arguments as
csrc/api reads them, and all tensors whose memory it is told of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from pyfuse.backends.gpu_dropout import Words, words

NOT_BUILT = (
    "pyfuse._cuda is not built (nvcc was not found when pyfuse was installed): install the CUDA toolkit, 12.8 or "
    "later, and install pyfuse again; PYFUSE_CUDA=on then says what is missing"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numbers of pyfuse::DType (csrc/include/pyfuse/params.h).
DTYPE = {dtype: number for number, dtype in enumerate(DTYPES)}

_cuda: Any = None
try:
    from pyfuse import _cuda as _compiled

    _cuda = _compiled
except ImportError as error:  # absent is an answer; anything else that went wrong is not
    if not (
        error.name in ("pyfuse", "pyfuse._cuda") and "cannot import name '_cuda'" in str(error)
    ):
        raise


class Device(Protocol):
    @property
    def arch(self) -> int:
        """Compute capability, 90 for sm_90."""

    @property
    def multiprocessors(self) -> int: ...

    def call(
        self, name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor | None]
    ) -> None: ...


class Gpu:
    """One of the GPUs that torch sees."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.arch: int = 10 * properties.major + properties.minor
        self.multiprocessors: int = properties.multi_processor_count

    def call(self, name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> None:
        """On torch's current stream of this GPU."""
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        on = (self.arch, self.multiprocessors, stream)
        if torch.cuda.current_device() == self.index:
            getattr(_cuda, name)(on, arguments)
            return
        with torch.cuda.device(self.index):
            getattr(_cuda, name)(on, arguments)


_gpu = cache(Gpu)
_stand_in: Device | None = None


@contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Within this context `device` takes the calls for CPU tensors: tests put an emulated GPU here."""
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


def module() -> ModuleType:
    if _cuda is None:
        raise ImportError(NOT_BUILT, name="pyfuse._cuda")
    return _cuda


def why_unavailable() -> str | None:
    if _cuda is None:
        return NOT_BUILT
    if _stand_in is not None:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip:
        return "the kernels are for NVIDIA's GPUs"
    reason: str = _cuda.why_no_gpu()
    return reason or None


def why_not(name: str, t: Tensor) -> str | None:
    """Why no kernel can take this tensor; None if one can."""
    if not t.is_cuda and (_stand_in is None or not t.is_cpu):
        return f"{name} is on {t.device}, CUDA kernels run on a GPU"
    if t.dtype not in DTYPE:
        return f"{name} is {t.dtype}; the kernels have float32, bfloat16 and float16"
    arch = of(t).arch
    if arch < 80:
        return f"the GPU is sm_{arch}, the kernels need sm_80 or later"
    return None


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def integers(t: Tensor | None) -> tuple[int, int]:
    """(address, whether of 64 bits) of int32 or int64 numbers without gaps."""
    return (0, 0) if t is None else (t.data_ptr(), int(t.dtype == torch.int64))


def dropout_words(p: float, seed: Tensor | None) -> Words:
    """As the kernels take them: a threshold of 0 keeps all."""
    return words(p, seed) or (0, 0, 0, 1.0)
