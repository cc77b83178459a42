"""Attention of few queries over a cache in plain torch: the oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends import eager_masks as masks
from pyfuse.backends.eager_attention import Output, attend, score_steps


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
    scale: float | None = None,
    return_lse: bool = False,
) -> Output:
    """See pyfuse.decode_attention."""
    if k_new is not None and v_new is not None:
        _append(k_cache, k_new, seqlens_k, block_table)
        _append(v_cache, v_new, seqlens_k, block_table)
    if block_table is not None:
        k_cache = _gather_pages(k_cache, block_table, seqlens_k)
        v_cache = _gather_pages(v_cache, block_table, seqlens_k)
    positions = masks.aligned_positions(q.shape[2], k_cache.shape[2], q.device, seqlens_k)
    conditions = [*masks.in_band(positions, causal, window), masks.before(positions, seqlens_k)]
    return attend(
        q,
        k_cache,
        v_cache,
        visible=masks.all_of(conditions),
        steps=score_steps(softcap, alibi_slopes, positions),
        sinks=sinks,
        dropout=None,
        scale=scale,
        return_lse=return_lse,
    )


def _append(cache: Tensor, new: Tensor, seqlens_k: Tensor, block_table: Tensor | None) -> None:
    """Write new [B, H, M, D] in place at the last M keys of every sequence."""
    batch, _, rows, _ = new.shape
    last = torch.arange(-rows, 0, device=new.device)
    key = seqlens_k.to(torch.int64)[:, None] + last  # [B, M]
    if block_table is None:
        block = torch.arange(batch, device=new.device)[:, None]
    else:
        block = block_table.gather(1, key // cache.shape[2]).to(torch.int64)
        key = key % cache.shape[2]
    cache[block, :, key] = new.transpose(1, 2)  # [B, M, H, D]


def _gather_pages(cache: Tensor, block_table: Tensor, seqlens_k: Tensor) -> Tensor:
    """[pages, Hk, page_size, D] -> [B, Hk, N, D], N = pages_per_seq · page_size."""
    _, heads, page_size, d = cache.shape
    batch, pages_per_seq = block_table.shape
    first_key = torch.arange(pages_per_seq, device=cache.device) * page_size
    # A table is filled only as far as its sequence goes: beyond, any entry is allowed.
    used = first_key < seqlens_k[:, None]
    pages = cache[torch.where(used, block_table, 0).to(torch.int64)]
    return pages.transpose(1, 2).reshape(batch, heads, pages_per_seq * page_size, d)
