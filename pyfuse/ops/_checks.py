"""The checks that operations share: each error names the argument, what it got, what it needs."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


_known_letters: dict[str, tuple[str, ...]] = {}  # a plain dict: Dynamo warns of functools.lru_cache


def _letters(spec: str) -> tuple[str, ...]:
    letters = _known_letters.get(spec)
    if letters is None:
        letters = _known_letters[spec] = tuple(spec.split())
    return letters


def bind_dims(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Bind letters to sizes, ``bind_dims(q=(q, "B Hq M D"), k=(k, "B Hk N D"))``, and return them.

    A letter is any word without spaces, and has one size throughout. A leading "..." stands for any
    number of dimensions, which are not bound.
    ValueError: an argument with another number of dimensions, or a letter seen with two sizes
    (``k: D is 48, but q has D = 64``). TypeError: no tensor.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, spec) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        letters = _known_letters.get(spec) or _letters(spec)
        shape: tuple[int, ...] = tensor.shape
        if letters and letters[0] == "...":
            letters = letters[1:]
            shape = shape[len(shape) - len(letters) :] if len(shape) > len(letters) else shape
        if len(shape) != len(letters):
            raise ValueError(_wrong_rank(name, tensor, spec))
        for letter, size in zip(letters, shape):  # noqa: B905  # as long as each other, and often called
            if sizes.setdefault(letter, size) != size:
                raise ValueError(_wrong_size(name, letter, size, sizes[letter], arguments))
    return sizes


def _wrong_rank(name: str, tensor: Tensor, spec: str) -> str:
    letters = _letters(spec)
    count = f"{len(letters)} dimension{'' if len(letters) == 1 else 's'}"
    if letters and letters[0] == "...":
        count = f"at least {len(letters) - 1} dimension{'' if len(letters) == 2 else 's'}"
    return f"{name}: expected {count} [{', '.join(letters)}], got shape {tuple(tensor.shape)}"


def _wrong_size(
    name: str, letter: str, size: int, bound: int, arguments: dict[str, tuple[Tensor, str]]
) -> str:
    first = next(other for other, (_, spec) in arguments.items() if letter in _letters(spec))
    if first == name:
        return f"{name}: {letter} is {size} and {bound} at once, needs one size"
    return f"{name}: {letter} is {size}, but {first} has {letter} = {bound}"


def same_dtype_device(**tensors: Tensor) -> None:
    """Require one dtype (else TypeError) and one device (else ValueError)."""
    names = iter(tensors)
    first = next(names)
    dtype, device = tensors[first].dtype, tensors[first].device
    for name in names:
        tensor = tensors[name]
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype}, but {first} has {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, but {first} is on {device}")


def same_device(**tensors: Tensor) -> None:
    """Require one device, else ValueError."""
    names = iter(tensors)
    first = next(names)
    device = tensors[first].device
    for name in names:
        if tensors[name].device != device:
            raise ValueError(f"{name}: on {tensors[name].device}, but {first} is on {device}")


def require_floating(**tensors: Tensor) -> None:
    """Require float64, float32, bfloat16 or float16, else TypeError."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name}: dtype {tensor.dtype}, needs float64, float32, bfloat16 or float16"
            )


def unit_last_stride(**tensors: Tensor) -> None:
    """Require that the last dimension lies densely in memory, else ValueError."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: stride {tensor.stride(-1)} in the last dimension, needs 1 "
                f"(call {name}.contiguous())"
            )
