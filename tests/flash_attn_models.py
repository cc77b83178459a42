"""Two small models written for the library flash-attn: nothing here knows of pyfuse."""

from __future__ import annotations

import torch
from flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from flash_attn.ops.triton.rotary import apply_rotary
from torch import Tensor, nn


class TurnUnpadded(torch.autograd.Function):
    """Rotary of q and k within packed [T, 3, H, D], in place, as encoders of this kind write it."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, cu_seqlens, max_seqlen):
        ctx.save_for_backward(cos, sin, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return TurnUnpadded.turn(qkv.contiguous(), cos, sin, cu_seqlens, max_seqlen, False)

    @staticmethod
    def backward(ctx, grad):
        cos, sin, cu_seqlens = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        turned = TurnUnpadded.turn(grad, cos, sin, cu_seqlens, ctx.max_seqlen, True)
        return turned, None, None, None, None

    @staticmethod
    def turn(qkv, cos, sin, cu_seqlens, max_seqlen, conjugate):
        heads, d = qkv.shape[2:]
        apply_rotary(
            qkv[:, :2].view(-1, 2 * heads, d), cos, sin, seqlen_offsets=0, cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen, interleaved=False, inplace=True, conjugate=conjugate,
        )  # fmt: skip
        return qkv


class UnpaddedRotary(RotaryEmbedding):
    def forward(self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        return TurnUnpadded.apply(qkv, self._cos_cached, self._sin_cached, cu_seqlens, max_seqlen)


class EncoderLayer(nn.Module):
    """Prenorm attention, in a local window or global, and a gated feed-forward block."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.attn_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.Wqkv, self.Wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.Wi, self.Wd = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.rotary = UnpaddedRotary(dim // heads, base=160000.0)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        y, x = layer_norm_fn(x, self.attn_norm.weight, self.attn_norm.bias, eps=1e-5, prenorm=True)
        qkv = self.Wqkv(y).view(x.shape[0], 3, self.heads, -1)
        qkv = self.rotary(qkv, cu_seqlens, max_seqlen)
        o = flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, dropout_p=0.0,
            deterministic=True, window_size=(self.window, self.window),
        )  # fmt: skip
        o = self.Wo(o.view(x.shape[0], -1))
        norm = self.mlp_norm
        y, x = layer_norm_fn(o, norm.weight, norm.bias, residual=x, eps=1e-5, prenorm=True)
        hidden, gate = self.Wi(y).chunk(2, -1)
        return x + self.Wd(nn.functional.gelu(hidden) * gate)


class Encoder(nn.Module):
    """ModernBERT's shape: tokens without padding, every second layer local."""

    def __init__(self, dim: int = 48, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        windows = [-1 if i % 2 == 0 else 4 for i in range(layers)]
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, window) for window in windows)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length = mask.shape
        x, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen)
        return pad_input(x, indices, batch, length)


class ParallelBlock(nn.Module):
    """Phi's shape: attention and feed-forward side by side after one norm; rotary of a part of each head."""

    def __init__(
        self, dim: int = 64, heads: int = 4, heads_k: int = 2, rotary_dim: int = 8
    ) -> None:
        super().__init__()
        self.heads, self.heads_k, d = heads, heads_k, dim // heads
        self.norm = RMSNorm(dim, eps=1e-6)
        self.Wq, self.Wkv = nn.Linear(dim, dim), nn.Linear(dim, 2 * heads_k * d)
        self.Wo, self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, 96), nn.Linear(96, dim)
        self.rotary = RotaryEmbedding(rotary_dim, interleaved=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        q = self.Wq(y).unflatten(-1, (self.heads, -1))
        return y, q, self.Wkv(y).unflatten(-1, (2, self.heads_k, -1))

    def join(self, x: Tensor, y: Tensor, o: Tensor) -> Tensor:
        return (
            x
            + self.Wo(o.flatten(2))
            + self.fc2(nn.functional.gelu(self.fc1(y), approximate="tanh"))
        )

    def forward(self, x: Tensor) -> Tensor:
        y, q, kv = self.project(x)
        q, kv = self.rotary(q, kv)
        return self.join(x, y, flash_attn_kvpacked_func(q, kv, causal=True))

    def step(self, x: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        """The next tokens [B, S, dim] of each sequence, over a cache [B, N, 2, Hk, D] that grows in place."""
        y, q, kv = self.project(x)
        self.rotary._update_cos_sin_cache(cache.shape[1], device=x.device, dtype=x.dtype)
        o = flash_attn_with_kvcache(
            q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1],
            rotary_cos=self.rotary._cos_cached, rotary_sin=self.rotary._sin_cached,
            cache_seqlens=lengths, causal=True, rotary_interleaved=self.rotary.interleaved,
        )  # fmt: skip
        return self.join(x, y, o)
