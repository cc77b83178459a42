"""torch.nn.MultiheadAttention on pyfuse's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.nn import _fallbacks, _multi_head

_torch_forward = torch.nn.MultiheadAttention.forward


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention of several heads between projections; torch.nn.MultiheadAttention documents it.

    Vaswani et al., arXiv:1706.03762. Neither the scores nor an expanded mask ever lie in memory, in training as in
    inference. need_weights=True, torch's default, asks for the matrix of weights: then, and with bias_k, bias_v or
    add_zero_attn, torch's own code runs. A query that sees no key gets 0 before the output projection.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        call = _multi_head.Call(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            is_causal,
            self.dropout if self.training else 0.0,
        )
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        projections = _multi_head.Projections(
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            None if self._qkv_same_embed_dim else separate,
            self.in_proj_bias,
            self.out_proj.weight,
            self.out_proj.bias,
        )
        if self.bias_k is not None or self.add_zero_attn:
            reason: str | None = "bias_k, bias_v, add_zero_attn: a key that is appended"
        else:
            reason = _multi_head.why_not(
                projections, call, need_weights, batch_first=self.batch_first
            )
        if reason is None:
            _fallbacks.ran("MultiheadAttention")
            return _multi_head.attend(projections, call, batch_first=self.batch_first), None
        with _fallbacks.left_as_a_whole("MultiheadAttention", reason):
            return _torch_forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
