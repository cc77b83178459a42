"""The attention functions of flash_attn.flash_attn_interface 2.8.3 (Dao, arXiv:2307.08691), on any device.

    out[i] = sum_j dropout(softmax_j(s[i, j])) · v[j]
    s[i, j] = softcap(softmax_scale · q[i]·k[j]) - alibi_slopes[h] · |i + N - M - j|

B batch, S tokens, M queries, N keys, T packed tokens, Hq and Hk heads, D head size. In all of them
  dropout_p: 0 in evaluation. softmax_scale: D**-0.5 by default.
  causal: query i sees no key beyond i + N - M, so that the last query sees the last key.
  window_size: (left, right), the keys seen before and after i + N - M; a negative number is no limit.
  softcap: s ← softcap · tanh(s / softcap); 0 or less is none.
  alibi_slopes: [Hq] or [B, Hq], float32 or q's dtype.
  deterministic: either way every result has the same bits from run to run.
  return_attn_probs: return (out, softmax_lse, S_dmask), in float32 (float64 for float64) the logarithm of each row's
    sum of exp(s), and an empty tensor. Not together with dropout_p > 0 (NotImplementedError).
A query that sees no key has out = 0 and softmax_lse = +inf. float64, float32, bfloat16 and float16; any D.
ValueError and TypeError name the argument that does not fit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyfuse.compat.flash_attn import _attend, _kvcache
from pyfuse.compat.flash_attn import _checks as check

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv [B, S, 3, H, D]; returns out [B, S, H, D] (and softmax_lse [B, H, S])."""
    check.check_packed("qkv", qkv, 5, 3)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q [B, M, Hq, D] and kv [B, N, 2, Hk, D]."""
    check.check_packed("kv", kv, 5, 2)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, M, Hq, D] over k [B, N, Hk, D] and v [B, N, Hk, Dv], Hq a multiple of Hk.

    Query head h reads key head h // (Hq / Hk). Returns out [B, M, Hq, Dv]; with return_attn_probs
    (out, softmax_lse [B, Hq, M], S_dmask).
    """
    options = check.score_options(softmax_scale, causal, window_size, softcap)
    options["dropout_p"] = dropout_p
    return _attend.attend(q, k, v, options, alibi_slopes, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv [T, 3, H, D]; returns out [T, H, D] (and softmax_lse [H, T])."""
    check.check_packed("qkv", qkv, 4, 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q [T, Hq, D] and kv [Tk, 2, Hk, D]."""
    check.check_packed("kv", kv, 4, 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of B sequences of different lengths, packed one after another.

    q [T, Hq, D]; k [Tk, Hk, D]; v [Tk, Hk, Dv]. cu_seqlens_q, cu_seqlens_k [B + 1], int32 or int64: sequence b has the
      queries cu_seqlens_q[b] up to cu_seqlens_q[b + 1], exclusive, and sees its own keys only. M and N are those of
      each sequence, and may be 0.
    max_seqlen_q, max_seqlen_k: at least the longest of them. Read only where queries are padded: with alibi_slopes
      [B, Hq] and with block_table.
    block_table [B, pages_per_sequence], int32 or int64: k and v are [pages, page_size, Hk, D], and key j of sequence b
      is in page block_table[b, j // page_size]; of cu_seqlens_k only the lengths count then. Without dropout and
      without a gradient of k and v (NotImplementedError).

    Returns out [T, Hq, Dv]; with return_attn_probs (out, softmax_lse [Hq, T], S_dmask).
    """
    options = check.score_options(softmax_scale, causal, window_size, softcap)
    options["dropout_p"] = dropout_p
    cu_seqlens, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    rest = (cu_seqlens, longest, options, alibi_slopes, return_attn_probs)
    if block_table is not None:
        return _attend.attend_pages(q, (k, v), block_table, *rest)
    return _attend.attend_packed(q, k, v, *rest)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q [B, M, Hq, D] over a cache, to which k and v are appended in place first. No gradients.

    k_cache, v_cache: [Bc, N, Hk, D]; with block_table [B, pages_per_sequence] [pages, page_size, Hk, D], of any page
      size. cache_batch_idx [B]: the row of the cache that is sequence b's (without it Bc = B, and row b).
    cache_seqlens: an int or [B], how many tokens are in the cache already; all of its N by default.
    k, v [B, S, Hk, D]: written to the places cache_seqlens[b] … cache_seqlens[b] + S - 1. The queries stand on the
      last M keys after that. They need cache_seqlens. S and M may differ.
    cache_leftpad [B]: the first key of each sequence; what stands before is padding. Not with block_table.
    rotary_cos, rotary_sin [P, R / 2]: turn k's tokens by the angles of the places that they are written to, and with
      causal or a window q's by those of cache_seqlens[b] + i; without either all of q's by that of cache_seqlens[b].
      Pairs are interleaved (rotary_interleaved) or halves. Only with k.
    num_splits: has no effect; pyfuse cuts the cache by itself, and results do not depend on it.

    Returns out [B, M, Hq, D], and with return_softmax_lse (out, softmax_lse [B, Hq, M]).
    Lengths and indices: int32 or int64, on q's device. Where they are in the CPU's memory, those beyond the cache
    raise ValueError.
    """
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits: got {num_splits!r}, needs an int of 0 or more")
    cache = _kvcache.Cache(k_cache, v_cache, block_table, cache_batch_idx, cache_leftpad)
    rotary = _kvcache.Rotary(rotary_cos, rotary_sin, bool(rotary_interleaved))
    options = check.score_options(softmax_scale, causal, window_size, softcap)
    out, lse = _kvcache.attend(q, cache, k, v, cache_seqlens, rotary, options, alibi_slopes)
    return (out, lse) if return_softmax_lse else out
