"""Attention on the CPU kernels: what they take, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module, why_not_on_cpu

_NO_MASK: tuple[int, None, int] = (0, None, 0)


def why_not_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> str | None:
    if q.device.type != "cpu":
        return why_not_on_cpu(q)
    if dropout_p > 0.0:
        return "dropout is not in the kernels yet"
    if q.dtype not in DTYPE:
        return f"dtype {q.dtype} is none of float32, bfloat16, float16, float64"
    if q.shape[3] == 0 or v.shape[3] == 0:
        return "a head size of 0 leaves nothing to compute"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in DTYPE:
        return f"mask dtype {mask.dtype} is none of bool, float32, bfloat16, float16, float64"
    return None


def empty_like_q(q: Tensor, dv: int) -> Tensor:
    """o in the memory order of q: a [B, M, H, D] view gives a [B, M, H, Dv] view, so nothing is copied later."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, rows, heads, dv)).transpose(1, 2)
    return q.new_empty((batch, heads, rows, dv))


def _edges(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) keys around the aligned diagonal, -1 for all."""
    left, right = (-1, -1) if window is None else window
    return left, 0 if causal else right


def _mask_arguments(mask: Tensor | None, sizes: tuple[int, ...]) -> tuple[int, Any, int]:
    if mask is None:
        return _NO_MASK
    batch, heads, _, rows, keys, *_rest = sizes
    expanded = mask.expand(
        batch, heads, rows, keys
    )  # zero strides where broadcast; nothing is copied
    code = -1 if mask.dtype == torch.bool else DTYPE[mask.dtype]
    return expanded.data_ptr(), expanded.stride(), code


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float = 1.0,
    return_lse: bool = False,
    align_to_seqlens: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.attention. align_to_seqlens: as in pyfuse.decode_attention."""
    batch, heads, rows, d = q.shape
    sizes = (batch, heads, k.shape[1], rows, k.shape[2], d, v.shape[3])
    o = empty_like_q(q, v.shape[3])
    lse = None
    if return_lse:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty((batch, heads, rows), dtype=lse_dtype)
    # The kernel reads these three as int64 and float32, contiguous: a few numbers each.
    lengths = None if seqlens_k is None else seqlens_k.to(torch.int64).contiguous()
    sink = None if sinks is None else sinks.to(torch.float32).contiguous()
    slope = None if alibi_slopes is None else alibi_slopes.to(torch.float32).contiguous()
    left, right = _edges(causal, window)
    if o.numel() > 0:
        module().attention(
            q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
            o.data_ptr(), o.stride(), 0 if lse is None else lse.data_ptr(), sizes, DTYPE[q.dtype],
            scale, softcap or 0.0, left, right,
            0 if lengths is None else lengths.data_ptr(), 0 if sink is None else sink.data_ptr(),
            0 if slope is None else slope.data_ptr(), torch.get_num_threads(), align_to_seqlens,
            *_mask_arguments(mask, sizes),
        )  # fmt: skip
    return o if lse is None else (o, lse)
