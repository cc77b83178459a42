"""Attention of few queries over a cache on the Triton kernels: the call."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from pyfuse.backends import gpu_decode, triton_device
from pyfuse.backends.gpu_attention import limits, score_factors, strides
from pyfuse.backends.triton_attention import precision
from pyfuse.backends.triton_device import kernels


def decode_into(
    o: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Write o, lse if it is there, and what is new into the cache. Lengths and tables stay on the GPU."""
    batch, heads, m, d = q.shape
    _, heads_k, n, dv = v_cache.shape
    group = heads // heads_k
    page_size, page_bits, table_strides = None, None, None
    if block_table is not None:
        page_size, table_strides = n, block_table.stride()
        n *= block_table.shape[1]
        if page_size & (page_size - 1) == 0:
            page_bits = page_size.bit_length() - 1
    unit, (q_strides, k_strides, v_strides) = in_units(q, k_cache, v_cache)
    new_strides = None if k_new is None or v_new is None else (strides(k_new), strides(v_new))
    o_strides, length_stride = strides(o), seqlens_k.stride(0)

    device, configs = triton_device.of(q), kernels("decode_configs")
    arch, size = device.arch, q.element_size()
    fold = softcap is None and alibi_slopes is None and scale > 0.0
    plan = configs.plan(
        m * group, d, dv, size, arch, page_size, unit, fold, precision(q, arch), gpu_decode.LEAST
    )
    tiles = -(-m * group // plan.block_m) * batch * heads_k
    processors = getattr(device, "multiprocessors", gpu_decode.MULTIPROCESSORS)
    splits = gpu_decode.splits(tiles, n, processors)
    partial = None
    if splits > 1:  # of each row and split Dv sums of values, the maximum, the sum of weights
        partial = q.new_empty(batch * heads * m * splits * (dv + 2), dtype=torch.float32)
    scale, softcap = score_factors(scale, softcap)
    left, right = limits(causal, window, m + n)
    args = (
        q, k_cache, v_cache, o, lse, partial, q_strides, k_strides, v_strides, o_strides, seqlens_k, length_stride,
        block_table, table_strides, page_size, page_bits, k_new, v_new, new_strides, batch, heads_k, group, m, n, scale,
        softcap, left, right, sinks, alibi_slopes, splits,
    )  # fmt: skip
    programs = tiles * splits if k_new is None else tiles * (splits + 1)
    module = kernels("flash_decode")
    device.launch(module.flash_decode_kernel, (programs,), args, plan.options)
    if partial is not None:
        sums = (
            partial, o, lse, o_strides, seqlens_k, length_stride, heads, group, m, n, left, right, sinks, splits,
        )  # fmt: skip
        grid = (batch * heads * m, plan.merge_programs)
        device.launch(module.merge_kernel, grid, sums, plan.merge)


def in_units(*tensors: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides in units), for kernels that must not see 24 as a number that 16 does not divide."""
    all_strides = [strides(t) for t in tensors]
    if all(t.shape[3] % 16 == 0 for t in tensors):
        return 1, all_strides
    unit = gcd(16, *(s for x in all_strides for s in x))
    return unit, [tuple(s // unit for s in x) for x in all_strides]
