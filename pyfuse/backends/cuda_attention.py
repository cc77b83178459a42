"""Attention on the CUDA kernels, padded and packed: the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_device import DTYPE, address, integers
from pyfuse.backends.gpu_attention import limits, score_factors, strides
from pyfuse.backends.gpu_attention_ops import Call

Arguments = tuple[Any, ...]


def write(call: Call, o: Tensor, lse: Tensor | None) -> None:
    """Write o, and lse where one is given."""
    arguments, tensors = call_arguments(*call[:5], (o,), **call.options)
    rows = (o.data_ptr(), strides(o), address(lse), lse_strides(lse))
    cuda_device.of(o).call("attention_forward", (*arguments, *rows), (*tensors, o, lse))


def call_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    others: tuple[Tensor, ...],
    *,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
    keys: int | None = None,
    seqlens_k: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Arguments, tuple[Tensor | None, ...]]:
    """The call in the order in which csrc/api/cuda_arguments.h reads it, and the tensors that it tells of.

    others: tensors of rows beside q, k and v that the kernels read or write; keys: N, where k and v are in pages.
    """
    if cu_q is None:
        batch, heads, m, d = q.shape
        groups, n, dv = v.shape[1:]
    else:
        batch = cu_q.shape[0] - 1
        m, heads, d = q.shape
        n, groups, dv = v.shape
    n = n if keys is None else keys
    left, right = limits(causal, window, m + n)
    slopes, sink = _floats(alibi_slopes), _floats(sinks)
    lengths, bounds_q, bounds_k = _dense(seqlens_k), _dense(cu_q), _dense(cu_k)
    factor, cap = score_factors(scale, softcap)
    kind = 0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = -1 if mask.dtype == torch.bool else DTYPE[mask.dtype]
        mask_strides = mask.expand(batch, heads, m, n).stride()  # zero where broadcast
    arguments: Arguments = (
        DTYPE[q.dtype], (batch, heads, heads // groups, m, n, d, dv),
        q.data_ptr(), strides(q), k.data_ptr(), strides(k), v.data_ptr(), strides(v), aligned(q, k, v, *others),
        factor, cap or 0.0, -1 if left is None else left, -1 if right is None else right,
        address(slopes), address(sink), *integers(lengths), *integers(bounds_q), *integers(bounds_k),
        address(mask), kind, mask_strides, *cuda_device.dropout_words(dropout_p, dropout_seed),
    )  # fmt: skip
    return arguments, (q, k, v, slopes, sink, lengths, bounds_q, bounds_k, mask)


def aligned(*tensors: Tensor) -> int:
    """Whether rows start at multiples of 16 bytes and are so long, as copies of 16 bytes need: all rows of a tile,
    those beyond the tensor too, of which nothing is read. Strides of a single batch or head do not matter."""

    bits = 0  # of all addresses and distances together: this is asked before every launch
    for t in tensors:
        batch, head, row = strides(t)
        apart = row | t.shape[-1]
        if t.shape[0] > 1:
            apart |= batch
        if t.shape[1] > 1:
            apart |= head
        bits |= t.data_ptr() | apart * t.element_size()
    return int(bits % 16 == 0)


def lse_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of batch and head in [B, Hq, M] or [Hq, T]."""
    if t is None:
        return (0, 0)
    return t.stride()[:2] if t.ndim == 3 else (0, t.stride(0))


def _floats(t: Tensor | None) -> Tensor | None:
    """A few numbers, one for each head, as the kernels read them."""
    return None if t is None else t.float().contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
