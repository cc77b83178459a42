"""Attention of few queries over a cache on the CPU kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyfuse.backends import cpu_attention


def why_not_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, block_table: Tensor | None = None, **_: Any
) -> str | None:
    if block_table is not None:
        return "the kernels read a contiguous cache only, not a paged one"
    return cpu_attention.why_not_attention(q, k_cache, v_cache)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.decode_attention."""
    return cpu_attention.attention(
        q, k_cache, v_cache, seqlens_k=seqlens_k, align_to_seqlens=True, **options
    )
