"""torch.nn's Transformer encoder on pyfuse's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfuse.nn._blocks import (
    adopt,
    attend,
    feed_forward,
    is_causal_mask,
    norm_of_sum,
    sequence_length,
)

_torch_layer_forward = nn.TransformerEncoderLayer.forward
_torch_forward = nn.TransformerEncoder.forward
_STOCK_BLOCKS = (nn.TransformerEncoderLayer._sa_block, nn.TransformerEncoderLayer._ff_block)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, each with its residual sum; torch.nn.TransformerEncoderLayer documents it.

    Each sum is one operation with the dropout before and the LayerNorm after it. A layer whose `_sa_block` or
    `_ff_block` a subclass has replaced calls these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested or (type(self)._sa_block, type(self)._ff_block) != _STOCK_BLOCKS:
            return _torch_layer_forward(self, src, src_mask, src_key_padding_mask, is_causal)

        def attended(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            n, x = norm_of_sum(attended(self.norm1(src)), src, self.dropout1, self.norm2)
            return x + self.dropout2(feed_forward(self, n))
        x = norm_of_sum(attended(src), src, self.dropout1, self.norm1)[0]
        return norm_of_sum(feed_forward(self, x), x, self.dropout2, self.norm2)[0]


class TransformerEncoder(nn.TransformerEncoder):
    """Layers one after another; torch.nn.TransformerEncoder documents it.

    Masks go to the layers as they were given. Where torch's own would compute on nested tensors (inference with a
    padding mask and enable_nested_tensor), the padding's outputs are 0, as they are there.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src.is_nested:
            return _torch_forward(self, src, mask, src_key_padding_mask, is_causal)
        first: Any = self.layers[0]
        causal = is_causal_mask(mask, is_causal, sequence_length(src, first.self_attn.batch_first))
        zeros = _pads_with_zeros(self, src, mask, src_key_padding_mask)
        if zeros:
            assert src_key_padding_mask is not None
            src_key_padding_mask = (
                src_key_padding_mask.bool()
            )  # nested tensors have no other padding
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask
            )
        if zeros:
            assert src_key_padding_mask is not None
            output = output.masked_fill(src_key_padding_mask[..., None], 0.0)
        return output if self.norm is None else self.norm(output)


def _pads_with_zeros(
    self: nn.TransformerEncoder, src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> bool:
    """Whether torch.nn.TransformerEncoder would take its nested-tensor path."""
    if padding is None or mask is not None or src.dim() != 3:
        return False
    first: Any = self.layers[0]
    if not (torch.backends.mha.get_fastpath_enabled() and self.use_nested_tensor):
        return False
    if first.training or torch.is_autocast_enabled():
        return False
    tensors = (src, *first.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if not self.mask_check:
        return True
    if torch.compiler.is_compiling():
        return False
    return bool(torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not()))
