"""Drop-in modules: ``import pyfuse.nn as nn`` where a script has ``import torch.nn as nn``.

Each module here is a subclass of torch's of the same name, with its constructor, parameters, initial values (those of
the same seed), state dict, repr, signature and errors; only the work is done by pyfuse's operations. What has no faster
form here is torch's own: ``pyfuse.nn.GELU is torch.nn.GELU``. Beside them stand three modules that torch lacks:
`InputEmbedding`, `RotaryEmbedding` and `SinusoidalEncoding`.

What a module's fast form does not cover runs on torch's, with the same result; `override_torch` counts such calls.
Dropout keeps the same share of elements as torch's, but other ones for the same seed.
"""

from __future__ import annotations

from typing import Any

import torch

from pyfuse.nn import functional
from pyfuse.nn.attention import MultiheadAttention
from pyfuse.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pyfuse.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from pyfuse.nn.layers import Dropout, LayerNorm, Linear, RMSNorm
from pyfuse.nn.position import InputEmbedding, RotaryEmbedding, SinusoidalEncoding
from pyfuse.nn.transformer import Transformer

__all__ = [
    "Dropout",
    "InputEmbedding",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"neither pyfuse.nn nor torch.nn has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch.nn)})
