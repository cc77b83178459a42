"""GPU kernels, Triton's and CUDA's, on CPU tensors: an emulated GPU takes the place of the device, every launch
checked for faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from on_gpu import CudaOnGpu, TritonOnGpu
from ptxemu import Packed, Report, TensorMap, nvcc_run, triton_run
from ptxemu.gpu import Emulator, Gpu
from torch import Tensor

from pyfuse import dispatch
from pyfuse.backends import cuda_device, triton_device

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# (address, dtype, sizes, strides, rows of a box) of a tensor map.
Map = tuple[int, int, list[int], list[int], int]


class GpuOfCpuTensors:
    """What pyfuse.backends.triton_device can launch on: the emulator.

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


class CudaOfCpuTensors:
    """What pyfuse.backends.cuda_device can call: pyfuse._cuda prepares the launches, which then run here."""

    multiprocessors = 108

    def __init__(self, gpu: Gpu, sources: Path = SOURCES, check: bool = True) -> None:
        """sources: the folder of the kernels; check: a launch with findings raises."""
        self.arch, self.gpu = gpu.arch, gpu
        self.sources, self.check = sources, check
        self.reports: list[Report] = []
        self.units: list[str] = []
        self.orders = count()

    def call(self, name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> None:
        module = cuda_device.module()

        def launch(
            unit: str, entry: str, grid: list[int], threads: int, shared: int, cluster: int, params: bytes,
            maps: list[Map],
        ) -> None:  # fmt: skip
            source, options, _ = module.units()[unit]
            self.units.append(unit)
            report = nvcc_run.launch(
                self.sources / Path(source).name, entry, grid, threads, Packed(params, tensors),
                *(tensor_map(map_, tensors) for map_ in maps), gpu=self.gpu, shared=shared, seed=next(self.orders),
                cluster=cluster, flags=options.split(), check=self.check,
            )  # fmt: skip
            self.reports.append(report)

        module.redirect(launch)
        try:
            getattr(module, name)((self.arch, self.multiprocessors, 0), arguments)
        finally:
            module.redirect(None)


def tensor_map(described: Map, tensors: Sequence[Tensor | None]) -> TensorMap:
    """As csrc/cuda/launch.h has it, of one of the call's tensors."""
    address, dtype, sizes, strides, rows = described
    start = next(t for t in tensors if t is not None and t.data_ptr() == address)
    if cuda_device.DTYPE[start.dtype] != dtype:
        raise ValueError(f"tensor map: of dtype {dtype}, the tensor is {start.dtype}")
    view = start.as_strided(sizes, (*strides, 1))
    return TensorMap(view, (1, 1, rows, 128 // start.element_size()), "128B")


@contextmanager
def standing_in(arch: int, device: str = "emulator", backend: str = "triton") -> Iterator[Any]:
    """Within this context that backend takes CPU tensors."""
    gpu: Any
    stand_in: AbstractContextManager[None]
    if backend == "cuda":
        gpu = CudaOfCpuTensors(Emulator(arch)) if device == "emulator" else CudaOnGpu()
        stand_in = cuda_device.stand_in(gpu)
    else:
        gpu = GpuOfCpuTensors(Emulator(arch)) if device == "emulator" else TritonOnGpu()
        stand_in = triton_device.stand_in(gpu)
    with available(stand_in):
        yield gpu


@contextmanager
def available(stand_in: AbstractContextManager[None]) -> Iterator[None]:
    """Within a stand-in: its backend runs now, and what was known of it before is forgotten."""
    with stand_in:
        _forget_who_is_available()
        yield
    _forget_who_is_available()


def _forget_who_is_available() -> None:
    dispatch._unavailable.cache_clear()
    dispatch._offer.cache_clear()
