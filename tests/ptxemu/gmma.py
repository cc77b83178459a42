"""The operands of wgmma in numpy, from the PTX ISA and CuTe alone: formats, layouts, descriptors and fragments.

Canonical layouts are CuTe's (shape):(stride) in elements, T of which are 16 bytes ("Canonical Layouts"); a swizzle
works on the byte addresses that they give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
_TORCH = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# In the descriptor, by bytes.
_SWIZZLE_CODE = {0: 0, 128: 1, 64: 2, 32: 3}


def codes(kind: str, values: Array) -> Array:
    """Values that the format holds exactly, as its bits; the bits that tf32 ignores are not zero."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32) | 0x1ABC
    if kind in _TORCH:
        packed = torch.from_numpy(values.astype(np.float32)).to(_TORCH[kind])
        return packed.view(torch.uint8).numpy().view(_CODES[BYTES[kind]])
    return values.astype(np.int64).astype(np.uint8)


def draw(kind: str, shape: tuple[int, int], rng: np.random.Generator, small: bool = False) -> Array:
    """Random values of a format, of which any 64 products sum up exactly in float32 (small: in float16)."""
    if kind in ("s8", "u8"):
        return rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), shape).astype(np.float64)
    if small:
        return rng.integers(-2, 3, shape).astype(np.float64)
    mantissa = {"bf16": 7, "f16": 7, "tf32": 8, "e4m3": 3, "e5m2": 2}[kind]
    magnitude = 1 + rng.integers(0, 1 << mantissa, shape) / (1 << mantissa)
    exponent = rng.integers(-1, 2, shape) if mantissa < 7 else 0
    return rng.choice([-1.0, 0.0, 1.0], shape, p=[0.45, 0.1, 0.45]) * magnitude * 2.0**exponent


def offsets(shape: tuple[int, ...], stride: tuple[int, ...], index: Array) -> Array:
    """One mode of a CuTe layout: the first of its parts runs fastest."""
    total = np.zeros_like(index)
    for size, step in zip(shape, stride, strict=True):
        total = total + index % size * step
        index = index // size
    return total


def swizzled(address: Array, width: int) -> Array:
    """CuTe's Swizzle<B, 4, 3>, width = 16 · 2^B bytes: bits 7.. of an address are XORed onto bits 4..."""
    bits = (max(width, 16) // 16 - 1) << 7
    return address ^ ((address & bits) >> 3)


@dataclass(frozen=True)
class Layout:
    """Where A (rows: M) or B (rows: N) lies. major: the dimension that is contiguous; swizzle: bytes, or 0;
    start: the byte from the start of the swizzle's pattern; lbo, sbo: bytes, as the descriptor has them."""

    major: str
    swizzle: int
    start: int
    lbo: int
    sbo: int

    def plain(self, rows: int, k: int, size: int) -> Array:
        """Byte addresses [rows, k] of elements of `size` bytes before the swizzle."""
        t, width = 16 // size, max(self.swizzle // 16, 1)
        lbo, sbo = self.lbo // size, self.sbo // size
        m, n = np.arange(rows), np.arange(k)
        if self.major == "K":
            row = offsets((8, rows), (width * t, sbo), m)
            along = offsets((t, k), (1, t if self.swizzle else lbo), n)
        else:
            row = offsets((t, width, rows), (1, t, lbo if self.swizzle else sbo), m)
            along = offsets((8, k), (width * t, sbo if self.swizzle else lbo), n)
        at = row[:, None] + along
        return self.start + at * size

    def store(self, image: Array, matrix: Array) -> None:
        """Write a matrix of bits [rows, k] where it belongs in an image of shared memory, bytes."""
        size = matrix.itemsize
        at = swizzled(self.plain(len(matrix), matrix.shape[1], size), self.swizzle)
        image[at[..., None] + np.arange(size)] = matrix[..., None].view(np.uint8)

    def descriptor(self, size: int, k: int = 0) -> int:
        """For the columns from k on; the address counts from the start of the image."""
        start = int(self.plain(1, k + 1, size)[0, k])
        return (
            start >> 4
            | self.lbo >> 4 << 16
            | self.sbo >> 4 << 32
            | _SWIZZLE_CODE[self.swizzle] << 62
        )


def fragment(matrix: Array) -> Array:
    """A's registers [4, 128] of 32 bits, by thread, of a matrix of bits [64, k] ("Register Fragments")."""
    per = 4 // matrix.itemsize  # elements of a register
    register, thread, part = np.ogrid[:4, :128, :per]
    row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
    column = thread % 4 * per + part + register // 2 * 4 * per
    return np.ascontiguousarray(matrix[row, column]).view(np.uint32)[..., 0]


def accumulators(matrix: Array, kind: str) -> Array:
    """D's registers [.., 128] of 32 bits, by thread, of a matrix [64, n]; kind: f32, f16 or s32."""
    element, thread = np.ogrid[: matrix.shape[1] // 2, :128]
    row = thread // 32 * 16 + thread % 32 // 4 + element // 2 % 2 * 8
    column = element // 4 * 8 + thread % 4 * 2 + element % 2
    values = matrix[row, column]
    if kind == "s32":
        return values.astype(np.int64).astype(np.uint32)
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    pairs = values.astype(np.float16).reshape(-1, 2, 128).transpose(0, 2, 1)
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]
