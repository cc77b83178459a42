"""A padded batch without its padding: which rows are kept, and the mask that packed layers get."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The T positions of a padded batch [B, S] that an encoder computes, row after row.

    keys, bool [B, S]: the tokens that others attend to, as in the attention mask.
    rows [T]: position s of row b, as b * S + s, ascending. ``key_rows`` [K]: which of these T are
    keys; None: all. The rest only attend. cu_queries and cu_keys [B + 1]: where each row of the
    batch begins among the T and the K, as for pyfuse.varlen_attention.
    """

    keys: Tensor
    rows: Tensor
    cu_queries: Tensor
    key_rows: Tensor | None
    cu_keys: Tensor

    @classmethod
    def of(cls, kept: Tensor, keys: Tensor) -> Packing:
        """From bool [B, S]: the positions to compute, and those of them that are attended to."""
        rows = kept.view(-1).nonzero().squeeze(1)
        cu_queries = _starts(kept)
        key_rows, cu_keys = None, cu_queries
        if not torch.equal(kept, keys):
            key_rows = keys.view(-1).index_select(0, rows).nonzero().squeeze(1)
            cu_keys = _starts(keys)
        return cls(keys, rows, cu_queries, key_rows, cu_keys)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]"""
        return x.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...], zeros where nothing was computed."""
        whole = x.new_zeros((self.keys.numel(), *x.shape[2:]))
        return whole.index_copy_(0, self.rows, x[0]).unflatten(0, self.keys.shape)

    def right_padded(self) -> bool:
        """Whether each row of the batch is some keys and then padding that is left out."""
        place = torch.arange(self.keys.shape[1], device=self.keys.device)
        right = place < self.keys.sum(1)[:, None]
        return self.key_rows is None and torch.equal(right, self.keys)


def _starts(chosen: Tensor) -> Tensor:
    """[B, S] bool -> [B + 1]: 0 and the running count of the chosen."""
    starts = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(chosen.sum(1), 0, out=starts[1:])
    return starts


class PackedMask:
    """The attention mask of packed layers: a row sees the keys of its own sequence.

    window: and only those at most (left, right) positions away; every kept row is a key then.
    """

    __slots__ = ("packing", "window")

    def __init__(self, packing: Packing, window: tuple[int, int] | None = None) -> None:
        self.packing = packing
        self.window = window

    def dense(self) -> Tensor:
        """bool [1, 1, T, T]: what any other attention function would need."""
        packing = self.packing
        place = torch.arange(len(packing.rows), device=packing.rows.device)
        sequence = torch.bucketize(place, packing.cu_queries[1:], right=True)
        visible = sequence[:, None] == sequence
        if packing.key_rows is not None:
            visible &= torch.zeros_like(place).index_fill_(0, packing.key_rows, 1).bool()
        if self.window is not None:
            left, right = self.window
            visible &= (place[:, None] - place <= left) & (place - place[:, None] <= right)
        return visible[None, None]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The same for eager attention: 0 and the lowest number of ``dtype``."""
        visible = self.dense()
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
        return torch.where(visible, torch.zeros_like(hidden), hidden)
