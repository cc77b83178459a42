"""Load PTX and launch its kernels on ordinary CPU tensors."""

from __future__ import annotations

import ctypes
import struct as packing
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch

from .build import load_extension
from .report import Report, make_report
from .tensor_map import TensorMap

_native = load_extension()
PtxError: type[ValueError] = _native.PtxError

# A launch that executes more is taken for one that never ends.
MAX_INSTRUCTIONS = 500_000_000
# Bytes of a storage up to which those that no argument covers are made inaccessible.
_HOLES_UP_TO = 1 << 26

Argument = Union[torch.Tensor, np.ndarray, int, float, bool, bytes, "Struct", "Output", TensorMap]
_FORMATS = {
    "b8": "B", "u8": "B", "s8": "b", "b16": "H", "u16": "H", "s16": "h", "b32": "I", "u32": "I", "s32": "i",
    "b64": "Q", "u64": "Q", "s64": "q", "f32": "f", "f64": "d", "f16": "e",
}  # fmt: skip


class Struct:
    """A struct passed by value: struct.pack's format, with pointers ("Q") given as tensors."""

    def __init__(self, layout: str, *values: torch.Tensor | np.ndarray | int | float) -> None:
        self.layout, self.values = layout, values


class Output:
    """A tensor whose memory counts as never written: reading it before writing is a finding."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


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
        in place; ints and floats are packed as the parameter's type; bytes, `Struct` and
        `TensorMap` fill struct parameters.
        shared: bytes of dynamic shared memory. seed: decides the order of blocks, warps and atomics.
        names: what findings call the tensor at an index of args (default: arg0, arg1, …).
        """
        if entry is None:
            if len(self.entries) != 1:
                raise ValueError(f"entry: the module has {sorted(self.entries)}, name one")
            entry = next(iter(self.entries))
        if entry not in self.entries:
            raise ValueError(f"entry: {entry!r} is not in the module, which has {sorted(self.entries)}")
        memory = _Memory(self._module)
        for index, value in enumerate(args):  # all of a storage's views are known before any holes are marked
            memory.register(value, (names or {}).get(index, f"arg{index}"))
        memory.mark_holes()
        params = self._pack(entry, args, memory)
        raw = self._module.launch(
            memory.native, entry, _sizes(grid, "grid"), _sizes(block, "block"), _sizes(cluster, "cluster"),
            params, shared, seed, max_instructions,
        )  # fmt: skip
        return make_report(raw, self.target)

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a global variable, shared with the module."""
        pointer, size = self._module.variable(name)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def _pack(self, entry: str, args: Sequence[Argument], memory: _Memory) -> bytes:
        params = self.entries[entry]["params"]
        if len(args) != len(params):
            raise ValueError(f"args: {len(args)}, but {entry} has {len(params)} parameters")
        packed = b""
        for index, (value, (_, kind, is_array, offset, size)) in enumerate(zip(args, params, strict=True)):
            data = memory.bytes_of(value, kind, is_array, index)
            if len(data) != size:
                raise ValueError(f"args[{index}]: {len(data)} bytes, {entry} takes {size}")
            packed = packed.ljust(offset, b"\0") + data
        return packed


class _Memory:
    """The allocations of one launch: one for each storage that an argument lies in."""

    def __init__(self, module: Any) -> None:
        self.native = module.new_memory()
        self._storages: dict[int, tuple[int, int, list[torch.Tensor]]] = {}
        self._undefined: list[torch.Tensor] = []

    def register(self, value: object, name: str) -> None:
        if isinstance(value, Struct):
            for index, part in enumerate(value.values):
                self.register(part, f"{name}[{index}]")
        elif isinstance(value, Output):
            self.register(value.tensor, name)
            self._undefined.append(value.tensor)
        elif isinstance(value, TensorMap):
            self.register(value.tensor, name)
        elif isinstance(value, np.ndarray):
            self.register(torch.from_numpy(value), name)
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{name}: on {value.device}, the emulator takes CPU tensors")
            storage = value.untyped_storage()
            key = storage.data_ptr()
            if key not in self._storages:
                base = self.native.add(key, storage.nbytes(), name)
                self._storages[key] = (base, storage.nbytes(), [])
            self._storages[key][2].append(value)

    def mark_holes(self) -> None:
        for base, size, views in self._storages.values():
            covered = sum(v.numel() * v.element_size() for v in views)
            if covered < size <= _HOLES_UP_TO:
                flags = np.full(size, _native.HOLE, np.uint8)
                for view in views:
                    _bytes_of_view(flags, view)[...] = 0
                self._mark(base, flags)
        for tensor in self._undefined:
            base, size, _ = self._storages[tensor.untyped_storage().data_ptr()]
            flags = np.zeros(size, np.uint8)
            _bytes_of_view(flags, tensor)[...] = _native.UNDEFINED
            self._mark(base, flags)

    def _mark(self, base: int, flags: np.ndarray) -> None:
        """Run by run: the flags of a strided view are mostly long runs."""
        edges = np.flatnonzero(np.diff(flags)) + 1
        starts, ends = np.r_[0, edges], np.r_[edges, len(flags)]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if flags[start]:
                self.native.mark(base + start, end - start, int(flags[start]))

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return 0
        base = self._storages[storage.data_ptr()][0]
        return int(base) + tensor.data_ptr() - storage.data_ptr()

    def bytes_of(self, value: object, kind: str, is_array: bool, index: int) -> bytes:
        if isinstance(value, Output):
            value = value.tensor
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor):
            return packing.pack("<Q", self.address(value))
        if isinstance(value, bytes):
            return value
        if isinstance(value, TensorMap):
            return value.encode(self.address(value.tensor))
        if isinstance(value, Struct):
            parts = [self.address(torch.as_tensor(v)) if isinstance(v, (torch.Tensor, np.ndarray)) else v
                     for v in value.values]  # fmt: skip
            return packing.pack(value.layout, *parts)
        if is_array or kind not in _FORMATS:
            raise TypeError(f"args[{index}]: a struct parameter needs bytes or Struct, got {type(value).__name__}")
        if not isinstance(value, (int, float)):
            raise TypeError(f"args[{index}]: {type(value).__name__} is no argument")
        return _scalar(value, kind, index)


def _scalar(value: int | float, kind: str, index: int) -> bytes:
    letter = _FORMATS[kind]
    if letter in "fde":
        return packing.pack(f"<{letter}", float(value))
    if isinstance(value, float):
        raise TypeError(f"args[{index}]: {value} for a parameter of type .{kind}")
    bits = 8 * packing.calcsize(letter)
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise ValueError(f"args[{index}]: {value} does not fit .{kind}")
    return (int(value) % (1 << bits)).to_bytes(bits // 8, "little")


def _bytes_of_view(storage: np.ndarray, view: torch.Tensor) -> np.ndarray:
    """The bytes of a storage that a view's elements are made of, as an array of shape [*view.shape, itemsize]."""
    size = view.element_size()
    start = view.storage_offset() * size
    if view.numel() == 0:
        return storage[:0]
    return np.lib.stride_tricks.as_strided(
        storage[start:], (*view.shape, size), (*(s * size for s in view.stride()), 1)
    )


def _sizes(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(sizes) <= 3 or any(s < 1 for s in sizes):
        raise ValueError(f"{name}: {value}, needs one to three sizes of at least 1")
    return (*sizes, 1, 1)[:3]  # type: ignore[return-value]
