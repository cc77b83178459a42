"""torch.nn.Transformer on pyfuse's operations."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyfuse.nn._blocks import OURS, adopt
from pyfuse.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pyfuse.nn.encoder import TransformerEncoder, TransformerEncoderLayer

OURS.update(
    {
        nn.TransformerEncoderLayer: TransformerEncoderLayer,
        nn.TransformerDecoderLayer: TransformerDecoderLayer,
        nn.TransformerEncoder: TransformerEncoder,
        nn.TransformerDecoder: TransformerDecoder,
    }
)


class Transformer(nn.Transformer):
    """Encoder and decoder; torch.nn.Transformer documents it. Vaswani et al., arXiv:1706.03762.

    custom_encoder and custom_decoder stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = [id(x) for x in (*args, *kwargs.values()) if isinstance(x, nn.Module)]
        for part in (self.encoder, self.decoder):
            if id(part) not in given:
                adopt(part)
