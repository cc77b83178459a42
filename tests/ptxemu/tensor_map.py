"""The host's side of tensor maps: what a kernel takes as `const __grid_constant__ CUtensorMap`.

The 128 bytes that NVIDIA's driver makes are not documented; these are the emulator's own (src/ops/tensor_map.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

import torch

Swizzle = Literal["none", "32B", "64B", "128B"]

_MAGIC = 0x50414D54
_ELEMENTS = {
    torch.uint8: 0, torch.int8: 0, torch.uint16: 1, torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4,
    torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 9, torch.bfloat16: 10,
    torch.float8_e4m3fn: 0, torch.float8_e5m2: 0,
}  # fmt: skip
_SWIZZLES: dict[str, int] = {"none": 0, "32B": 1, "64B": 2, "128B": 3}


class TensorMap:
    """A box of `box` elements moved at a time out of a tensor (or into it), innermost dimension last, as in torch.

    What lies outside of the tensor is read as zero (nan_fill: NaN) and not written. The innermost stride is 1, the
    others are multiples of 16 bytes. swizzle: how 16-byte chunks are exchanged in shared memory, by 32, 64 or 128
    bytes, which a row of the box then has.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        box: Sequence[int],
        swizzle: Swizzle = "none",
        nan_fill: bool = False,
    ) -> None:
        if tensor.dtype not in _ELEMENTS:
            raise TypeError(f"tensor: {tensor.dtype} has no place in a tensor map")
        if not 1 <= tensor.dim() <= 5 or len(box) != tensor.dim():
            shape = tuple(tensor.shape)
            raise ValueError(
                f"box: {tuple(box)} for shape {shape}, needs 1 to 5 dimensions, as many"
            )
        if tensor.numel() == 0:
            raise ValueError(f"tensor: shape {tuple(tensor.shape)}, needs sizes of at least 1")
        size = tensor.element_size()
        if tensor.stride(-1) != 1 or any(s * size % 16 for s in tensor.stride()[:-1]):
            raise ValueError(
                f"tensor: strides {tensor.stride()}, needs 1 in the last dimension, multiples of 16 bytes in others"
            )
        if tensor.data_ptr() % 16:
            raise ValueError("tensor: its memory does not start at a multiple of 16 bytes")
        if any(not 1 <= b <= 256 for b in box) or box[-1] * size % 16:
            raise ValueError(
                f"box: {tuple(box)}, needs sizes of 1 to 256 and rows of a multiple of 16 bytes"
            )
        if swizzle not in _SWIZZLES:
            raise ValueError(f"swizzle: {swizzle!r}, needs one of {', '.join(_SWIZZLES)}")
        if swizzle != "none" and box[-1] * size != int(swizzle[:-1]):
            raise ValueError(
                f"box: rows of {box[-1] * size} bytes, needs those of its swizzle, {swizzle}"
            )
        if nan_fill and not (tensor.dtype.is_floating_point and size > 1):
            raise ValueError(f"nan_fill: {tensor.dtype} is copied as integers, which have no NaN")
        self.tensor, self.box, self.swizzle, self.nan_fill = tensor, tuple(box), swizzle, nan_fill

    def encode(self, address: int) -> bytes:
        """The 128 bytes, given the tensor's device address."""
        rank = self.tensor.dim()

        def padded(values: Sequence[int], length: int, fill: int) -> list[int]:
            return [*values, *[fill] * (length - len(values))]

        sizes = padded(list(self.tensor.shape)[::-1], 5, 1)
        strides = [s * self.tensor.element_size() for s in list(self.tensor.stride())[:-1][::-1]]
        return struct.pack(
            "<I4BQ5I5H5BBI4Q40x", _MAGIC, _ELEMENTS[self.tensor.dtype], rank - 1, 0, _SWIZZLES[self.swizzle], address,
            *sizes, *padded(self.box[::-1], 5, 1), *[1] * 5, int(self.nan_fill), 0, *padded(strides, 4, 0),
        )  # fmt: skip
