"""pyfuse: fused attention, normalisation and positional-encoding kernels for PyTorch.

Operations are functions of tensors (:mod:`pyfuse.ops`); ``accelerate(model)`` puts them into a live
Hugging Face model; ``explain`` says which kernel runs for given arguments, and why.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyfuse.dispatch import explain, use_backend
from pyfuse.ops import (
    alibi_slopes,
    attention,
    decode_attention,
    dropout,
    embed,
    layer_norm,
    rms_norm,
    rope,
    rope_frequencies,
    rope_pair,
    scaled_dot_product_attention,
    sinusoidal_encoding,
    varlen_attention,
)

if TYPE_CHECKING:
    from pyfuse import compat, nn
    from pyfuse.hf import Receipt, accelerate
    from pyfuse.nn.override import override_torch

__version__ = "0.1.0"

__all__ = [
    "Receipt",
    "accelerate",
    "alibi_slopes",
    "attention",
    "compat",
    "decode_attention",
    "dropout",
    "embed",
    "explain",
    "layer_norm",
    "nn",
    "override_torch",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_pair",
    "scaled_dot_product_attention",
    "sinusoidal_encoding",
    "use_backend",
    "varlen_attention",
]


def __getattr__(name: str) -> Any:
    # What not every program needs is imported by those that do: Hugging Face transformers alone takes seconds.
    if name in ("Receipt", "accelerate"):
        return getattr(importlib.import_module("pyfuse.hf"), name)
    if name == "override_torch":
        return importlib.import_module("pyfuse.nn.override").override_torch
    if name in ("compat", "nn"):
        return importlib.import_module(f"pyfuse.{name}")
    raise AttributeError(f"module 'pyfuse' has no attribute {name!r}")
