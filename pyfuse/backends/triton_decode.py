"""Attention of few queries over a cache on the Triton kernels: what they take, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.triton_attention import (
    MOST_KEYS,
    empty_like_q,
    limits,
    precision,
    score_factors,
    strides,
    why_not_attention,
)
from pyfuse.backends.triton_device import kernels


def why_not_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    **_: Any,
) -> str | None:
    reason = why_not_attention(q, k_cache, v_cache)
    if reason is not None or block_table is None:
        return reason
    keys = k_cache.shape[2] * block_table.shape[1]
    if keys >= MOST_KEYS:
        return f"pages for {keys} keys of a sequence, the kernel counts to {MOST_KEYS}"
    return None


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
    """See pyfuse.decode_attention."""
    batch, heads, m, d = q.shape
    _, heads_k, n, dv = v_cache.shape
    o = empty_like_q(q, dv)
    lse = q.new_empty((batch, heads, m), dtype=torch.float32) if return_lse else None
    if o.numel() == 0:
        return o if lse is None else (o, lse)
    page_size, page_bits, table_strides = None, None, None
    if block_table is not None:
        page_size, table_strides = n, block_table.stride()
        n *= block_table.shape[1]
        if page_size & (page_size - 1) == 0:
            page_bits = page_size.bit_length() - 1
    new_strides = None if k_new is None or v_new is None else (strides(k_new), strides(v_new))
    device, configs = triton_device.of(q), kernels("decode_configs")
    group = heads // heads_k
    fold = softcap is None and alibi_slopes is None and scale > 0.0
    plan = configs.plan(
        m * group, d, dv, q.element_size(), device.arch, page_size, fold, precision(q, device.arch)
    )
    tiles = -(-m * group // plan.block_m) * batch * heads_k
    processors = getattr(device, "multiprocessors", configs.MULTIPROCESSORS)
    splits = configs.splits(tiles, n, processors)
    partial = None
    if splits > 1:  # of each row and split Dv sums of values, the maximum, the sum of weights
        partial = q.new_empty(batch * heads * m * splits * (dv + 2), dtype=torch.float32)
    scale, softcap = score_factors(scale, softcap)
    left, right = limits(causal, window, m + n)
    o_strides, length_stride = strides(o), seqlens_k.stride(0)
    args = (
        q, k_cache, v_cache, o, lse, partial, strides(q), strides(k_cache), strides(v_cache), o_strides, seqlens_k,
        length_stride, block_table, table_strides, page_size, page_bits, k_new, v_new, new_strides, batch, heads_k,
        group, m, n, scale, softcap, left, right, sinks, alibi_slopes, splits,
    )  # fmt: skip
    programs = tiles * splits if k_new is None else tiles * (splits + 1)
    module = kernels("flash_decode")
    device.launch(module.flash_decode_kernel, (programs,), args, plan.options)
    if partial is not None:
        sums = (
            partial, o, lse, o_strides, seqlens_k, length_stride, heads, group, m, n, left, right, sinks, splits,
        )  # fmt: skip
        device.launch(
            module.merge_kernel, (batch * heads * m, plan.merge_programs), sums, plan.merge
        )
    if k_new is not None:
        torch._C._increment_version((k_cache, v_cache))  # as torch's own in-place writes do
    return o if lse is None else (o, lse)
