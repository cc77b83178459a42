"""Attention of few queries over a cache on the CPU kernels, contiguous or paged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cpu_attention
from pyfuse.backends.cpu_module import DTYPE, module


def why_not_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    **_: Any,
) -> str | None:
    return cpu_attention.why_not_attention(q, k_cache, v_cache)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.decode_attention. ValueError also for an entry of block_table that is no page."""
    batch, heads, rows, d = q.shape
    pages, heads_k, keys, _ = k_cache.shape
    dv = v_cache.shape[3]
    table: tuple[Any, ...] = (0,)
    if block_table is not None:
        is_64_bit = block_table.dtype == torch.int64
        table = (1, block_table.data_ptr(), block_table.stride(), is_64_bit, keys, pages)
        keys *= block_table.shape[1]
    new: tuple[Any, ...] = (0,)
    if k_new is not None and v_new is not None:
        new = (1, k_new.data_ptr(), k_new.stride(), v_new.data_ptr(), v_new.stride())
    o = cpu_attention.empty_like_q(q, dv)
    lse = (
        q.new_empty((batch, heads, rows), dtype=cpu_attention.lse_dtype(q)) if return_lse else None
    )
    sinks = cpu_attention.few(sinks, torch.float64)
    alibi_slopes = cpu_attention.few(alibi_slopes, torch.float64)
    left, right = (-1, -1) if window is None else window
    if o.numel() > 0:
        module().attention_decode((
            (batch, heads, heads_k, rows, keys, d, dv), DTYPE[q.dtype],
            q.data_ptr(), q.stride(), k_cache.data_ptr(), k_cache.stride(),
            v_cache.data_ptr(), v_cache.stride(), o.data_ptr(), o.stride(),
            cpu_attention.address(lse), scale, softcap or 0.0, left, 0 if causal else right,
            cpu_attention.address(sinks), cpu_attention.address(alibi_slopes), torch.get_num_threads(),
            seqlens_k.data_ptr(), seqlens_k.dtype == torch.int64, seqlens_k.stride(0), *table, *new,
        ))  # fmt: skip
        if k_new is not None:
            torch._C._increment_version((k_cache, v_cache))  # as torch's own in-place writes do
    return o if lse is None else (o, lse)
