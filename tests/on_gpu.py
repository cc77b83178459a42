"""The same tests on a real GPU: CPU tensors are copied there before a launch and back after it. What launches is what
users' launches go through, Triton's own cache and specialisation, pyfuse._cuda and its fatbins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device, triton_device


class Copies:
    """Device copies of whole storages, so that tensors which share memory still do."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The same view of the copy."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[start] = host, host.cuda()
        whole = torch.empty(0, dtype=tensor.dtype, device="cuda")
        return whole.set_(
            self._storages[start][1].untyped_storage(),
            tensor.storage_offset(),
            tensor.size(),
            tensor.stride(),
        )

    def moved(self, value: Any) -> Any:
        """Arguments with tensors replaced by their copies, and addresses of their memory by the copies' addresses."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, tuple):
            return tuple(map(self.moved, value))
        if isinstance(value, int) and not isinstance(value, bool):
            for start, (host, device) in self._storages.items():
                if start <= value < start + host.numel():
                    return device.data_ptr() + value - start
        return value

    def back(self) -> None:
        torch.cuda.synchronize()
        for host, device in self._storages.values():
            host.copy_(device)


class TritonOnGpu:
    """What pyfuse.backends.triton_device can launch on: torch's GPU, for CPU tensors."""

    def __init__(self) -> None:
        self.gpu = triton_device.Gpu(torch.cuda.current_device())
        self.arch, self.name = self.gpu.arch, self.gpu.name
        self.multiprocessors = self.gpu.multiprocessors

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        copies = Copies()
        self.gpu.launch(kernel, grid, tuple(map(copies.moved, args)), options)
        copies.back()

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        return self.gpu.time(launch, tiles)


class CudaOnGpu:
    """What pyfuse.backends.cuda_device can call: torch's GPU, for CPU tensors."""

    def __init__(self) -> None:
        self.gpu = cuda_device.Gpu(torch.cuda.current_device())
        self.arch, self.multiprocessors = self.gpu.arch, self.gpu.multiprocessors

    def call(self, name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> None:
        copies = Copies()
        for tensor in _filled(tensors):
            copies.of(tensor)
        self.gpu.call(name, copies.moved(arguments), [])
        copies.back()


def _filled(tensors: Iterable[Tensor | None]) -> Iterable[Tensor]:
    return (t for t in tensors if t is not None and t.numel())
