"""A kernel's arguments: what tensors' memory they need, and the bytes that its parameters are."""

from __future__ import annotations

import struct as packing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import torch

from .tensor_map import TensorMap

Argument = Union[
    torch.Tensor, np.ndarray, int, float, bool, bytes, "Struct", "Packed", "Output", TensorMap
]
# A parameter as PTX declares it: name, type, whether it is an array (a struct), byte offset, bytes.
Parameter = tuple[str, str, bool, int, int]

_FORMATS = {
    "b8": "B", "u8": "B", "s8": "b", "b16": "H", "u16": "H", "s16": "h", "b32": "I", "u32": "I", "s32": "i",
    "b64": "Q", "u64": "Q", "s64": "q", "f32": "f", "f64": "d", "f16": "e",
}  # fmt: skip


class Struct:
    """A struct passed by value: struct.pack's format, with pointers ("Q") given as tensors."""

    def __init__(self, layout: str, *values: torch.Tensor | np.ndarray | int | float) -> None:
        self.layout, self.values = layout, values


class Packed:
    """A struct's bytes as host code has filled them. Every aligned word that is an address in the memory of one of
    `tensors` becomes the device's address."""

    def __init__(self, data: bytes, tensors: Sequence[torch.Tensor | None]) -> None:
        self.data = data
        self.values = [t for t in tensors if t is not None]


class Output:
    """A tensor whose memory counts as never written: reading it before writing is a finding."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass
class Storage:
    """Memory that tensors share, and what of it the arguments give access to."""

    address: int
    size: int
    views: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


class Memory(ABC):
    """Where the storages of one launch's arguments lie for the kernel; every storage is one allocation."""

    def __init__(self) -> None:
        self.storages: dict[int, Storage] = {}

    @abstractmethod
    def place(self, tensor: torch.Tensor, name: str) -> int:
        """Make the tensor's whole storage accessible; gives its address."""

    @abstractmethod
    def encode_map(self, value: TensorMap) -> bytes:
        """The 128 bytes of a tensor map."""

    def register(self, value: object, name: str) -> None:
        """Place the storages of all tensors in an argument."""
        if isinstance(value, (Struct, Packed)):
            for index, part in enumerate(value.values):
                self.register(part, f"{name}[{index}]")
        elif isinstance(value, Output):
            self.register(value.tensor, name)
            self.storages[value.tensor.untyped_storage().data_ptr()].outputs.append(value.tensor)
        elif isinstance(value, TensorMap):
            self.register(value.tensor, name)
        elif isinstance(value, np.ndarray):
            self.register(torch.from_numpy(value), name)
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{name}: on {value.device}, needs a CPU tensor")
            storage = value.untyped_storage()
            key = storage.data_ptr()
            if key not in self.storages:
                self.storages[key] = Storage(self.place(value, name), storage.nbytes())
            self.storages[key].views.append(value)

    def address(self, tensor: torch.Tensor) -> int:
        """The device address of a tensor's first element; 0 of one without memory."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return 0
        return self.storages[storage.data_ptr()].address + tensor.data_ptr() - storage.data_ptr()

    def pack(self, entry: str, params: Sequence[Parameter], args: Sequence[Argument]) -> bytes:
        """The bytes of all parameters, at their offsets."""
        if len(args) != len(params):
            raise ValueError(f"args: {len(args)}, but {entry} has {len(params)} parameters")
        packed = b""
        for index, (value, (_, kind, is_array, offset, size)) in enumerate(
            zip(args, params, strict=True)
        ):
            data = self._bytes_of(value, kind, is_array, index)
            if len(data) != size:
                raise ValueError(f"args[{index}]: {len(data)} bytes, {entry} takes {size}")
            packed = packed.ljust(offset, b"\0") + data
        return packed

    def _bytes_of(self, value: Any, kind: str, is_array: bool, index: int) -> bytes:
        if isinstance(value, Output):
            value = value.tensor
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor):
            return packing.pack("<Q", self.address(value))
        if isinstance(value, bytes):
            return value
        if isinstance(value, TensorMap):
            return self.encode_map(value)
        if isinstance(value, Packed):
            return self._relocated(value.data)
        if isinstance(value, Struct):
            parts = [self.address(torch.as_tensor(v)) if isinstance(v, (torch.Tensor, np.ndarray)) else v
                     for v in value.values]  # fmt: skip
            return packing.pack(value.layout, *parts)
        if is_array or kind not in _FORMATS:
            raise TypeError(
                f"args[{index}]: a struct parameter needs bytes or Struct, got {type(value).__name__}"
            )
        if not isinstance(value, (int, float)):
            raise TypeError(f"args[{index}]: {type(value).__name__} is no argument")
        return _scalar(value, kind, index)


    def _relocated(self, data: bytes) -> bytes:
        words = np.frombuffer(data.ljust(-(-len(data) // 8) * 8, b"\0"), np.uint64).copy()
        for host, storage in self.storages.items():
            inside = (words >= host) & (words < host + storage.size)
            words[inside] += np.uint64((storage.address - host) % (1 << 64))
        return words.tobytes()[: len(data)]


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


def sizes(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    """A grid, block or cluster as three sizes."""
    given = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(given) <= 3 or any(s < 1 for s in given):
        raise ValueError(f"{name}: {value}, needs one to three sizes of at least 1")
    return (*given, 1, 1)[:3]  # type: ignore[return-value]
