"""Attention of few queries over a cache on the CUDA kernels: the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device, gpu_decode
from pyfuse.backends.cuda_attention import call_arguments
from pyfuse.backends.cuda_device import address, integers
from pyfuse.backends.gpu_attention import strides


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
    **options: Any,
) -> None:
    """Write o, lse if it is there, and what is new into the cache. Lengths and tables stay on the GPU."""
    batch, heads, m, d = q.shape
    _, heads_k, page_size, dv = v_cache.shape
    keys = page_size * (1 if block_table is None else block_table.shape[1])
    if v_cache.numel() == 0:
        keys = 0
    rows = rows_of_a_tile(m * heads // heads_k, max(d, dv), q.element_size())
    tiles = -(-m * heads // heads_k // rows) * batch * heads_k
    device = cuda_device.of(q)
    splits = gpu_decode.splits(tiles, keys, device.multiprocessors)
    partial = None
    if splits > 1:  # of each row and split Dv sums of values, the maximum, the sum of weights
        size = batch * heads * m * splits * (-(-dv // 4) * 4 + 2)
        partial = q.new_empty(size, dtype=torch.float32)
    new = () if k_new is None or v_new is None else (k_new, v_new)
    call, tensors = call_arguments(
        q, k_cache, v_cache, None, None, (o, *new), seqlens_k=seqlens_k, keys=keys, **options
    )
    table_strides = (0, 0) if block_table is None else block_table.stride()
    new_strides = [
        x for t in (k_new, v_new) for x in (address(t), (0, 0, 0) if t is None else strides(t))
    ]
    arguments = (
        *call, o.data_ptr(), strides(o), address(lse),
        *integers(block_table), table_strides, max(page_size, 1), len(new), *new_strides,
        rows, splits, address(partial),
    )  # fmt: skip
    device.call("attention_decode", arguments, (*tensors, o, lse, block_table, *new, partial))


def rows_of_a_tile(rows: int, d: int, size: int) -> int:
    """16, or 32 where there are so many and their sums fit the registers: what is read of the cache serves them all."""
    return 32 if rows > 16 and size == 2 and d <= 128 else 16
