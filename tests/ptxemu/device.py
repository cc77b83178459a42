"""The same launches on a real GPU, through CUDA's driver: what the emulator is to be compared with.

Arguments are the emulator's: CPU tensors, whose storages are copied to the device before and back after a launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import arguments
from .arguments import Argument, sizes
from .emulator import load_once
from .report import Report
from .tensor_map import TensorMap

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_BUFFER_POINTER, _BUFFER_SIZE, _BUFFER_END = 1, 2, 0  # CU_LAUNCH_PARAM_*
# CUtensorMapDataType; its order is not that of tensormap.replace.
_MAP_TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.uint16: 1, torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4,
    torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
    torch.float8_e4m3fn: 0, torch.float8_e5m2: 0,
}  # fmt: skip
_MAP_SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}


class CudaError(RuntimeError):
    """A call of CUDA's driver failed."""


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 16),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


def compute_capability() -> int | None:
    """90 for sm_90; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class DeviceModule:
    """A cubin on the GPU that is current. ptx, of which it was made, tells how its parameters lie."""

    def __init__(self, ptx: str, cubin: bytes, driver: Any = None) -> None:
        self._driver = driver or _Driver()
        self._layout = load_once(ptx)
        self._handle = ctypes.c_void_p()
        self._driver("cuModuleLoadData", ctypes.byref(self._handle), cubin)

    def launch(
        self,
        entry: str | None = None,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 1,
        args: Sequence[Argument] = (),
        *,
        shared: int = 0,
        seed: int = 0,
        cluster: int | Sequence[int] = 1,
        names: Mapping[int, str] | None = None,
    ) -> Report:
        """`Module.launch` on the device, finished when it returns. The hardware has its own order (no seed)."""
        entry = self._layout.entry_named(entry)
        memory = _DeviceMemory(self._driver)
        for index, value in enumerate(args):
            memory.register(value, (names or {}).get(index, f"arg{index}"))
        params = memory.pack(entry, self._layout.entries[entry]["params"], args)
        function = ctypes.c_void_p()
        self._driver("cuModuleGetFunction", ctypes.byref(function), self._handle, entry.encode())
        if shared:
            self._driver("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        self._start(
            function,
            sizes(grid, "grid"),
            sizes(block, "block"),
            sizes(cluster, "cluster"),
            shared,
            params,
        )
        self._driver("cuCtxSynchronize")
        memory.copy_back()
        return Report([], {}, [], "", 0, self._layout.target)

    def _start(
        self, function: ctypes.c_void_p, grid: tuple[int, int, int], block: tuple[int, int, int],
        cluster: tuple[int, int, int], shared: int, params: bytes,
    ) -> None:  # fmt: skip
        attribute = _LaunchAttribute(_CLUSTER_DIMENSION)
        attribute.value[:3] = cluster
        config = _LaunchConfig(
            grid, block, shared, None, ctypes.pointer(attribute), int(cluster != (1, 1, 1))
        )
        buffer = ctypes.create_string_buffer(params, len(params))
        size = ctypes.c_size_t(len(params))
        extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER,
            ctypes.addressof(buffer),
            _BUFFER_SIZE,
            ctypes.addressof(size),
            _BUFFER_END,
        )
        self._driver("cuLaunchKernelEx", ctypes.byref(config), function, None, extra)


class _Driver:
    """Calls of libcuda that raise when they fail. The context is torch's."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context current on this thread
        self._library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's whole storage on the device, as bytes."""
        return _whole_storage(tensor).cuda()


class _DeviceMemory(arguments.Memory):
    def __init__(self, driver: Any) -> None:
        super().__init__()
        self._driver = driver
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def place(self, tensor: torch.Tensor, name: str) -> int:
        copy = self._driver.copy(tensor)
        self._copies.append((_whole_storage(tensor), copy))
        return int(copy.data_ptr())

    def copy_back(self) -> None:
        for host, device in self._copies:
            host.copy_(device)

    def encode_map(self, value: TensorMap) -> bytes:
        tensor, rank = value.tensor, value.tensor.dim()
        size = tensor.element_size()
        sizes_ = (ctypes.c_uint64 * rank)(*list(tensor.shape)[::-1])
        strides = (ctypes.c_uint64 * max(rank - 1, 1))(
            *[s * size for s in tensor.stride()[:-1]][::-1]
        )
        box = (ctypes.c_uint32 * rank)(*value.box[::-1])
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        space = ctypes.create_string_buffer(128 + 64)
        aligned = (ctypes.addressof(space) + 63) // 64 * 64  # as the driver wants it
        self._driver(
            "cuTensorMapEncodeTiled", ctypes.c_void_p(aligned), _MAP_TYPES[tensor.dtype], rank,
            ctypes.c_void_p(self.address(tensor)), sizes_, strides, box, steps, 0, _MAP_SWIZZLES[value.swizzle], 0,
            int(value.nan_fill),
        )  # fmt: skip
        return ctypes.string_at(aligned, 128)


def _whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
