"""Operands worth trying: the edges of every type, all their combinations, and random bit patterns."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence

from .opcode_formats import FORMATS, Format

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "u16x2": 32, "s16x2": 32,
    "e4m3x2": 16, "e5m2x2": 16, "count": 32,
} | {name: form.bits for name, form in FORMATS.items()}  # fmt: skip
_COUNTS = (
    0,
    1,
    2,
    5,
    15,
    16,
    17,
    30,
    31,
    32,
    33,
    48,
    62,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    0x80000000,
    0xFFFFFFFF,
)


@functools.cache
def edges(name: str) -> tuple[int, ...]:
    """Bit patterns at the ends of a type's range and around them. "count": shifts and positions of bits."""
    if name == "pred":
        return (0, 1)
    if name == "count":
        return _COUNTS
    if name.endswith("x2"):
        half = name.removesuffix("x2")
        some = edges(half)
        mixed = random.Random(7).sample(some, len(some))
        return tuple(low | high << BITS[half] for low, high in zip(some, mixed, strict=True))
    if name in FORMATS:
        return _float_edges(FORMATS[name])
    bits = BITS[name]
    top, middle = 1 << (bits - 1), 1 << (bits // 2)
    small = (0, 1, 2, 3, 7, 15, 31, 32, 64, 127, 128, 255)
    large = (middle - 1, middle, middle + 1, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1, 2 * top - 100,
             0x5555555555555555 % (2 * top), 0xAAAAAAAAAAAAAAAA % (2 * top))  # fmt: skip
    return tuple(sorted({v % (2 * top) for v in small + large}))


def _float_edges(form: Format) -> tuple[int, ...]:
    unit, one = 1 << form.spare, form.bias << (form.mantissa + form.spare)
    step = 1 << (form.mantissa + form.spare)  # doubles
    positive = {0, unit, 2 * unit, step - unit, step, step + unit, one - step, one - unit, one, one + unit,
                one + step // 2,
                one + step, one + step + step // 4, one + step + step // 2, form.largest, form.largest - unit,
                form.nan, form.largest - step // 2}  # fmt: skip
    if not form.finite:
        positive |= {
            form.infinity,
            form.infinity + unit,
            form.infinity + step // 2,
        }  # the last but one signals
    return tuple(sorted(positive)) + tuple(sorted(v | form.sign for v in positive))


def scattered(name: str, count: int, generator: random.Random) -> list[int]:
    """Random bit patterns; half of the floats lie so close to one another that sums cancel and round."""
    if name == "pred":
        return [generator.getrandbits(1) for _ in range(count)]
    if name == "count":
        return [
            generator.choice((generator.getrandbits(6), generator.getrandbits(32)))
            for _ in range(count)
        ]
    bits = BITS[name]
    if name.endswith("x2"):
        half = name.removesuffix("x2")
        low, high = scattered(half, count, generator), scattered(half, count, generator)
        return [a | b << (bits // 2) for a, b in zip(low, high, strict=True)]
    values = [generator.getrandbits(bits) for _ in range(count)]
    if name in FORMATS:
        form = FORMATS[name]
        spread = min(form.mantissa, form.bias // 2)
        for i in range(0, count, 2):
            exponent = form.bias + generator.randint(-spread // 2, spread // 2)
            fraction = generator.getrandbits(form.mantissa) & generator.choice(
                (-1, ~0 << (form.mantissa // 2))
            )
            values[i] = (values[i] & form.sign) | (
                exponent << form.mantissa | fraction
            ) << form.spare
    return values


@functools.cache
def operands(
    names: tuple[str, ...], combined: int = 900, random_ones: int = 500
) -> tuple[tuple[int, ...], ...]:
    """Columns of bit patterns, one for each operand: all combinations of edges (`combined` of them, if they are more),
    then random ones."""
    generator = random.Random("-".join(names))
    lists: Sequence[Sequence[int]] = [edges(name) for name in names]
    total = math.prod(map(len, lists))
    if total <= combined:
        rows = list(itertools.product(*lists))
    else:
        rows = [tuple(generator.choice(values) for values in lists) for _ in range(combined)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    for column, name in zip(columns, names, strict=True):
        column += scattered(name, random_ones, generator)
    return tuple(map(tuple, columns))
