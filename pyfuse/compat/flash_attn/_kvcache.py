"""flash_attn_with_kvcache: what it appends to a cache, and how pyfuse reads that cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyfuse
from pyfuse.compat.flash_attn import _checks as check
from pyfuse.compat.flash_attn._attend import decode_by_slopes, library_lse
from pyfuse.ops._checks import bind_dims, require_floating, same_dtype_device, unit_last_stride


class Cache(NamedTuple):
    """Keys and values in any of the library's three arrangements."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    batch_idx: Tensor | None
    leftpad: Tensor | None

    def specs(self) -> dict[str, tuple[Tensor, str]]:
        rows = "B N" if self.batch_idx is None else "Bc N"
        if self.block_table is not None:
            rows = "pages page_size"
        return {"k_cache": (self.k, f"{rows} Hk D"), "v_cache": (self.v, f"{rows} Hk Dv")}

    def check(self, batch: int, device: torch.device) -> None:
        """ValueError, TypeError: the table and the indices do not fit."""
        table = self.block_table
        if table is not None:
            for name, other in (
                ("cache_batch_idx", self.batch_idx),
                ("cache_leftpad", self.leftpad),
            ):
                if other is not None:
                    raise ValueError(f"{name}: given beside block_table, needs one of the two")
            if not isinstance(table, Tensor) or table.dim() != 2:
                raise ValueError("block_table: expected a tensor [B, pages_per_sequence]")
            check.check_integers("block_table", table, (batch, table.shape[1]), device)
        if self.batch_idx is not None:
            check.check_integers("cache_batch_idx", self.batch_idx, (batch,), device)
            check.check_range(
                "cache_batch_idx", self.batch_idx, 0, self.k.shape[0] - 1, "a row of the cache"
            )
        if self.leftpad is not None:
            check.check_integers("cache_leftpad", self.leftpad, (batch,), device)

    def room(self) -> int:
        """The number of keys that a sequence can have."""
        n: int = self.k.shape[1]
        return n if self.block_table is None else n * self.block_table.shape[1]

    def append(self, new: tuple[Tensor, Tensor], place: Tensor) -> None:
        """Write new k and v [B, S, Hk, D] to the places [B, S] of their sequences."""
        if self.block_table is not None:
            page_size = self.k.shape[1]
            block = self.block_table.long().gather(1, place // page_size)
            place = place % page_size
        elif self.batch_idx is not None:
            block = self.batch_idx.long()[:, None]
        else:
            block = torch.arange(place.shape[0], device=place.device)[:, None]
        self.k[block, place] = new[0]
        self.v[block, place] = new[1]

    def for_pyfuse(self, lengths: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Caches and options of decode_attention: [B, Hk, N, D], or pages [pages, Hk, page_size, D] and a table.

        A row of a larger cache is one page of N keys; a sequence that begins within its row has pages of one key.
        """
        rows, n = self.k.shape[:2]
        if self.leftpad is not None:
            batch = lengths.shape[0]
            row = self.batch_idx
            if row is None:
                row = torch.arange(batch, device=lengths.device)
            place = self.leftpad.long()[:, None] + torch.arange(n, device=lengths.device)
            keys = row.long()[:, None] * n + place.clamp(max=n - 1)
            k, v = (x.reshape(rows * n, *x.shape[2:])[:, :, None] for x in (self.k, self.v))
            return (k, v), {"seqlens_k": lengths - self.leftpad, "block_table": keys}
        table = self.block_table if self.batch_idx is None else self.batch_idx[:, None]
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        return (k, v), {"seqlens_k": lengths, "block_table": table}


class Rotary(NamedTuple):
    """The angles for q and k, if any."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool

    def check(self, appends: bool) -> None:
        if (self.cos is None) != (self.sin is None):
            missing = "rotary_cos" if self.cos is None else "rotary_sin"
            raise ValueError(f"{missing}: got None, needs both rotary_cos and rotary_sin")
        if self.cos is not None and not appends:
            raise ValueError("rotary_cos: given without k and v, which it is to turn, needs them")

    def turn(self, x: Tensor, place: Tensor) -> Tensor:
        """x [B, S, H, D] by the angles of the places [B, S]."""
        if self.cos is None or self.sin is None:
            return x
        layout = "interleaved" if self.interleaved else "half"
        turned = pyfuse.rope(x.transpose(1, 2), self.cos, self.sin, layout=layout, positions=place)
        return turned.transpose(1, 2)


@torch.no_grad()
def attend(
    q: Tensor,
    cache: Cache,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    rotary: Rotary,
    options: dict[str, Any],
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See flash_attn_with_kvcache. options: those of pyfuse.decode_attention."""
    batch, heads, queries = _check(q, cache, k, v)
    check.check_slopes(alibi_slopes, batch, heads)
    rotary.check(k is not None)
    before = _lengths(cache_seqlens, cache.room(), batch, q, k is not None)
    added = 0 if k is None else k.shape[1]
    room = cache.room() - added
    check.check_range("cache_seqlens", before, 0, room, "what the cache has room for")
    if cache.leftpad is not None:
        check.check_range(
            "cache_leftpad", before + added - cache.leftpad, 0, cache.room(), "keys that are left"
        )
    q, caches, arrangement = check.dense(q), *cache.for_pyfuse(before + added)
    if k is not None and v is not None:
        place = before.long()[:, None] + torch.arange(added, device=q.device)
        new = (rotary.turn(check.dense(k), place), check.dense(v))
        aligned = options["causal"] or options["window"] is not None
        steps = torch.arange(queries, device=q.device) * int(aligned)
        q = rotary.turn(q, before.long()[:, None] + steps)
        own_slopes = check.slopes_of_sequences(alibi_slopes, batch) is not None
        if added == queries and cache.leftpad is None and not own_slopes:
            arrangement |= {"k_new": new[0].transpose(1, 2), "v_new": new[1].transpose(1, 2)}
        else:
            cache.append(new, place)
            caches, arrangement = cache.for_pyfuse(before + added)
    o, lse = decode_by_slopes(q.transpose(1, 2), caches, {**options, **arrangement}, alibi_slopes)
    return o.transpose(1, 2), library_lse(lse)


def _check(q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None) -> tuple[int, int, int]:
    """Sizes, dtypes and devices of all tensors; returns B, Hq and M."""
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing}: got None, but {given} is given, needs both or neither")
    specs = {"q": (q, "B M Hq D"), **cache.specs()}
    if k is not None and v is not None:
        specs |= {"k": (k, "B S Hk D"), "v": (v, "B S Hk Dv")}
    dims = bind_dims(**specs)
    check.check_heads(dims, "k_cache")
    require_floating(q=q)
    same_dtype_device(**{name: tensor for name, (tensor, _) in specs.items()})
    unit_last_stride(k_cache=cache.k, v_cache=cache.v)
    cache.check(dims["B"], q.device)
    return dims["B"], dims["Hq"], dims["M"]


def _lengths(
    cache_seqlens: int | Tensor | None, room: int, batch: int, q: Tensor, appends: bool
) -> Tensor:
    """cache_seqlens as a tensor [B]."""
    if cache_seqlens is None:
        if appends:
            raise ValueError("cache_seqlens: got None, needs the lengths to append k and v to")
        cache_seqlens = room
    if isinstance(cache_seqlens, int):
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    check.check_integers("cache_seqlens", cache_seqlens, (batch,), q.device)
    return cache_seqlens
