"""Attention on the CPU kernels, padded and packed: what they take, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module, why_not_on_cpu


def why_not_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **_: Any
) -> str | None:
    if q.device.type != "cpu":
        return why_not_on_cpu(q)
    if q.dtype not in DTYPE:
        return f"dtype {q.dtype} is none of float32, bfloat16, float16, float64"
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        return "a head size of 0 leaves nothing to compute"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in DTYPE:
        return f"mask dtype {mask.dtype} is none of bool, float32, bfloat16, float16, float64"
    return None


def why_not_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any
) -> str | None:
    return why_not_attention(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.attention."""
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q)) if options["return_lse"] else None
    o = attention_into(lse, q, k, v, options)
    return o if lse is None else (o, lse)


def attention_into(
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """o; writes lse [B, Hq, M], float32 or float64, where one is given."""
    o = empty_like_q(q, v.shape[3])
    if o.numel() > 0:
        arguments, _alive = call_arguments(q, k, v, o, lse, padded_sizes(q, k, v), **options)
        module().attention(arguments)
    return o


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """See pyfuse.varlen_attention. ValueError also for bounds that do not fit q or k."""
    rows, heads, _ = q.shape
    lse = q.new_empty((heads, rows), dtype=lse_dtype(q)) if options["return_lse"] else None
    o = varlen_attention_into(lse, q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    return o if lse is None else (o, lse)


def varlen_attention_into(
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """o; writes lse [Hq, T], float32 or float64, where one is given."""
    rows, heads, _ = q.shape
    o = q.new_empty((rows, heads, v.shape[2]))
    if o.numel() == 0:
        return o
    bounds = few(cu_seqlens_q, torch.int64), few(cu_seqlens_k, torch.int64)
    sizes = packed_sizes(q, k, v, cu_seqlens_q)
    arguments, _alive = call_arguments(q, k, v, o, lse, sizes, **options)
    module().varlen_attention(arguments, *map(address, bounds))
    for outside in rows_outside(cu_seqlens_q, rows):
        o[outside] = 0.0
        if lse is not None:
            sinks = options["sinks"]
            lse[:, outside] = -torch.inf if sinks is None else sinks.to(lse.dtype)[:, None]
    return o


# What the kernels are told ------------------------------------------------------------------------

Sizes = tuple[int, int, int, int, int, int, int]  # B, Hq, Hk, M, N, D, Dv


def padded_sizes(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    batch, heads, rows, d = q.shape
    return batch, heads, k.shape[1], rows, k.shape[2], d, v.shape[3]


def packed_sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Sizes:
    """M and N are here the rows of all sequences together."""
    rows, heads, d = q.shape
    return cu_seqlens.shape[0] - 1, heads, k.shape[1], rows, k.shape[0], d, v.shape[2]


def rows_outside(cu_seqlens: Tensor, rows: int) -> list[slice]:
    """The rows that belong to no sequence: before the first and after the last."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    return [part for part in (slice(0, first), slice(last, rows)) if part.start < part.stop]


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_like_q(q: Tensor, dv: int) -> Tensor:
    """o in the memory order of q: a [B, M, H, D] view gives a [B, M, H, Dv] view, so nothing is copied later."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, rows, heads, dv)).transpose(1, 2)
    return q.new_empty((batch, heads, rows, dv))


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def strides(t: Tensor | None) -> tuple[int, ...]:
    """Of batch, head and row; a packed tensor [T, H, D] has no batch."""
    if t is None:
        return (0, 0, 0)
    return t.stride() if t.ndim == 4 else (0, t.stride(1), t.stride(0))


def lse_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of batch and head in [B, Hq, M] or [Hq, T]."""
    if t is None:
        return (0, 0)
    return t.stride() if t.ndim == 3 else (0, t.stride(0))


def few(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A few numbers (one for each head or sequence) as the kernels read them."""
    return None if t is None else t.to(dtype).contiguous()


def call_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    sizes: Sizes,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    return_lse: bool,
    seqlens_k: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The call in the order in which csrc/api/attention.cpp reads it, and tensors to keep until it is done."""
    left, right = (-1, -1) if window is None else window
    lengths, seed = few(seqlens_k, torch.int64), few(dropout_seed, torch.int64)
    sink, slope = few(sinks, torch.float64), few(alibi_slopes, torch.float64)
    arguments: tuple[Any, ...] = (
        sizes, DTYPE[q.dtype], q.data_ptr(), strides(q), k.data_ptr(), strides(k), v.data_ptr(), strides(v),
        o.data_ptr(), strides(o), address(lse), lse_strides(lse),
        0 if lse is None else DTYPE[lse.dtype], scale, softcap or 0.0,
        left, 0 if causal else right, address(lengths), address(sink), address(slope),
        dropout_p, address(seed), torch.get_num_threads(), address(mask),
    )  # fmt: skip
    if mask is not None:
        mask = mask.expand(sizes[0], sizes[1], sizes[3], sizes[4])  # zero strides where broadcast
        code = -1 if mask.dtype == torch.bool else DTYPE[mask.dtype]
        arguments = (*arguments, mask.stride(), code)
    return arguments, (lengths, seed, sink, slope)
