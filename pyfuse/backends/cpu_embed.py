"""Launchers of csrc/cpu/embed.cpp and its gradient, csrc/cpu/embed_gradient.cpp and row_sums.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import DTYPE, module
from pyfuse.sinusoids import sinusoids

TABLES = ("weight", "position_weight", "segment_weight")
_MOST_SINUSOIDS = 1 << 24  # elements of a table that is kept


def why_not_embed(token_ids: Tensor, weight: Tensor, **options: Any) -> str | None:
    for name, t in {"token_ids": token_ids, "weight": weight, **options}.items():
        if not isinstance(t, Tensor):
            continue
        if not t.is_cpu:
            return f"{name} is on {t.device}, not on the CPU"
        if name in TABLES and t.stride(1) != 1 and t.shape[1] > 1:
            return f"{name} has stride {t.stride(1)} in its last dimension, the kernel needs 1"
    if weight.dtype not in DTYPE:
        return f"weight is {weight.dtype}; the kernel has float32, bfloat16, float16 and float64"
    return None


class Table(NamedTuple):
    """One summand: row ids[i % len(ids)] of weight for token i, or row i % id_count without."""

    weight: Tensor
    ids: Tensor | None
    id_count: int

    def address(self) -> tuple[int, int, int, int | None, int]:
        ids = None if self.ids is None else self.ids.data_ptr()
        rows, stride = self.weight.shape[0], self.weight.stride(0)
        return self.weight.data_ptr(), stride, rows, ids, self.id_count


def _table(weight: Tensor, ids: Tensor) -> Table:
    if ids.dtype is not torch.int64 or not ids.is_contiguous():
        ids = ids.to(torch.int64).contiguous()
    return Table(weight, ids, ids.numel())


def _vector(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


class Call(NamedTuple):
    """A call's arguments as the kernels take them. It keeps alive what they are addresses of."""

    tokens: int
    d: int
    dtype: torch.dtype
    wide: torch.dtype  # computed in
    token: Table
    position: Table | None
    segment: Table | None
    scale: float
    norm: tuple[Tensor, Tensor | None, float] | None
    dropout: tuple[Tensor, float] | None
    statistics: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        position, segment = self.position, self.segment
        norm = dropout = None
        if self.norm is not None:
            w, b, eps = self.norm
            norm = (w.data_ptr(), 0 if b is None else b.data_ptr(), eps)
        if self.dropout is not None:
            dropout = (self.dropout[0].data_ptr(), self.dropout[1])
        position_dtype = self.dtype if position is None else position.weight.dtype
        return (
            (
                self.token.address(),
                None if position is None else position.address(),
                None if segment is None else segment.address(),
            ),
            self.tokens,
            self.d,
            DTYPE[self.dtype],
            DTYPE[position_dtype],
            self.scale,
            norm,
            dropout,
            0 if self.statistics is None else self.statistics.data_ptr(),
            torch.get_num_threads(),
        )


def _prepare(
    statistics: Tensor | None,
    token_ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | None = None,
    sinusoidal: bool = False,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sparse: bool = False,
) -> Call:
    wide = _wide(weight.dtype)
    d = weight.shape[1]
    position = segment = norm = dropout = None
    if sinusoidal:
        position = _sinusoids(token_ids.shape[-1], positions, d, wide)
    elif position_weight is not None and positions is not None:
        position = _table(position_weight, positions)
    elif position_weight is not None:
        position = Table(position_weight, None, token_ids.shape[-1])
    if segment_ids is not None and segment_weight is not None:
        segment = _table(segment_weight, segment_ids)
    if norm_weight is not None:
        bias = None if norm_bias is None else _vector(norm_bias, wide)
        norm = (_vector(norm_weight, wide), bias, eps)
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError("dropout_seed: got None, but dropout_p > 0 needs int64 (seed, offset)")
        dropout = (dropout_seed, dropout_p)
    return Call(
        token_ids.numel(),
        d,
        weight.dtype,
        wide,
        _table(weight, token_ids),
        position,
        segment,
        scale,
        norm,
        dropout,
        statistics,
    )


@lru_cache(maxsize=4)
def _first_sinusoids(rows: int, d: int, dtype: torch.dtype) -> Tensor:
    return sinusoids(torch.arange(rows, device="cpu"), d, 10000.0, dtype)


def _sinusoids(length: int, positions: Tensor | None, d: int, dtype: torch.dtype) -> Table:
    """The rows 0, 1, 2, ... are kept from call to call; those of far or negative positions are not."""
    low, end = 0, length
    if positions is not None and positions.numel() > 0:
        low, end = int(positions.min()), int(positions.max()) + 1
    rows = 1 << max(end - 1, 511).bit_length()
    if low >= 0 and rows * d <= _MOST_SINUSOIDS:
        kept = _first_sinusoids(rows, d, dtype)
        return Table(kept, None, length) if positions is None else _table(kept, positions)
    if positions is None:
        positions = torch.arange(length, device="cpu")
    flat = positions.reshape(-1)
    return Table(sinusoids(flat, d, 10000.0, dtype), None, flat.numel())


def embed(token_ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See pyfuse.embed."""
    y = weight.new_empty((*token_ids.shape, weight.shape[1]))
    call = _prepare(None, token_ids, weight, **options)
    module().embed(*call.arguments(), y.data_ptr())
    return y


def forward(
    token_ids: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Saved: mean and 1/deviation of each token, [tokens, 2], where there is a norm."""
    statistics = None
    if options.get("norm_weight") is not None:
        wide = _wide(weight.dtype)
        statistics = torch.empty((token_ids.numel(), 2), dtype=wide, device="cpu")
    y = weight.new_empty((*token_ids.shape, weight.shape[1]))
    call = _prepare(statistics, token_ids, weight, **options)
    module().embed(*call.arguments(), y.data_ptr())
    return y, (statistics,)


def why_not_backward(needs: frozenset[str], *_: Any, **__: Any) -> str | None:
    return None


def backward(
    grads: Sequence[Tensor | None],
    tensors: tuple[Tensor, Tensor],
    options: dict[str, Any],
    saved: tuple[Tensor | None, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    (dy,), (token_ids, weight) = grads, tensors
    call = _prepare(saved[0], token_ids, weight, **options)
    if dy is None:
        dy = torch.zeros((call.tokens, call.d), dtype=call.dtype, device="cpu")
    dy = dy.reshape(-1, call.d) if call.d else dy.new_empty((call.tokens, 0))
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    dsum, dnorm = _through_norm_and_dropout(call, dy, needs)
    gradients = {}
    for row, name in enumerate(("norm_weight", "norm_bias")):
        if name in needs and dnorm is not None:
            gradients[name] = dnorm[row].to(options[name].dtype)
    if "weight" in needs and options.get("sparse"):
        gradients["weight"] = _sparse(dsum, call)
    elif "weight" in needs:
        gradients["weight"] = _row_sums(dsum, call.token, call.dtype, call.scale)
    if "position_weight" in needs and call.position is not None:
        gradients["position_weight"] = _row_sums(dsum, call.position, call.dtype, 1.0)
    if "segment_weight" in needs and call.segment is not None:
        gradients["segment_weight"] = _row_sums(dsum, call.segment, call.dtype, 1.0)
    return gradients


def _through_norm_and_dropout(
    call: Call, dy: Tensor, needs: frozenset[str]
) -> tuple[Tensor, Tensor | None]:
    """(the gradient of the sum of each token's rows, [2, D] those of the norm's weight and bias)."""
    if call.norm is None and call.dropout is None:
        return dy, None
    wants_norm = not needs.isdisjoint(("norm_weight", "norm_bias"))
    dsum = dnorm = None
    if needs - {"norm_weight", "norm_bias"}:
        dsum = torch.empty((call.tokens, call.d), dtype=call.wide, device="cpu")
    if wants_norm:
        empty = call.tokens == 0
        dnorm = (torch.zeros if empty else torch.empty)((2, call.d), dtype=call.wide, device="cpu")
    module().embed_gradient(
        *call.arguments(),
        dy.data_ptr(),
        dy.stride(0),
        0 if dsum is None else dsum.data_ptr(),
        0 if dnorm is None else dnorm.data_ptr(),
    )
    return dy if dsum is None else dsum, dnorm


def _row_sums(rows: Tensor, table: Table, dtype: torch.dtype, scale: float) -> Tensor:
    """The gradient of table.weight, from what each token's row got."""
    gradient = torch.empty(table.weight.shape, dtype=dtype, device="cpu")
    module().row_sums(
        rows.data_ptr(),
        rows.stride(0),
        *rows.shape,
        None if table.ids is None else table.ids.data_ptr(),
        table.id_count,
        gradient.data_ptr(),
        gradient.shape[0],
        DTYPE[rows.dtype],
        DTYPE[dtype],
        scale,
        torch.get_num_threads(),
    )
    return gradient


def _sparse(rows: Tensor, call: Call) -> Tensor:
    """As torch.nn.functional.embedding has it: a row for each token, not added up."""
    assert call.token.ids is not None
    values = (rows if call.scale == 1.0 else rows.to(call.wide) * call.scale).to(call.dtype)
    shape = call.token.weight.shape
    return torch.sparse_coo_tensor(
        call.token.ids.view(1, -1), values, shape, check_invariants=False, is_coalesced=False
    )
