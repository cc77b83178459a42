"""Small records that patched methods read from their module's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class NormSlot(NamedTuple):
    """How a norm module normalises: ``casting`` is that of pyfuse.rms_norm, None for LayerNorm."""

    eps_name: str
    casting: str | None


class UnpadSlot(NamedTuple):
    """What a model that unpads runs on packed rows: the names of its children, all classes within."""

    parts: tuple[str, ...]
    known: frozenset[type]


class LinearSlot:
    """The packed weight of one linear layer, and the weight that it was packed from.

    A deepcopy starts without: it packs its own weight when it is first called.
    """

    __slots__ = ("activation", "bias", "dtype", "packed", "transposed", "weight")

    def __init__(self, transposed: bool, activation: str | None = None) -> None:
        self.transposed = transposed
        self.activation = activation  # that its fused calls ask for
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.packed: Any = None  # pyfuse.linear.PackedLinear, or None: no plan wins for this weight

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearSlot:
        return LinearSlot(self.transposed, self.activation)
