"""Floating-point formats in exact arithmetic: the reference that the emulator's instructions are tested against.

A Number is a float where it is ±0, ±infinity or NaN, and a pair (m, e) that stands for m * 2**e everywhere else; m is
a Python integer, so that nothing is ever rounded but by `encode`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

Number = float | tuple[int, int]
ROUNDINGS = ("rn", "rz", "rm", "rp")


class Format(NamedTuple):
    """1 sign bit, then exponent and mantissa. finite: no infinity, and all ones is the only NaN (e4m3).
    spare: bits below that are not part of it (tf32 lies in the upper 19 of 32)."""

    exponent: int
    mantissa: int
    finite: bool = False
    spare: int = 0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa + self.spare

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << (self.mantissa + self.spare)

    @property
    def largest(self) -> int:
        """The largest finite magnitude."""
        unit = 1 << self.spare
        return self.sign - 2 * unit if self.finite else self.infinity - unit

    @property
    def nan(self) -> int:
        """The canonical NaN."""
        return self.sign - (1 << self.spare)

    def is_nan(self, bits: int) -> bool:
        magnitude = bits & (self.sign - 1)
        return magnitude == self.nan if self.finite else magnitude > self.infinity

    def flush(self, bits: int) -> int:
        """.ftz: a zero of the same sign in place of a subnormal number."""
        return bits if bits & self.infinity or self.finite else bits & self.sign


F16, BF16, F32, F64 = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52)
TF32, E4M3, E5M2 = Format(8, 10, spare=13), Format(4, 3, finite=True), Format(5, 2)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "tf32": TF32, "e4m3": E4M3, "e5m2": E5M2}  # fmt: skip


@functools.lru_cache(1 << 16)
def decode(bits: int, form: Format) -> Number:
    """The value of a bit pattern."""
    sign = -1 if bits & form.sign else 1
    if form.is_nan(bits):
        return math.nan
    magnitude = (bits & (form.sign - 1)) >> form.spare
    if magnitude == 0:
        return sign * 0.0
    exponent, fraction = divmod(magnitude, 1 << form.mantissa)
    if exponent == (1 << form.exponent) - 1 and not form.finite:
        return sign * math.inf
    if exponent:
        fraction += 1 << form.mantissa
    return sign * fraction, max(exponent, 1) - form.bias - form.mantissa


def encode(x: Number, form: Format, rounding: str = "rn", satfinite: bool = False) -> int:
    """The bit pattern nearest to a value in the direction that is asked for (rna: to nearest, ties away from zero).
    satfinite: the largest finite number in place of a larger one or infinity."""
    if isinstance(x, float):
        if math.isnan(x):
            return form.nan
        sign = form.sign if math.copysign(1, x) < 0 else 0
        if x == 0:
            return sign
        return sign | (form.largest if satfinite else form.nan if form.finite else form.infinity)
    m, e = x
    sign = form.sign if m < 0 else 0
    m = abs(m)
    exponent = (
        max(m.bit_length() + e, 2 - form.bias) - 1
    )  # of the binade, or of the smallest normal one
    steps, rest, half = _split(m, form.mantissa - exponent + e)
    away = rounding == ("rm" if sign else "rp")
    if rounding == "rn":
        steps += rest > half or (rest == half and steps & 1)
    elif rounding == "rna":
        steps += rest >= half
    elif away:
        steps += rest > 0
    bits = (((exponent + form.bias - 1) << form.mantissa) + steps) << form.spare
    if bits > form.largest:
        nearest = rounding in ("rn", "rna")
        inside = satfinite or not (nearest or away)
        bits = form.largest if inside else form.nan if form.finite else form.infinity
    return sign | bits


def _split(m: int, shift: int) -> tuple[int, int, int]:
    """m * 2**shift as whole steps, what is left over, and half a step in the same unit."""
    if shift >= 0:
        return m << shift, 0, 1
    return m >> -shift, m & ((1 << -shift) - 1), 1 << (-shift - 1)


def negate(x: Number) -> Number:
    return -x if isinstance(x, float) else (-x[0], x[1])


def absolute(x: Number) -> Number:
    return abs(x) if isinstance(x, float) else (abs(x[0]), x[1])


def add(x: Number, y: Number, rounding: str = "rn") -> Number:
    """The exact sum. The rounding decides the sign of a zero: that of x + (-x) is -0 with rm."""
    if isinstance(x, float) and isinstance(y, float):
        if x == 0 and y == 0 and math.copysign(1, x) != math.copysign(1, y):
            return -0.0 if rounding == "rm" else 0.0
        return x + y
    if isinstance(x, float):
        return y if x == 0 else x
    if isinstance(y, float):
        return x if y == 0 else y
    e = min(x[1], y[1])
    m = (x[0] << (x[1] - e)) + (y[0] << (y[1] - e))
    if m == 0:
        return -0.0 if rounding == "rm" else 0.0
    return m, e


def multiply(x: Number, y: Number) -> Number:
    if isinstance(x, float) or isinstance(y, float):
        return _stand_in(x) * _stand_in(y)
    return x[0] * y[0], x[1] + y[1]


def divide(x: Number, y: Number) -> Number:
    """The quotient to more bits than any format has; one more tells that something follows."""
    if isinstance(x, float) or isinstance(y, float):
        a, b = _stand_in(x), _stand_in(y)
        if b == 0:
            return (
                math.nan
                if a == 0 or math.isnan(a)
                else math.copysign(math.inf, a) * math.copysign(1, b)
            )
        return a / b
    shift = max(70 + y[0].bit_length() - x[0].bit_length(), 0)
    quotient, rest = divmod(abs(x[0]) << shift, abs(y[0]))
    sign = -1 if (x[0] < 0) != (y[0] < 0) else 1
    return sign * (quotient << 1 | (rest != 0)), x[1] - y[1] - shift - 1


def square_root(x: Number) -> Number:
    """As `divide`; negative numbers give NaN, -0 itself."""
    if isinstance(x, float):
        return math.nan if x < 0 else x
    if x[0] < 0:
        return math.nan
    shift = 140 + (x[1] & 1)
    root = math.isqrt(x[0] << shift)
    return root << 1 | (root * root != x[0] << shift), (x[1] - shift) // 2 - 1


def to_integral(x: Number, rounding: str) -> Number:
    """Rounded to an integer: rni, rzi, rmi, rpi. A zero keeps the sign."""
    if isinstance(x, float):
        return x
    steps, rest, half = _split(abs(x[0]), x[1])
    negative = x[0] < 0
    if rounding == "rni":
        steps += rest > half or (rest == half and steps & 1)
    elif rounding == ("rmi" if negative else "rpi"):
        steps += rest > 0
    if steps == 0:
        return -0.0 if negative else 0.0
    return (-steps if negative else steps), 0


def saturate(x: Number) -> Number:
    """.sat: into [0, 1], NaN to +0."""
    if isinstance(x, float):
        return (1, 0) if x == math.inf else 0.0
    return 0.0 if x[0] < 0 else (1, 0) if x[0].bit_length() + x[1] > 0 else x


def relu(x: Number) -> Number:
    """.relu: 0 in place of what is negative."""
    negative = x < 0 if isinstance(x, float) else x[0] < 0
    return 0.0 if negative else x


def compare(x: Number, y: Number) -> int | None:
    """-1, 0 or 1; None if one is NaN. The zeros are equal."""
    if any(isinstance(v, float) and math.isnan(v) for v in (x, y)):
        return None
    if isinstance(x, float) or isinstance(y, float):
        a, b = _stand_in(x), _stand_in(y)
        if not (math.isinf(a) or math.isinf(b)) and a == b:
            return 0
        return (a > b) - (a < b)
    e = min(x[1], y[1])
    a, b = x[0] << (x[1] - e), y[0] << (y[1] - e)
    return (a > b) - (a < b)


def value(x: Number) -> float:
    """As a double, rounded."""
    if isinstance(x, float):
        return x
    try:
        return math.ldexp(*_short(x))
    except OverflowError:
        return math.copysign(math.inf, x[0])


def _short(x: tuple[int, int]) -> tuple[int, int]:
    """So many bits that ldexp rounds once, and an odd last one where some are cut off."""
    drop = max(abs(x[0]).bit_length() - 60, 0)
    cut = abs(x[0]) >> drop
    cut |= (cut << drop) != abs(x[0])
    return (-cut if x[0] < 0 else cut), x[1] + drop


def _stand_in(x: Number) -> float:
    """±1 for a finite number: enough where the other operand is no such."""
    return x if isinstance(x, float) else math.copysign(1.0, x[0])
