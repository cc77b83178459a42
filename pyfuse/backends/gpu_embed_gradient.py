"""The embedding sum's gradient of backends for GPUs: the order of tokens that share a row, and all but the launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NORM = ("norm_weight", "norm_bias")


class Kernels(Protocol):
    """What each of these backends has of its own. dropout: as it tells its kernels, None for none."""

    def dropout(self, p: float, seed: Tensor | None) -> Any: ...

    def through_norm(
        self,
        dy: Tensor,
        dropout: Any,
        token_ids: Tensor,
        weight: Tensor,
        statistics: Tensor,
        options: dict[str, Any],
        dsum: bool,
        sums: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the gradient of the sum of each token's rows, shares [parts, 2·D] of those of the norm's weight and bias),
        float32, those that are wanted."""

    def sum_once(
        self, rows: Tensor, order: Order, out: Tensor, scale: float, dropout: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Write scale · the sums of the runs that are whole to their rows of out [height, D]; (rows, ids) of what is
        left to be summed up by the next launch, unscaled."""


def backward(
    kernels: Kernels,
    grads: Sequence[Tensor | None],
    tensors: tuple[Tensor, Tensor],
    options: dict[str, Any],
    saved: tuple[Tensor | None, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    (dy,), (token_ids, weight) = grads, tensors
    tokens, d = token_ids.numel(), weight.shape[1]
    if dy is None or dy.numel() == 0:
        return {name: _nothing(name, weight, options) for name in needs}
    dy = dy.reshape(tokens, d)
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    dropout = kernels.dropout(options.get("dropout_p", 0.0), options.get("dropout_seed"))
    found, rows = {}, dy
    if saved[0] is not None:
        wanted = not needs <= set(NORM), not needs.isdisjoint(NORM)
        dsum, shares = kernels.through_norm(
            dy, dropout, token_ids, weight, saved[0], options, *wanted
        )
        if shares is not None:
            every = Order(None, None, len(shares), 1, len(shares))
            sums = row_sums(kernels, shares, every, shares[:1], 1.0, None)[0]
            for i, name in enumerate(NORM):
                if name in needs:
                    found[name] = sums[i * d : (i + 1) * d].to(options[name].dtype)
        rows, dropout = dy if dsum is None else dsum, None
    if "weight" in needs:
        scale = options.get("scale", 1.0)
        if options.get("sparse"):
            found["weight"] = _sparse(kernels, rows, token_ids, weight, scale, dropout)
        else:
            order = _sorted(token_ids, weight)
            found["weight"] = row_sums(kernels, rows, order, weight, scale, dropout)
    if "position_weight" in needs:
        table = options["position_weight"]
        order = _order_of_positions(token_ids, options.get("positions"), table)
        found["position_weight"] = row_sums(kernels, rows, order, table, 1.0, dropout)
    if "segment_weight" in needs:
        table = options["segment_weight"]
        order = _sorted(options["segment_ids"], table)
        found["segment_weight"] = row_sums(kernels, rows, order, table, 1.0, dropout)
    return found


def _nothing(name: str, weight: Tensor, options: dict[str, Any]) -> Tensor:
    t = weight if name == "weight" else options[name]
    if name == "weight" and options.get("sparse"):
        none = torch.empty((1, 0), dtype=torch.int64, device=t.device)
        return torch.sparse_coo_tensor(none, t.new_empty((0, t.shape[1])), t.shape)
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


class Order(NamedTuple):
    """Tokens in ascending order of their ids: token[j] = order[j // repeat] + j % repeat · length has ids[j // repeat].
    Without ids or order, j // repeat itself; without repeat, 1. tokens: how many."""

    ids: Tensor | None
    order: Tensor | None
    repeat: int | None
    length: int | None
    tokens: int


_KEYS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _sorted(ids: Tensor, table: Tensor, repeat: int | None = None) -> Order:
    """Sorted in the smallest integers that hold them, since the GPU sorts bit by bit; those outside of the table stay
    outside."""
    ids, height = ids.reshape(-1), table.shape[0]
    key = next(dtype for dtype in _KEYS if height <= torch.iinfo(dtype).max)
    if key is not ids.dtype:
        ids = ids.clamp(-1, height).to(key)
    found = torch.sort(ids, stable=True)
    count = ids.numel()
    return Order(found.values, found.indices, repeat, repeat and count, count * (repeat or 1))


def _order_of_positions(token_ids: Tensor, positions: Tensor | None, table: Tensor) -> Order:
    tokens, length = token_ids.numel(), token_ids.shape[-1]
    repeat = tokens // length
    if positions is None:
        return Order(None, None, repeat, length, tokens)
    return _sorted(positions, table, None if positions.numel() == tokens else repeat)


def row_sums(
    kernels: Kernels, rows: Tensor, order: Order, table: Tensor, scale: float, dropout: Any
) -> Tensor:
    """Like table: for each of its rows the sum of the tokens' rows that have its id, times scale; after dropout."""
    height, d = table.shape
    out = torch.zeros((height, d), dtype=table.dtype, device=rows.device)
    left = None if height == 0 else kernels.sum_once(rows, order, out, scale, dropout)
    while left is not None:
        edges, ids = left
        left = kernels.sum_once(edges, Order(ids, None, None, None, len(edges)), out, scale, None)
    return out


def edges_of(chunks: int, d: int, order: Order, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for two sums of each chunk and their ids."""
    wide = order.ids is not None and order.ids.dtype is torch.int64
    kind = torch.int64 if wide else torch.int32
    edges = torch.empty((2 * chunks, d), dtype=torch.float32, device=device)
    return edges, torch.empty(2 * chunks, dtype=kind, device=device)


def _sparse(
    kernels: Kernels, rows: Tensor, token_ids: Tensor, weight: Tensor, scale: float, dropout: Any
) -> Tensor:
    """As torch.nn.functional.embedding has it: a row for each token, not added up."""
    if dropout is not None:
        own = Order(None, None, None, None, rows.shape[0])
        values = row_sums(kernels, rows, own, weight[:1].expand(rows.shape), scale, dropout)
    else:
        values = (rows if scale == 1.0 else rows.float() * scale).to(weight.dtype)
    indices = token_ids.reshape(1, -1).to(torch.int64)
    return torch.sparse_coo_tensor(
        indices, values, weight.shape, check_invariants=False, is_coalesced=False
    )
