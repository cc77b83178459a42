"""Packed sequences as a padded batch and back, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.compat.flash_attn import _checks as check


class RightAligned:
    """Where the rows of packed sequences stand in a batch of `longest` rows whose padding comes first.

    The last rows of all sequences are then in one line, so that attention, which aligns the last query with the last
    key, aligns each sequence as it would alone.
    """

    def __init__(self, name: str, cu_seqlens: Tensor, longest: int, rows: int) -> None:
        longest = int(longest)
        bounds = cu_seqlens.to(torch.int64)
        lengths = bounds.diff()
        check.check_range(name, lengths, 0, longest, "the lengths of all sequences")
        place = torch.arange(longest, device=bounds.device) - (longest - lengths)[:, None]
        self.rows = rows
        self.real = place >= 0  # [B, longest]
        # Row `rows` is one that all padding shares.
        self.index = torch.where(self.real, bounds[:-1, None] + place, rows)

    def pad(self, x: Tensor) -> Tensor:
        """[rows, H, D] -> [B, H, longest, D], zeros where there is no row."""
        spare = x.new_zeros((1, *x.shape[1:]))
        return torch.cat([x, spare])[self.index].transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, longest, D] -> [rows, H, D], zeros in rows of no sequence."""
        return self._pack(x.transpose(1, 2), 0.0)

    def pack_lse(self, lse: Tensor) -> Tensor:
        """[B, H, longest] -> [H, rows]."""
        return self._pack(lse.transpose(1, 2), -torch.inf).transpose(0, 1)

    def _pack(self, x: Tensor, empty: float) -> Tensor:
        packed = x.new_full((self.rows + 1, *x.shape[2:]), empty)
        return packed.index_put((self.index,), x)[: self.rows]
