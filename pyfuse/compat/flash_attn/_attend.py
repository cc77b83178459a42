"""Attention of whole batches and of packed sequences, in flash-attn's layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyfuse
from pyfuse.compat.flash_attn import _checks as check
from pyfuse.compat.flash_attn._padding import RightAligned
from pyfuse.ops._checks import bind_dims


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    """q [B, M, Hq, D]; k [B, N, Hk, D]; v [B, N, Hk, Dv]. options: those of pyfuse.attention."""
    dims = bind_dims(q=(q, "B M Hq D"), k=(k, "B N Hk D"), v=(v, "B N Hk Dv"))
    check.check_heads(dims, "k")
    check.check_slopes(alibi_slopes, dims["B"], dims["Hq"])
    check.check_probabilities(return_attn_probs, options["dropout_p"])
    heads_first = [check.dense(x).transpose(1, 2) for x in (q, k, v)]
    o, lse = _by_slopes(heads_first, options, alibi_slopes)
    return results(o.transpose(1, 2), lse, q, return_attn_probs)


def _by_slopes(
    heads_first: list[Tensor],
    options: dict[str, Any],
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, M, Dv] and lse [B, Hq, M]. key_mask [B, N]: True for a key, False for padding."""
    batch = heads_first[0].shape[0]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    slopes = check.slopes_of_sequences(alibi_slopes, batch)
    if slopes is None:
        shared = alibi_slopes if alibi_slopes is not None and alibi_slopes.dim() == 1 else None
        o, lse = pyfuse.attention(
            *heads_first, mask=mask, alibi_slopes=shared, return_lse=True, **options
        )
        return o, lse
    parts = [
        pyfuse.attention(
            *(x[b : b + 1] for x in heads_first),
            mask=None if mask is None else mask[b : b + 1],
            alibi_slopes=slopes[b],
            return_lse=True,
            **options,
        )
        for b in range(batch)
    ]
    return joined(parts)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    options: dict[str, Any],
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    """q [T, Hq, D]; k [Tk, Hk, D]; v [Tk, Hk, Dv]; cu_seqlens of queries and of keys [B + 1]."""
    dims = bind_dims(q=(q, "T Hq D"), k=(k, "Tk Hk D"), v=(v, "Tk Hk Dv"))
    batch = check_packed(q, dims, cu_seqlens, max_seqlens, alibi_slopes)
    check.check_probabilities(return_attn_probs, options["dropout_p"])
    q, k, v = (check.dense(x) for x in (q, k, v))
    slopes = check.slopes_of_sequences(alibi_slopes, batch)
    if slopes is None:
        shared = alibi_slopes if alibi_slopes is not None and alibi_slopes.dim() == 1 else None
        o, lse = pyfuse.varlen_attention(
            q, k, v, *cu_seqlens, alibi_slopes=shared, return_lse=True, **options
        )
        return results(o, lse, q, return_attn_probs)
    rows = RightAligned("max_seqlen_q", cu_seqlens[0], max_seqlens[0], q.shape[0])
    keys = RightAligned("max_seqlen_k", cu_seqlens[1], max_seqlens[1], k.shape[0])
    heads_first = [rows.pad(q), keys.pad(k), keys.pad(v)]
    o, lse = _by_slopes(heads_first, options, slopes, keys.real)
    return results(rows.pack(o), rows.pack_lse(lse), q, return_attn_probs)


def attend_pages(
    q: Tensor,
    pages: tuple[Tensor, Tensor],
    block_table: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    options: dict[str, Any],
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    """q [T, Hq, D]; k and v [pages, page_size, Hk, ...]: sequence b's keys are in its pages block_table[b]."""
    k, v = pages
    dims = bind_dims(q=(q, "T Hq D"), k=(k, "pages page_size Hk D"), v=(v, "pages page_size Hk Dv"))
    batch = check_packed(q, dims, cu_seqlens, max_seqlens, alibi_slopes)
    options = dict(options)
    if options.pop("dropout_p") > 0.0:
        raise NotImplementedError("dropout_p: above 0 beside block_table, needs 0.0")
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise NotImplementedError("k, v: require grad, but pages of block_table have no gradient")
    if not isinstance(block_table, Tensor) or block_table.dim() != 2:
        raise ValueError("block_table: expected a tensor [B, pages_per_sequence]")
    check.check_integers("block_table", block_table, (batch, block_table.shape[1]), q.device)
    lengths = cu_seqlens[1].diff()
    room = block_table.shape[1] * dims["page_size"]
    check.check_range("cu_seqlens_k", lengths, 0, room, "the keys of a sequence in its pages")
    rows = RightAligned("max_seqlen_q", cu_seqlens[0], max_seqlens[0], q.shape[0])
    o, lse = decode_by_slopes(
        rows.pad(check.dense(q)),
        (check.dense(k).transpose(1, 2), check.dense(v).transpose(1, 2)),
        {**options, "seqlens_k": lengths, "block_table": block_table},
        alibi_slopes,
    )
    return results(rows.pack(o), rows.pack_lse(lse), q, return_attn_probs)


def decode_by_slopes(
    q: Tensor, caches: tuple[Tensor, Tensor], options: dict[str, Any], alibi_slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """pyfuse.decode_attention, once for each sequence where alibi_slopes is [B, Hq]."""
    batch = q.shape[0]
    slopes = check.slopes_of_sequences(alibi_slopes, batch)
    if slopes is None:
        shared = alibi_slopes if alibi_slopes is not None and alibi_slopes.dim() == 1 else None
        o, lse = pyfuse.decode_attention(
            q, *caches, alibi_slopes=shared, return_lse=True, **options
        )
        return o, lse
    parts = []
    for b in range(batch):
        one = {**options, "seqlens_k": options["seqlens_k"][b : b + 1]}
        table = options.get("block_table")
        if table is not None:
            one["block_table"] = table[b : b + 1]
        own = caches if table is not None else tuple(x[b : b + 1] for x in caches)
        parts.append(
            pyfuse.decode_attention(
                q[b : b + 1], *own, alibi_slopes=slopes[b], return_lse=True, **one
            )
        )
    return joined(parts)


def check_packed(
    q: Tensor,
    dims: dict[str, int],
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    alibi_slopes: Tensor | None,
) -> int:
    """What packed queries have in common; the number of sequences."""
    check.check_heads(dims, "k")
    first = cu_seqlens[0]
    if not isinstance(first, Tensor) or first.dim() != 1 or first.shape[0] == 0:
        raise ValueError("cu_seqlens_q: expected a tensor [B + 1], of one value or more")
    for name, values in zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True):
        check.check_integers(name, values, (first.shape[0],), q.device)
    for name, longest in zip(("max_seqlen_q", "max_seqlen_k"), max_seqlens, strict=True):
        check.check_longest(name, longest)
    batch = first.shape[0] - 1
    check.check_slopes(alibi_slopes, batch, dims["Hq"])
    return batch


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One batch of the results of its sequences; in memory heads come after rows, as in flash-attn."""
    o = torch.cat([o.transpose(1, 2) for o, _ in parts]).transpose(1, 2)
    return o, torch.cat([lse for _, lse in parts])


def results(o: Tensor, lse: Tensor, q: Tensor, return_attn_probs: bool) -> Any:
    """out, or (out, softmax_lse, S_dmask) with the empty S_dmask that flash-attn has without dropout."""
    if not return_attn_probs:
        return o
    return o, library_lse(lse), torch.empty(0, dtype=q.dtype, device=q.device)


def library_lse(lse: Tensor) -> Tensor:
    """The library marks a query that sees no key by +inf, where pyfuse has log(0) = -inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
