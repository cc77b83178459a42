"""Triton kernels on CPU tensors: an emulated GPU takes the place of the device, every launch checked for faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from ptxemu import Report, triton_run
from ptxemu.gpu import Device, Emulator, Gpu

from pyfuse import dispatch
from pyfuse.backends import triton_device


class GpuOfCpuTensors:
    """What pyfuse.backends.triton_device can launch on: the emulator, or a GPU to which tensors are copied and back.

    `reports` are those of its launches, each without findings. In the emulator each launch has its warps and programs
    in another order: what depends on it differs between two runs.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.arch, self.gpu, self.name = gpu.arch, gpu, f"tests on {gpu}"
        self.reports: list[Report] = []
        self.orders = count()

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        order = next(self.orders)
        report = triton_run.launch(kernel, grid, *args, gpu=self.gpu, seed=order, **options)
        self.reports.append(report)

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        """Executed instructions; as on a GPU, None where the kernel asks for more shared memory than there is."""
        before = len(self.reports)
        try:
            launch(tiles)
        except ValueError as error:
            if "shared memory" in str(error):
                return None
            raise
        return float(sum(report.instructions for report in self.reports[before:]))


@contextmanager
def standing_in(arch: int, device: str = "emulator") -> Iterator[GpuOfCpuTensors]:
    """Within this context the backend "triton" takes CPU tensors."""
    gpu = GpuOfCpuTensors(Emulator(arch) if device == "emulator" else Device())
    with triton_device.stand_in(gpu):
        _forget_who_is_available()
        yield gpu
    _forget_who_is_available()


def _forget_who_is_available() -> None:
    dispatch._unavailable.cache_clear()
    dispatch._offer.cache_clear()
