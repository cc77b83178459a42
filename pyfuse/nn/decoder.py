"""torch.nn's Transformer decoder on pyfuse's operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyfuse.nn._blocks import (
    adopt,
    attend,
    feed_forward,
    is_causal_mask,
    norm_of_sum,
    sequence_length,
)

_torch_layer_forward = nn.TransformerDecoderLayer.forward
_STOCK = nn.TransformerDecoderLayer
_STOCK_BLOCKS = (_STOCK._sa_block, _STOCK._mha_block, _STOCK._ff_block)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention over the encoder's output and feed-forward, each with its residual sum.

    torch.nn.TransformerDecoderLayer documents it. Each sum is one operation with the dropout before and the LayerNorm
    after it. A layer one of whose blocks (`_sa_block`, …) a subclass has replaced calls these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own = type(self)
        if (own._sa_block, own._mha_block, own._ff_block) != _STOCK_BLOCKS:
            return _torch_layer_forward(
                self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip

        def attended(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def look_up(x: Tensor) -> Tensor:
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return attend(self.multihead_attn, x, memory, *masks)

        if self.norm_first:
            n, x = norm_of_sum(attended(self.norm1(tgt)), tgt, self.dropout1, self.norm2)
            n, x = norm_of_sum(look_up(n), x, self.dropout2, self.norm3)
            return x + self.dropout3(feed_forward(self, n))
        x = norm_of_sum(attended(tgt), tgt, self.dropout1, self.norm1)[0]
        x = norm_of_sum(look_up(x), x, self.dropout2, self.norm2)[0]
        return norm_of_sum(feed_forward(self, x), x, self.dropout3, self.norm3)[0]


class TransformerDecoder(nn.TransformerDecoder):
    """Layers one after another; torch.nn.TransformerDecoder documents it."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        first: Any = self.layers[0]
        causal = is_causal_mask(
            tgt_mask, tgt_is_causal, sequence_length(tgt, first.self_attn.batch_first)
        )
        output = tgt
        for layer in self.layers:
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal, memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)
