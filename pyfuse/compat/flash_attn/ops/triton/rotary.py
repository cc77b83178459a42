"""flash_attn.ops.triton.rotary 2.8.3: the rotary position embedding (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import pyfuse


class _Places(NamedTuple):
    """The rows of the tables that tokens are turned by: `positions`, or a slice that starts at `first`."""

    positions: Tensor | None
    first: int

    def of(self, table: Tensor, tokens: int) -> Tensor:
        """The table as pyfuse.rope takes it beside `positions`."""
        return table if self.positions is not None else table[self.first : self.first + tokens]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the pairs of x's first R elements by the angles of their token; copy the other D - R.

        y1 = x1·cos - x2·sin, y2 = x2·cos + x1·sin

    x [B, S, H, D], or packed [T, H, D] with cu_seqlens [B + 1] and max_seqlen, which is at least the longest of them.
    cos, sin [P, R/2], R ≤ D, floating-point: token i of its sequence takes row i + its seqlen_offsets (an int, or [B]
      in int32 or int64). Packed rows of no sequence take row 0.
    interleaved: the pairs are elements 2i and 2i + 1, else i and i + R/2. conjugate: turn the other way, by -sin.
    inplace: write into x and return it; refused where a gradient of x is wanted.

    Computed in float32 (float64 for float64). ValueError, TypeError: an argument that does not fit; IndexError: a
    position from a tensor of offsets beyond the table (on a GPU, which nothing waits for: NaN), where the library
    leaves the token as it is.
    """
    places = _places_of(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    tokens = x.shape[-3]
    cos, sin = (
        _for_rope(x, cos, places, tokens),
        _for_rope(x, -sin if conjugate else sin, places, tokens),
    )
    heads_first = x.transpose(-3, -2)
    y = pyfuse.rope(
        heads_first if x.dim() == 4 else heads_first[None],
        cos,
        sin,
        layout="interleaved" if interleaved else "half",
        positions=places.positions,
        inplace=inplace,
    )
    return x if inplace else (y if x.dim() == 4 else y[0]).transpose(-3, -2)


def _for_rope(x: Tensor, table: Tensor, places: _Places, tokens: int) -> Tensor:
    """The rows of a table, in x's dtype or in float32."""
    table = places.of(table, tokens)
    return table if table.dtype == x.dtype else table.float()


def _places_of(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> _Places:
    """Where x's tokens stand, after all checks of sizes."""
    tokens = _check_x(x, cu_seqlens, max_seqlen)
    _check_tables(x, cos, sin)
    if isinstance(seqlen_offsets, Tensor):
        last = tokens
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_offsets(seqlen_offsets, batch, x)
    else:
        if not isinstance(seqlen_offsets, int) or seqlen_offsets < 0:
            raise ValueError(
                f"seqlen_offsets: got {seqlen_offsets!r}, needs an int of 0 or more, or a tensor [B]"
            )
        last = tokens + seqlen_offsets
    if last > cos.shape[0]:
        raise ValueError(f"cos: {cos.shape[0]} rows, but tokens stand at up to {last}")
    if cu_seqlens is not None:
        return _Places(_packed_positions(cu_seqlens, seqlen_offsets, x.shape[0]), 0)
    if isinstance(seqlen_offsets, Tensor):
        return _Places(seqlen_offsets[:, None] + torch.arange(tokens, device=x.device), 0)
    return _Places(None, seqlen_offsets)


def _packed_positions(cu_seqlens: Tensor, seqlen_offsets: int | Tensor, rows: int) -> Tensor:
    """[rows], int64."""
    if cu_seqlens.shape[0] == 1:
        return torch.zeros(rows, dtype=torch.int64, device=cu_seqlens.device)
    bounds = cu_seqlens.to(torch.int64)
    row = torch.arange(rows, device=bounds.device)
    after = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
    sequence = after.clamp(max=bounds.shape[0] - 2)
    offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    inside = (after == sequence) & (row >= bounds[0])
    return torch.where(inside, row - bounds[sequence] + offset, 0)


def _check_x(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """The number of tokens of the longest sequence."""
    if cu_seqlens is None:
        if x.dim() != 4:
            raise ValueError(f"x: expected [B, S, H, D], got shape {tuple(x.shape)}")
        return x.shape[1]
    if x.dim() != 3:
        raise ValueError(f"x: expected [T, H, D] beside cu_seqlens, got shape {tuple(x.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected [B + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, needs torch.int32 or torch.int64")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens: on {cu_seqlens.device}, but x is on {x.device}")
    if max_seqlen is None:
        raise ValueError("max_seqlen: got None, needs the longest length beside cu_seqlens")
    return max_seqlen


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos: expected [P, R/2] with R of at most x's head size {x.shape[-1]}, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if not table.is_floating_point():
            raise TypeError(f"{name}: dtype {table.dtype}, needs a floating-point one")


def _check_offsets(offsets: Tensor, batch: int, x: Tensor) -> None:
    if offsets.shape != (batch,):
        raise ValueError(f"seqlen_offsets: expected ({batch},), got {tuple(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlen_offsets: dtype {offsets.dtype}, needs torch.int32 or torch.int64")
    if offsets.device != x.device:
        raise ValueError(f"seqlen_offsets: on {offsets.device}, but x is on {x.device}")
