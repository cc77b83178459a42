"""Values of options: brought into one immutable form each, and held to their limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def knob(
    text: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """Metadata of a field. text: for the help of a command line. least ≤ value, above < value, value ≤ most."""
    return {"text": text, "least": least, "above": above, "most": most}


def wrong_type(name: str, value: object, needs: str) -> TypeError:
    return TypeError(f"{name}: got {value!r}, needs {needs}")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def token(name: str, value: Any) -> int:
    if not is_integer(value):
        raise wrong_type(name, value, "a token's id, an int")
    if value < 0:
        raise ValueError(f"{name}: got token {value}, needs ids of 0 and above")
    return int(value)


def tokens(name: str, value: Any) -> tuple[int, ...]:
    return tuple(token(name, item) for item in _items(name, value, "token ids"))


def optional_tokens(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else tokens(name, value)


def words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    found = tuple(tokens(name, word) for word in _items(name, value, "sequences of token ids"))
    if () in found:
        raise ValueError(f"{name}: got one without tokens")
    return found


def biases(name: str, value: Any) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise wrong_type(name, value, "a mapping of token ids to numbers")
    for bias in value.values():
        if not (is_integer(bias) or isinstance(bias, float)):
            raise wrong_type(name, bias, "numbers")
        if not bias < math.inf:
            raise ValueError(f"{name}: got {bias}, needs finite numbers or -inf")
    return MappingProxyType({token(name, key): float(bias) for key, bias in value.items()})


def steps(name: str, value: Any) -> Mapping[int, int]:
    if not isinstance(value, Mapping):
        raise wrong_type(name, value, "a mapping of steps to token ids")
    for step in value:
        if not is_integer(step):
            raise wrong_type(name, step, "steps that are ints")
    return MappingProxyType({step: token(name, item) for step, item in value.items()})


def strings(name: str, value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else _items(name, value, "texts")
    for string in found:
        if not isinstance(string, str):
            raise wrong_type(name, string, "texts")
        if not string:
            raise ValueError(f"{name}: got '', which would end every text at once")
    return found


def seeds(name: str, value: Any) -> int | tuple[int, ...]:
    if isinstance(value, Sequence):
        return tuple(_seed(name, item) for item in _items(name, value, "ints"))
    return _seed(name, value)


def _seed(name: str, value: Any) -> int:
    if not is_integer(value):
        raise wrong_type(name, value, "an int, or one for each prompt")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name}: got {value}, needs at least 0 and less than 2^64")
    return int(value)


def _items(name: str, value: Any, needs: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise wrong_type(name, value, needs)
    return tuple(value)


def check_number(name: str, value: Any, kind: str, limits: Mapping[str, Any]) -> None:
    """Of a field whose type is one number, written `kind`. TypeError, ValueError: it is none, or beyond its limits."""
    if kind not in ("int", "float", "int | None", "float | None"):
        return
    if value is None and kind.endswith("None"):
        return
    if not (is_integer(value) or (isinstance(value, float) and kind.startswith("float"))):
        raise wrong_type(name, value, "an int" if kind.startswith("int") else "a number")
    least, above, most = limits["least"], limits["above"], limits["most"]
    needs = [f"at least {least:g}"] if least is not None else []
    needs += [f"more than {above:g}"] if above is not None else []
    needs += [f"at most {most:g}"] if most is not None else []
    right = math.isfinite(value) and (least is None or value >= least)
    if not right or (above is not None and value <= above) or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, needs {' and '.join(needs) or 'a finite number'}")
