"""Modules for what a transformer knows of places: embeddings with positions, rotations, sinusoids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse import ops
from pyfuse.nn.layers import LayerNorm
from pyfuse.ops.rope import LAYOUTS

POSITIONS = ("learned", "sinusoidal", None)


class InputEmbedding(nn.Module):
    """e = dropout(norm(scale · token row + position row + segment row)), in one operation: `pyfuse.embed`.

    num_embeddings V, embedding_dim D: of the tokens' table.
    position: "learned", a table of max_positions rows (GPT-2, BERT); "sinusoidal" (Vaswani et al., arXiv:1706.03762,
      who also have scale = sqrt(D)); None, nothing.
    num_segments: rows of BERT's token types; 0 for none.
    norm: LayerNorm with `eps` after the sum. dropout: the share of the result that is dropped in training.

    Parameters: token.weight [V, D]; position.weight [max_positions, D], segment.weight [num_segments, D],
    norm.weight and norm.bias [D] where there are such. Initial values are those of torch.nn.Embedding and LayerNorm.
    ValueError: a size or position that does not fit.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        position: str | None = "learned",
        max_positions: int | None = None,
        num_segments: int = 0,
        scale: float = 1.0,
        norm: bool = False,
        eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position: got {position!r}, needs one of {POSITIONS}")
        if (max_positions is not None) != (position == "learned"):
            needs = "the length of a learned table" if position == "learned" else "None"
            raise ValueError(
                f"max_positions: got {max_positions} with position={position!r}, needs {needs}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token = nn.Embedding(num_embeddings, embedding_dim, **made)
        self.position = (
            None if max_positions is None else nn.Embedding(max_positions, embedding_dim, **made)
        )
        self.segment = nn.Embedding(num_segments, embedding_dim, **made) if num_segments else None
        self.norm = LayerNorm(embedding_dim, eps, **made) if norm else None
        self.kind, self.scale, self.dropout = position, scale, dropout

    def forward(
        self, token_ids: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """token_ids [..., T]; positions [T] or [..., T], by default 0 … T-1; segment_ids [..., T], by default 0.

        Returns [..., T, D]. IndexError: an id outside its table; the other errors are those of `pyfuse.embed`.
        """
        if self.segment is None and segment_ids is not None:
            raise ValueError("segment_ids: got a tensor, but the module has num_segments=0")
        if self.segment is not None and segment_ids is None:
            segment_ids = torch.zeros_like(token_ids)
        return self._embed(
            token_ids,
            self.token.weight,
            position_weight="sinusoidal"
            if self.kind == "sinusoidal"
            else None
            if self.position is None
            else self.position.weight,
            positions=positions,
            segment_ids=segment_ids,
            segment_weight=None if self.segment is None else self.segment.weight,
            scale=self.scale,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_bias=None if self.norm is None else self.norm.bias,
            eps=1e-5 if self.norm is None else self.norm.eps,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _embed(self, *tensors: Tensor, **options: Any) -> Tensor:
        """Who computes; the reference Transformer may run on torch."""
        return ops.embed(*tensors, **options)

    def extra_repr(self) -> str:
        return f"position={self.kind!r}, scale={self.scale:g}, dropout={self.dropout:g}"


# Frequencies of these follow the length of the sequence.
_ADAPTIVE = frozenset(("dynamic", "longrope"))


class RotaryEmbedding(nn.Module):
    """Queries and keys turned by the angles of their positions: `pyfuse.rope_pair`. Su et al., arXiv:2104.09864.

    head_dim, theta, scaling, max_positions: as in `pyfuse.rope_frequencies`, which knows Hugging Face's scalings.
    layout: "half" (Llama, GPT-NeoX) or "interleaved" (GPT-J, the paper).

    It has no parameters and no state. Its tables are float32 whatever dtype the module is cast to.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        layout: str = "half",
        max_positions: int = 2048,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, needs one of {', '.join(LAYOUTS)}")
        if max_positions <= 0:
            raise ValueError(f"max_positions: expected a positive length, got {max_positions}")
        self.head_dim, self.theta, self.layout = head_dim, theta, layout
        self.scaling = None if scaling is None else dict(scaling)
        self.max_positions = max_positions
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
        self._adaptive = kind in _ADAPTIVE
        self._tables: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._make_tables(max_positions, torch.device("cpu"))  # what is wrong is said here

    def _make_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequencies, factor = ops.rope_frequencies(
            self.head_dim, theta=self.theta, scaling=self.scaling, seq_len=length,
            max_position_embeddings=self.max_positions, device=device,
        )  # fmt: skip
        rows = max(length, self.max_positions)
        angles = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * frequencies
        self._tables, self._length = (angles.cos() * factor, angles.sin() * factor), length
        return self._tables

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [P, R/2] float32 for sequences of this length; P is at least that and max_positions."""
        kept = self._tables
        if kept is None or kept[0].device != device:
            return self._make_tables(length, device)
        if self._adaptive and max(length, self.max_positions) != max(
            self._length, self.max_positions
        ):
            return self._make_tables(length, device)
        if length > kept[0].shape[0]:
            return self._make_tables(2 * length, device)
        return kept

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, Hq, M, D], k [B, Hk, M, D] -> the same, turned. positions [M] or [B, M], by default 0 … M-1.

        IndexError: a position from max_positions (and M) on; the other errors are those of `pyfuse.rope_pair`.
        """
        m = q.shape[-2] if q.dim() >= 2 else 0
        cos, sin = self.tables(m, q.device)
        if positions is None:
            cos, sin = cos[:m], sin[:m]
        return self._turn(q, k, cos, sin, layout=self.layout, positions=positions)

    def _turn(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """See InputEmbedding._embed."""
        return ops.rope_pair(*tensors, **options)

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.head_dim}, theta={self.theta:g}, layout={self.layout!r}{scaling}"


class SinusoidalEncoding(nn.Module):
    """y = dropout(scale · x + PE), PE of `pyfuse.sinusoidal_encoding`. Vaswani et al., arXiv:1706.03762, section 3.5.

    x [B, T, D], or [T, B, D] with batch_first=False, or [T, D]. The sum is taken in float32 or wider and rounded once.
    With a table of tokens before it, `InputEmbedding` does both in one operation.
    """

    def __init__(
        self, dim: int, dropout: float = 0.0, *, scale: float = 1.0, base: float = 10000.0,
        batch_first: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim <= 0:
            raise ValueError(f"dim: expected a positive size, got {dim}")
        self.dim, self.scale, self.base, self.batch_first = dim, scale, base, batch_first
        self.dropout = nn.Dropout(dropout)
        self._table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-1] != self.dim:
            raise ValueError(
                f"x: expected [B, T, {self.dim}] or [T, {self.dim}], got {tuple(x.shape)}"
            )
        first = x.dim() == 3 and not self.batch_first
        length = x.shape[0] if first else x.shape[-2]
        wide = torch.promote_types(x.dtype, torch.float32)
        table = self._rows(length, wide, x.device)
        if first:
            table = table[:, None]
        return self.dropout(torch.add(table, x, alpha=self.scale).to(x.dtype))

    def _rows(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept = self._table
        if kept is None or kept.shape[0] < length or kept.dtype != dtype or kept.device != device:
            kept = ops.sinusoidal_encoding(
                length, self.dim, base=self.base, dtype=dtype, device=device
            )
            self._table = kept
        return kept[:length]

    def extra_repr(self) -> str:
        return f"{self.dim}, scale={self.scale:g}, batch_first={self.batch_first}"
