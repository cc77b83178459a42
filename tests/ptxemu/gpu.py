"""What GPU tests run on: the emulator, or the real device where there is one. The same test body on both.

@pytest.mark.archs(80, 90)                       # default: ARCHS
def test_kernel(gpu: Gpu) -> None:
    report = triton_run.launch(kernel, grid, x, y, gpu=gpu, BLOCK=64)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from .device import DeviceModule, compute_capability
from .emulator import Module, load_once

# The compute capabilities that tests run on in the emulator.
ARCHS = (80, 89, 90, 120)


class Gpu(Protocol):
    """arch: compute capability, 90 for sm_90. emulated: whether reports hold findings and counters."""

    arch: int
    emulated: bool

    def module(self, ptx: str, cubin: Callable[[], bytes]) -> Module | DeviceModule:
        """A compiled kernel, ready to launch; loaded once for the same text."""


class Emulator:
    """Any architecture, on the CPU, with all checks."""

    emulated = True

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def __str__(self) -> str:
        return f"sm_{self.arch}"

    def module(self, ptx: str, cubin: Callable[[], bytes]) -> Module:
        return load_once(ptx)


class Device:
    """The GPU that torch sees."""

    emulated = False

    def __init__(self) -> None:
        arch = compute_capability()
        if arch is None:
            raise RuntimeError("torch sees no GPU")
        self.arch = arch

    def __str__(self) -> str:
        return f"device-sm_{self.arch}"

    def module(self, ptx: str, cubin: Callable[[], bytes]) -> DeviceModule:
        return _on_device(ptx, cubin())


@cache
def _on_device(ptx: str, cubin: bytes) -> DeviceModule:
    return DeviceModule(ptx, cubin)


def targets(archs: Sequence[int]) -> list[Gpu]:
    """The device, if there is one of these architectures, else an emulator for each of them."""
    return [Device()] if compute_capability() in archs else [Emulator(arch) for arch in archs]


def nvcc_arch(arch: int) -> str:
    """nvcc's name of an architecture, with the features that only it has (wgmma on sm_90a)."""
    return f"{arch}a" if arch in (90, 100, 120) else str(arch)
