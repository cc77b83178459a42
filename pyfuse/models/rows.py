"""The tokens of one call of a model with a cache: rows of several sequences, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyfuse import ops
from pyfuse.backends.cpu_linear import RowsWeight, why_not_linear
from pyfuse.models.cache import PagedCache, Slot

FEW = 16  # tokens that `decode_attention` is for


def goes_on(slot: Slot, count: int) -> bool:
    """Whether these tokens are few and come after the prompt: `decode_attention`'s.

    Those of a prompt are `varlen_attention`'s, however few are left of it: others may have computed the rest.
    """
    return count <= FEW and slot.length >= slot.prompt


class Rows:
    """N new tokens: counts[b] of slots[b], in order. No padding.

    Made before the layers run, since it reserves places in the cache (`PagedCache.prepare`). What a sequence gets does
    not depend on the others, on the CPU bit by bit. Neither does it depend there on how much of its prompt others have
    computed, unless the model has relative positions, or a window of more than 256 tokens.

    biases: of relative positions (`RelativeBias.tail`), for each sequence.
    """

    biases: list[Tensor] | None = None

    def __init__(self, cache: PagedCache, slots: Sequence[Slot], counts: Sequence[int]) -> None:
        self.cache, self.slots, self.counts = cache, slots, list(counts)
        self.table, self.lengths = cache.prepare(slots, counts)
        self.bounds = list(accumulate(counts, initial=0))
        self.ends = [slot.length + count for slot, count in zip(slots, counts, strict=True)]
        self.longest = max(self.ends)
        at = [i for s, end in zip(slots, self.ends, strict=True) for i in range(s.length, end)]
        self.positions = torch.tensor([at], device=cache.device)  # [1, N]
        self._alike = len(set(counts)) == 1 and all(map(goes_on, slots, counts))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """o [1, H, N, D] of q over the cached tokens and these, whose k and v [1, Hk, N, D] are appended."""
        look = {"window": window, "scale": scale}
        in_pages = self.biases is None and not self.cache.quantized
        if self._alike and in_pages:
            return self._decode(layer, (q, k, v), slice(None), look)
        found = []
        for b, (slot, *new) in enumerate(
            zip(self.slots, *map(self._split, (q, k, v)), strict=True)
        ):
            if in_pages and goes_on(slot, self.counts[b]):
                found.append(self._decode(layer, new, slice(b, b + 1), look))
            else:
                found.append(self._gather(layer, new, b, look))
        return torch.cat(found, 2)

    def look_back(self, layer: int, q: Tensor, scale: float | None) -> Tensor:
        """o [1, H, N, D] of q over the memory of each sequence."""
        memory, look = self.slots[0].memory, {"scale": scale, "causal": False}
        if self._alike and all(slot.memory is memory for slot in self.slots):
            return _attend(q, *memory[layer], True, look)
        parts = zip(self.slots, self._split(q), strict=True)
        return torch.cat(
            [_attend(p, *s.memory[layer], goes_on(s, p.shape[2]), look) for s, p in parts], 2
        )

    def _split(self, t: Tensor) -> tuple[Tensor, ...]:
        """[1, H, N, D] by sequences."""
        return t.split(self.counts, 2)

    def _decode(
        self, layer: int, new: Sequence[Tensor], which: slice, look: dict[str, Any]
    ) -> Tensor:
        """Of sequences with the same number M of tokens, in the cache's pages."""
        m = self.counts[which][0]
        q, k, v = (t[0].unflatten(1, (-1, m)).transpose(0, 1) for t in new)  # [B, H, M, D]
        o: Tensor = ops.decode_attention(
            q, self.cache.k[layer], self.cache.v[layer], seqlens_k=self.lengths[which],
            block_table=self.table[which], k_new=k, v_new=v, **look,
        )  # fmt: skip
        return o.transpose(0, 1).flatten(1, 2)[None]

    def _gather(self, layer: int, new: Sequence[Tensor], b: int, look: dict[str, Any]) -> Tensor:
        """Of one sequence, with the cache's keys and values brought together."""
        (q, k, v), slot = new, self.slots[b]
        self.cache.write(layer, slot, k[0], v[0])
        if slot.length or self.cache.quantized:
            k, v = self.cache.gather(layer, slot, self.ends[b])
        if self.biases is not None:
            o: Tensor = ops.attention(q, k, v, mask=self.biases[b], causal=True, **look)
            return o
        return _attend(q, k, v, goes_on(slot, self.counts[b]), look | {"causal": True})


def _attend(q: Tensor, k: Tensor, v: Tensor, few: bool, look: dict[str, Any]) -> Tensor:
    """`attention` of one sequence by operations that give a query the same bits however many there are."""
    if few:
        keys = torch.tensor([k.shape[2]], dtype=torch.int32, device=k.device)
        o: Tensor = ops.decode_attention(q, k, v, seqlens_k=keys, **look)
        return o
    bounds = [torch.tensor([0, t.shape[2]], device=q.device) for t in (q, k)]
    o = ops.varlen_attention(*(t[0].transpose(0, 1) for t in (q, k, v)), *bounds, **look)
    return o.transpose(0, 1)[None]


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b, without gradients; on the CPU the bits of a row do not depend on how many rows there are.

    Libraries choose their kernels, and with them the order of the sums, by the number of rows. This one has a single
    order, and reads W as fast as memory delivers it.
    """
    if weight.stride(-1) != 1 or why_not_linear(weight) is not None:
        return ops.linear(x, weight, bias)
    return RowsWeight(weight, bias)(x)
