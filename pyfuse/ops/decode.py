"""Attention of a few new queries over a cache of keys and values that grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.ops import _attention_checks as check
from pyfuse.ops._autocast import autocast_enabled, for_attention
from pyfuse.ops._checks import bind_dims, require_floating, same_dtype_device, unit_last_stride

Window = check.Window


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of the newest M tokens of each sequence over a cache that holds, or is given, them.

    q [B, Hq, M, D], M small. seqlens_k [B], int32 or int64: the keys in each sequence's cache, the
      M new ones included. The last query stands on the last of them, seqlens_k[b] - 1: causal,
      window and alibi_slopes count from there, where `attention` would count from N.
    The cache is one of
      contiguous: k_cache [B, Hk, N, D], v_cache [B, Hk, N, Dv], seqlens_k[b] <= N;
      paged: k_cache [pages, Hk, page_size, D], v_cache [pages, Hk, page_size, Dv], block_table
      [B, pages_per_seq], int32 or int64 (Kwon et al., arXiv:2309.06180): key j of sequence b lies
      in page block_table[b, j // page_size]. Entries beyond a sequence's length are not used, nor
      are those before its window; sequences may share pages.
    k_new [B, Hk, M, D], v_new [B, Hk, M, Dv]: written into the cache first, in place, as the keys
      and values seqlens_k[b] - M ... seqlens_k[b] - 1; without them the cache has to hold those
      already. No two sequences may share what is written to. Values only: the cache and what is
      appended must not require a gradient (q, sinks and alibi_slopes may).

    Everything else as in `attention`. Returns o [B, Hq, M, Dv], and with return_lse lse [B, Hq, M].
    ValueError, beside those of `attention`: a sequence longer than the cache has room for, or shorter than
    what is appended or than 0 (looked at where the lengths are in the CPU's memory; elsewhere it would be a
    sync); a cache to append to whose elements share memory, as an expanded one's.
    """
    k_spec, v_spec = "B Hk N D", "B Hk N Dv"
    if block_table is not None:
        k_spec, v_spec = "pages Hk page_size D", "pages Hk page_size Dv"
    specs = {"q": (q, "B Hq M D"), "k_cache": (k_cache, k_spec), "v_cache": (v_cache, v_spec)}
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    appends = k_new is not None or v_new is not None
    if appends:
        new = _checked_new(k_cache, v_cache, k_new, v_new)
        specs |= {"k_new": (new["k_new"], "B Hk M D"), "v_new": (new["v_new"], "B Hk M Dv")}
        tensors |= new
    dims = bind_dims(**specs)
    if autocast_enabled():
        if k_new is not None and v_new is not None:  # the cache is written to, so all follow it
            q, k_new, v_new = (t.to(k_cache.dtype) for t in (q, k_new, v_new))
            tensors |= {"q": q, "k_new": k_new, "v_new": v_new}
        else:
            q, k_cache, v_cache, sinks, alibi_slopes = for_attention(
                (q, k_cache, v_cache), sinks, alibi_slopes
            )
            tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    require_floating(q=q)
    same_dtype_device(**tensors)
    unit_last_stride(**tensors)
    check.check_heads(dims, "k_cache")
    check.check_lengths("seqlens_k", seqlens_k, q, "B", dims["B"])
    capacity = k_cache.shape[2]
    if block_table is not None:
        check.check_block_table(block_table, q)
        capacity *= block_table.shape[1]
    check.check_capacity(seqlens_k, capacity, dims["M"] if appends else 0)
    check.check_scores(q, dims["Hq"], softcap, sinks, alibi_slopes)
    options = {
        "seqlens_k": seqlens_k,
        "block_table": block_table,
        "causal": causal,
        "window": check.resolve_window(window),
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "scale": check.resolve_scale(scale, dims["D"]),
        "return_lse": return_lse,
    }
    return dispatch.run("decode_attention", (q, k_cache, v_cache, k_new, v_new), options, backend)


def _checked_new(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor | None, v_new: Tensor | None
) -> dict[str, Tensor]:
    """What is appended, by name; ValueError where it cannot be."""
    if k_new is None or v_new is None:
        missing, given = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise ValueError(f"{missing}: got None, but {given} is given, needs both or neither")
    new = {"k_new": k_new, "v_new": v_new}
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    for name, t in (caches | new).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires grad, but appending to the cache in place is not differentiable "
                "(detach it, or call this under torch.no_grad())"
            )
    for name, t in caches.items():
        strides = t.stride()
        if 0 in strides and any(s == 0 and n > 1 for s, n in zip(strides, t.shape, strict=True)):
            raise ValueError(
                f"{name}: strides {strides} share memory between elements, needs a cache of its own "
                f"to append to (call {name}.contiguous())"
            )
    return new
