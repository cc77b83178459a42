"""flash_attn.layers.rotary 2.8.3: the rotary position embedding, as functions and as a module.

What works in place does so in memory also where a gradient is wanted: the result, which is the argument itself, has the
gradient, and whatever else autograd had kept of the old values says in its backward pass that they are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import pyfuse
from pyfuse.compat.flash_attn.ops.triton.rotary import apply_rotary

# (a tensor, conjugate, *tables): turn the tensor in place.
Turn = Callable[..., Any]


class _InPlace(torch.autograd.Function):
    """x turned in place. Its gradient is turned back, in a copy: others may hold it too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Turn, *tables: Tensor) -> Tensor:
        ctx.turn = turn
        ctx.save_for_backward(*tables)
        turn(x, False, *tables)
        # Not mark_dirty, which refuses a leaf and what unbind returns; the library takes both.
        torch.autograd.graph.increment_version(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.turn(grad, True, *ctx.saved_tensors)
        return grad, None, *(None for _ in ctx.saved_tensors)


def _in_place(x: Tensor, turn: Turn, *tables: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _InPlace.apply(x, turn, *tables)
    turn(x, False, *tables)
    return x


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(-x2, x1) of the pairs (x1, x2) of x's last dimension: its halves, or neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """`apply_rotary_emb` of x [B, S, H, D] by cos and sin [S, R/2] or [B, S, R/2]."""
    layout = "interleaved" if interleaved else "half"
    return pyfuse.rope(x.transpose(1, 2), cos, sin, layout=layout).transpose(1, 2)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x [B, S, H, D], or packed [T, H, D], with its first R elements turned by cos and sin [P, R/2].

    Arguments, maths and errors are those of `ops.triton.rotary.apply_rotary`; the gradient is x's (without inplace
    those of cos and sin as well).
    """
    options: dict[str, Any] = {
        "interleaved": interleaved,
        "seqlen_offsets": seqlen_offsets,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
    }
    if not inplace:
        return apply_rotary(x, cos, sin, **options)

    def turn(x: Tensor, conjugate: bool, cos: Tensor, sin: Tensor) -> None:
        apply_rotary(x, cos, sin, inplace=True, conjugate=conjugate, **options)

    return _in_place(x, turn, cos, sin)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn q and k of qkv in place, and return it.

    qkv [B, S, 3, H, D], or [B, S, Hq + 2 · Hk, D] with num_heads_q = Hq. cos, sin [P, R/2]; cos_k, sin_k, alike: k's
    own, where they differ (both or neither).
    """
    if (cos_k is None) != (sin_k is None):
        missing = "cos_k" if cos_k is None else "sin_k"
        raise ValueError(f"{missing}: got None, needs both cos_k and sin_k, or neither")
    _parts(qkv, num_heads_q, 2)
    tables = (cos, sin) if cos_k is None or sin_k is None else (cos, sin, cos_k, sin_k)

    def turn(qkv: Tensor, conjugate: bool, *tables: Tensor) -> None:
        for i, x in enumerate(_parts(qkv, num_heads_q, len(tables) // 2)):
            cos, sin = tables[-2:] if i == 1 else tables[:2]
            apply_rotary(x, cos, sin, seqlen_offsets, None, None, interleaved, True, conjugate)

    return _in_place(qkv, turn, *tables)


def _parts(qkv: Tensor, num_heads_q: int | None, kinds: int) -> list[Tensor]:
    """Views [B, S, heads, D] of q and of k; of both as one, if there is one kind of tables and memory allows it."""
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv: expected [B, S, 3, H, D], got shape {tuple(qkv.shape)}")
        if kinds == 1 and qkv.stride(2) == qkv.shape[3] * qkv.stride(3):
            return [qkv[:, :, :2].flatten(2, 3)]
        return [qkv[:, :, 0], qkv[:, :, 1]]
    if qkv.dim() != 4:
        raise ValueError(
            f"qkv: expected [B, S, 3, H, D] or [B, S, Hq + 2 Hk, D], got shape {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise ValueError("num_heads_q: got None, needs q's heads beside a qkv of 4 dimensions")
    rest = qkv.shape[2] - num_heads_q
    if num_heads_q < 0 or rest < 0 or rest % 2:
        raise ValueError(
            f"num_heads_q: got {num_heads_q}, but qkv has {qkv.shape[2]} heads, needs Hq + 2 Hk"
        )
    end = num_heads_q + rest // 2
    if kinds == 1:
        return [qkv[:, :, :end]]
    return [qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end]]


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Turn k of kv [B, S, 2, H, D] in place, and return kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv: expected [B, S, 2, H, D], got shape {tuple(kv.shape)}")

    def turn(kv: Tensor, conjugate: bool, cos: Tensor, sin: Tensor) -> None:
        k = kv[:, :, 0]
        apply_rotary(k, cos, sin, seqlen_offsets, None, None, interleaved, True, conjugate)

    return _in_place(kv, turn, cos, sin)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding of q and k in place (Su et al., arXiv:2104.09864), from tables that grow as needed.

    Angle i of position p is p · base**(-2i / dim), in float32 whatever the module's dtype; the tables are in qkv's.
    scale_base: xPos (Sun et al., arXiv:2212.10554): q's pair i is multiplied, and k's divided, by
    ((2i + 0.4 dim) / (1.4 dim)) ** ((p - length // 2) / scale_base), with the length that the tables have.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (pair / self.dim)

    def _compute_scale(self, device: Any = None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (pair + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables of at least `seqlen` positions, on that device and in that dtype."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # A module in bfloat16 has rounded this buffer, which would turn far positions by wrong angles.
        exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq if exact else self._compute_inv_freq(device)
        angles = torch.outer(position, inv_freq.to(position.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale if exact else self._compute_scale(device)
        power = (position - seqlen // 2)[:, None] / self.scale_base
        factor = scale.to(position.device) ** power
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn in place, and return, qkv as in `apply_rotary_emb_qkv_`; or q [B, S, Hq, D] and kv [B, S, 2, Hk, D].

        seqlen_offset: an int or [B], the position of each first token. max_seqlen: the tables' length, needed once
        beside a tensor (ValueError), since its values are not read here.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen: got None, needs a length beside a tensor seqlen_offset")
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)
