"""pyfuse: fused attention, normalisation and positional-encoding kernels for PyTorch.

Operations are functions of tensors (:mod:`pyfuse.ops`); ``accelerate(model)`` puts them into a live
Hugging Face model; ``explain`` says which kernel runs for given arguments, and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyfuse.dispatch import explain, use_backend
from pyfuse.ops import (
    alibi_slopes,
    attention,
    decode_attention,
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
    from pyfuse.hf import Receipt, accelerate

__version__ = "0.1.0"

__all__ = [
    "Receipt",
    "accelerate",
    "alibi_slopes",
    "attention",
    "decode_attention",
    "embed",
    "explain",
    "layer_norm",
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
    # Hugging Face transformers takes seconds to import: only those who accelerate a model pay for it.
    if name in ("Receipt", "accelerate"):
        from pyfuse import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'pyfuse' has no attribute {name!r}")
