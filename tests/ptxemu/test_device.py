"""Launches on a real device, as far as they can be tested without one: what the driver is asked for."""

from __future__ import annotations

import ctypes
import struct as packing
from typing import Any

import pytest
import torch

from ptxemu import TensorMap, gpu, struct
from ptxemu.device import CudaError, DeviceModule, _LaunchConfig


def kernel(params: str) -> str:
    """A kernel that does nothing, of these parameters."""
    return f".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry test({params})\n{{\nret;\n}}\n"


TEXT = kernel(".param .u64 p_x, .param .u32 p_n")


class FakeDriver:
    """Stands in for libcuda: keeps what it is called with; its device memory is more host memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.copies: list[torch.Tensor] = []
        self.params = b""
        self.config: Any = None
        self.cluster: list[int] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.copies.append(whole.clone())
        return self.copies[-1]

    def __call__(self, name: str, *args: Any) -> None:
        self.calls.append((name, args))
        if name == "cuModuleLoadData":
            assert args[1] == b"cubin"
        if name == "cuTensorMapEncodeTiled":
            assert args[0].value % 64 == 0
            ctypes.memmove(args[0].value, bytes(range(128)), 128)
        if name == "cuLaunchKernelEx":
            self.config = ctypes.cast(args[0], ctypes.POINTER(_LaunchConfig)).contents
            extra = list(args[3])
            assert (extra[0], extra[2], extra[4]) == (1, 2, None)
            size = ctypes.c_size_t.from_address(extra[3]).value
            self.params = ctypes.string_at(extra[1], size)
            self.cluster = list(self.config.attributes.contents.value[:3])
            for copy in self.copies:  # what the kernel would do
                copy += 1


def test_launch_asks_the_driver_for_the_same() -> None:
    driver = FakeDriver()
    module = DeviceModule(TEXT, b"cubin", driver)
    storage = torch.zeros(8, dtype=torch.uint8)
    report = module.launch("test", (2, 3), 64, [storage[4:], 7], shared=100, cluster=(2, 1, 1))
    assert report.findings == []
    assert list(driver.config.grid) == [2, 3, 1] and list(driver.config.block) == [64, 1, 1]
    assert (
        driver.config.shared == 100
        and driver.config.attribute_count == 1
        and driver.cluster == [2, 1, 1]
    )
    assert driver.params == packing.pack("<QI", driver.copies[0].data_ptr() + 4, 7)
    assert [name for name, _ in driver.calls] == [
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx", "cuCtxSynchronize",
    ]  # fmt: skip
    assert storage.tolist() == [1] * 8, "the storage is copied back, all of it"


def test_one_storage_is_one_copy() -> None:
    driver = FakeDriver()
    text = kernel(".param .align 8 .b8 p_x[24]")
    storage = torch.zeros(16, dtype=torch.uint8)
    DeviceModule(text, b"cubin", driver).launch(
        None, args=[struct("<QQi4x", storage, storage[8:], 5)]
    )
    assert len(driver.copies) == 1 and driver.config.attribute_count == 0
    base = driver.copies[0].data_ptr()
    assert driver.params == packing.pack("<QQi4x", base, base + 8, 5)


def test_tensor_maps_are_the_driver_s() -> None:
    driver = FakeDriver()
    text = kernel(".param .align 64 .b8 p_x[128]")
    tensor = torch.zeros(3, 8, 32, dtype=torch.bfloat16)
    DeviceModule(text, b"cubin", driver).launch(
        None, args=[TensorMap(tensor, (1, 4, 32), "64B", nan_fill=True)]
    )
    assert driver.params == bytes(range(128))
    call = next(args for name, args in driver.calls if name == "cuTensorMapEncodeTiled")
    _, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill = call
    assert (kind, rank, interleave, swizzle, promotion, fill) == (9, 3, 0, 2, 0, 1)
    assert address.value == driver.copies[0].data_ptr()
    assert (list(sizes), list(strides), list(box), list(steps)) == (
        [32, 8, 3],
        [64, 512],
        [32, 4, 1],
        [1, 1, 1],
    )


def test_what_fails_is_named() -> None:
    class Failing(FakeDriver):
        def __call__(self, name: str, *args: Any) -> None:
            if name == "cuModuleGetFunction":
                raise CudaError("cuModuleGetFunction: named symbol not found (500)")

    with pytest.raises(CudaError, match="named symbol"):
        DeviceModule(TEXT, b"cubin", Failing()).launch("test", args=[torch.zeros(1), 0])
    with pytest.raises(ValueError, match="entry: 'other'"):
        DeviceModule(TEXT, b"cubin", FakeDriver()).launch("other")


def test_the_fixture_takes_the_device_where_it_is_one_of_the_architectures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "compute_capability", lambda: None)
    assert [str(target) for target in gpu.targets((80, 90))] == ["sm_80", "sm_90"]
    monkeypatch.setattr(gpu, "compute_capability", lambda: 90)
    (device,) = gpu.targets((80, 90))
    assert str(device) == "device-sm_90" and not device.emulated
    assert [str(target) for target in gpu.targets((80, 120))] == ["sm_80", "sm_120"]
