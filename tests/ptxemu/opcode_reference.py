"""What instructions give, in exact arithmetic: sums and products in every rounding, extremes, conversions."""

from __future__ import annotations

from collections.abc import Callable

from . import opcode_formats as formats
from .opcode_formats import F32, FORMATS, Format, Number

Bits = Callable[..., int]
WHOLE = ("rni", "rzi", "rmi", "rpi")
Operation = Callable[..., Number]
OPERATIONS: dict[str, tuple[int, Operation]] = {
    "add": (2, lambda x, y, r: formats.add(x, y, r)),
    "sub": (2, lambda x, y, r: formats.add(x, formats.negate(y), r)),
    "mul": (2, lambda x, y, r: formats.multiply(x, y)),
    "fma": (3, lambda x, y, z, r: formats.add(formats.multiply(x, y), z, r)),
    "mad": (3, lambda x, y, z, r: formats.add(formats.multiply(x, y), z, r)),
    "div": (2, lambda x, y, r: formats.divide(x, y)),
    "rcp": (1, lambda x, r: formats.divide((1, 0), x)),
    "sqrt": (1, lambda x, r: formats.square_root(x)),
}


def rounded(
    operation: Operation, form: Format, rounding: str = "rn", ftz: bool = False, sat: bool = False
) -> Callable[..., int]:
    """An operation on bit patterns: operands flushed, the exact result clamped, rounded and flushed."""

    def apply(*patterns: int) -> int:
        numbers = [formats.decode(form.flush(p) if ftz else p, form) for p in patterns]
        result = operation(*numbers, rounding)
        bits = formats.encode(formats.saturate(result) if sat else result, form, rounding)
        return form.flush(bits) if ftz else bits

    return apply


def chosen(name: str, form: Format, nan: bool, *patterns: int) -> int:
    """The least or the greatest: -0 < +0; NaN loses against a number, or gives the canonical NaN."""
    numbers = [p for p in patterns if not form.is_nan(p)]
    if not numbers or (nan and len(numbers) < len(patterns)):
        return form.nan
    return (min if name == "min" else max)(
        numbers, key=lambda p: ~(p - form.sign) if p & form.sign else p
    )


def by_magnitude(name: str, form: Format, nan: bool, a: int, b: int) -> int:
    """.xorsign.abs: of the magnitudes, with the product's sign."""
    result = chosen(name, form, nan, a & ~form.sign, b & ~form.sign)
    return result if form.is_nan(result) else result | ((a ^ b) & form.sign)


def in_halves(one: Bits) -> Bits:
    """The same on the low and the high 16 of 32 bits."""

    def both(*values: int) -> int:
        low, high = (one(*(v >> n & 0xFFFF for v in values)) for n in (0, 16))
        return low | high << 16

    return both


def convert(
    a: int, to: str, source: str, rounding: str = "rn", ftz: bool = False, sat: bool = False, relu: bool = False,
    satfinite: bool = False,
) -> int:  # fmt: skip
    """.ftz counts for .f32 alone; NaN becomes a NaN, with .sat +0."""
    form, into = FORMATS[source], FORMATS[to]
    x = formats.decode(form.flush(a) if ftz and form is F32 else a, form)
    if rounding in WHOLE:
        x = formats.to_integral(x, rounding)
    if sat:
        x = formats.saturate(x)
    if relu:
        x = formats.relu(x)
    bits = formats.encode(x, into, rounding, satfinite)
    return into.flush(bits) if ftz and into is F32 else bits


def ties(name: str) -> tuple[int, ...]:
    """Single floats around those of a shorter format: its numbers, the middles between them, and one step beside."""
    form = FORMATS[name]
    unit, step = 1 << form.spare, max((form.sign >> form.spare) // 400, 1)
    numbers = {F32.infinity, F32.nan, 0x7F7FFFFF, 1, 0x00800000, 0x007FFFFF}
    codes = {
        *range(0, form.sign, step * unit),
        *range(0, 40 * unit, unit),
        *range(form.largest - 20 * unit, form.largest, unit),
    }
    for code in codes:
        x, y = formats.decode(code, form), formats.decode(code + unit, form)
        if isinstance(y, float):
            continue
        middle = formats.multiply(formats.add(x, y), (1, -1))
        for number in (x, middle):
            bits = formats.encode(number, F32)
            numbers |= {bits, bits + 1, max(bits - 1, 0)}
    over = formats.encode((3, FORMATS[name].bias + 0), F32)  # beyond the largest
    numbers |= {over, over - 1, over + 1}
    numbers = {n for n in numbers if n <= F32.nan}
    return (*sorted(numbers), *sorted(n | F32.sign for n in numbers))
