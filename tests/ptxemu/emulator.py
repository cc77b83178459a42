"""Load PTX and launch its kernels on ordinary CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from . import arguments
from .arguments import Argument, sizes
from .build import load_extension
from .report import Report, make_report
from .tensor_map import TensorMap

_native = load_extension()
PtxError: type[ValueError] = _native.PtxError

# A launch that executes more is taken for one that never ends.
MAX_INSTRUCTIONS = 500_000_000
# Bytes of a storage up to which those that no argument covers are made inaccessible.
_HOLES_UP_TO = 1 << 26


def load(ptx: str) -> Module:
    """Parse and decode; raises PtxError with the PTX line for whatever the emulator does not know."""
    return Module(ptx)


class Module:
    """Loaded PTX. Its global variables live as long as it does."""

    def __init__(self, ptx: str) -> None:
        self._module = _native.Module(ptx)
        self.entries: dict[str, Any] = self._module.entries()
        self.target: str = self._module.target

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
        max_instructions: int = MAX_INSTRUCTIONS,
        names: Mapping[int, str] | None = None,
    ) -> Report:
        """Run a kernel (the only one, if `entry` is not named) to its end.

        grid, block, cluster: up to three sizes. args: tensors and arrays become pointers to their memory, which is used
        in place; ints and floats are packed as the parameter's type; bytes, `Struct` and `TensorMap` fill struct
        parameters. shared: bytes of dynamic shared memory. seed: decides the order of blocks, warps and atomics.
        names: what findings call the tensor at an index of args (default: arg0, arg1, …).
        """
        entry = self.entry_named(entry)
        memory = _Memory(self._module)
        for index, value in enumerate(
            args
        ):  # all of a storage's views are known before any holes are marked
            memory.register(value, (names or {}).get(index, f"arg{index}"))
        memory.mark()
        params = memory.pack(entry, self.entries[entry]["params"], args)
        raw = self._module.launch(
            memory.native, entry, sizes(grid, "grid"), sizes(block, "block"), sizes(cluster, "cluster"),
            params, shared, seed, max_instructions,
        )  # fmt: skip
        return make_report(raw, self.target)

    def entry_named(self, entry: str | None) -> str:
        """The kernel's name, checked; without one, that of the only kernel."""
        if entry is None:
            if len(self.entries) != 1:
                raise ValueError(f"entry: the module has {sorted(self.entries)}, name one")
            return str(next(iter(self.entries)))
        if entry not in self.entries:
            raise ValueError(
                f"entry: {entry!r} is not in the module, which has {sorted(self.entries)}"
            )
        return entry

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a global variable, shared with the module."""
        pointer, size = self._module.variable(name)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


@cache
def load_once(ptx: str) -> Module:
    """`load`, remembered by text. Its global variables are shared, too."""
    return load(ptx)


class _Memory(arguments.Memory):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.native = module.new_memory()

    def place(self, tensor: torch.Tensor, name: str) -> int:
        storage = tensor.untyped_storage()
        return int(self.native.add(storage.data_ptr(), storage.nbytes(), name))

    def encode_map(self, value: TensorMap) -> bytes:
        return value.encode(self.address(value.tensor))

    def mark(self) -> None:
        """Bytes that no argument gives access to, and those that count as never written."""
        for storage in self.storages.values():
            covered = sum(view.numel() * view.element_size() for view in storage.views)
            if covered < storage.size <= _HOLES_UP_TO:
                flags = np.full(storage.size, _native.HOLE, np.uint8)
                for view in storage.views:
                    _bytes_of_view(flags, view)[...] = 0
                self._mark(storage.address, flags)
            for output in storage.outputs:
                flags = np.zeros(storage.size, np.uint8)
                _bytes_of_view(flags, output)[...] = _native.UNDEFINED
                self._mark(storage.address, flags)

    def _mark(self, address: int, flags: np.ndarray) -> None:
        """Run by run: the flags of a strided view are mostly long runs."""
        edges = np.flatnonzero(np.diff(flags)) + 1
        starts, ends = np.r_[0, edges], np.r_[edges, len(flags)]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if flags[start]:
                self.native.mark(address + start, end - start, int(flags[start]))


def _bytes_of_view(storage: np.ndarray, view: torch.Tensor) -> np.ndarray:
    """The bytes of a storage that a view's elements are made of, as an array of shape [*view.shape, itemsize]."""
    size = view.element_size()
    if view.numel() == 0:
        return storage[:0]
    return np.lib.stride_tricks.as_strided(
        storage[view.storage_offset() * size :],
        (*view.shape, size),
        (*(s * size for s in view.stride()), 1),
    )
