"""The gradient of the embedding sum on the Triton kernels: through norm and dropout, then to the rows of each table."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.triton_device import DropoutWords, dropout_words, kernels
from pyfuse.backends.triton_embed import sources, vector

NORM = ("norm_weight", "norm_bias")
NO_DROPOUT: DropoutWords = (None, None, None, None)


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
    tokens, d = token_ids.numel(), weight.shape[1]
    if dy is None or dy.numel() == 0:
        return {name: _nothing(name, weight, options) for name in needs}
    dy = dy.reshape(tokens, d)
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    dropout = dropout_words(options.get("dropout_p", 0.0), options.get("dropout_seed"))
    found, rows = {}, dy
    if saved[0] is not None:
        dsum, sums = _through_norm(dy, dropout, token_ids, weight, saved[0], options, needs)
        for i, name in enumerate(NORM):
            if name in needs and sums is not None:
                found[name] = sums[i * d : (i + 1) * d].to(options[name].dtype)
        rows, dropout = dy if dsum is None else dsum, NO_DROPOUT
    if "weight" in needs:
        scale = options.get("scale", 1.0)
        if options.get("sparse"):
            found["weight"] = _sparse(rows, token_ids, weight, scale, dropout)
        else:
            found["weight"] = row_sums(rows, _sorted(token_ids, weight), weight, scale, dropout)
    if "position_weight" in needs:
        table = options["position_weight"]
        order = _order_of_positions(token_ids, options.get("positions"), table)
        found["position_weight"] = row_sums(rows, order, table, 1.0, dropout)
    if "segment_weight" in needs:
        table = options["segment_weight"]
        order = _sorted(options["segment_ids"], table)
        found["segment_weight"] = row_sums(rows, order, table, 1.0, dropout)
    return found


def _nothing(name: str, weight: Tensor, options: dict[str, Any]) -> Tensor:
    t = weight if name == "weight" else options[name]
    if name == "weight" and options.get("sparse"):
        none = torch.empty((1, 0), dtype=torch.int64, device=t.device)
        return torch.sparse_coo_tensor(none, t.new_empty((0, t.shape[1])), t.shape)
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


def _through_norm(
    dy: Tensor,
    dropout: DropoutWords,
    token_ids: Tensor,
    weight: Tensor,
    statistics: Tensor,
    options: dict[str, Any],
    needs: frozenset[str],
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of the sum of each token's rows, [2·D] those of the norm's weight and bias), float32, if needed."""
    tokens, d = dy.shape
    device = triton_device.of(dy)
    configs, module = kernels("position_configs"), kernels("embedding_bwd")
    unit = gcd(configs.BACKWARD_UNIT, dy.stride(0))
    unit, source = sources(unit, token_ids, weight, **options)
    launch = configs.gather_backward(d, unit, device.arch)
    parts = configs.norm_sums(d, unit, device.arch) if launch.wide else launch
    programs = parts.programs(tokens, configs.BACKWARD_TOKENS)
    dsum = sums = None
    if not needs <= set(NORM):
        dsum = torch.empty((tokens, d), dtype=torch.float32, device=dy.device)
    if not needs.isdisjoint(NORM):
        shape = (programs // parts.stretches, 2 * d)
        sums = torch.empty(shape, dtype=torch.float32, device=dy.device)

    def start(kernel: Any, plan: Any, programs: int, *more: Tensor | None) -> None:
        scale = options.get("scale", 1.0)
        args = (*source, statistics, dy, dy.stride(0) // unit, *more, tokens, scale, *dropout)
        device.launch(kernel, (programs,), args, plan.options)

    norm = vector(options["norm_weight"])
    if not launch.wide:
        start(module.embed_backward_kernel, launch, programs, norm, dsum, sums)
    if launch.wide and dsum is not None:
        start(module.embed_wide_backward_kernel, launch, launch.programs(tokens), norm, dsum)
    if launch.wide and sums is not None:
        start(module.embed_norm_sums_kernel, parts, programs, sums)
    if sums is None:
        return dsum, None
    every = Order(None, None, sums.shape[0], 1, sums.shape[0])
    return dsum, row_sums(sums, every, sums[:1], 1.0, NO_DROPOUT)[0]


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
    rows: Tensor, order: Order, table: Tensor, scale: float, dropout: DropoutWords
) -> Tensor:
    """Like table: for each of its rows the sum of the tokens' rows that have its id, times scale; after dropout."""
    height, d = table.shape
    out = torch.zeros((height, d), dtype=table.dtype, device=rows.device)
    if height == 0:
        return out
    device = triton_device.of(rows)
    configs, kernel = kernels("position_configs"), kernels("row_sums").row_sums_kernel
    while True:
        unit = gcd(16 // rows.element_size(), rows.stride(0))
        launch = configs.row_sums(d, unit, dropout[0] is not None, device.arch)
        chunks = -(-order.tokens // launch.chunk)
        edges = edge_ids = None
        if chunks > 1:
            edges = torch.empty((2 * chunks, d), dtype=torch.float32, device=rows.device)
            wide = order.ids is not None and order.ids.dtype is torch.int64
            kind = torch.int64 if wide else torch.int32
            edge_ids = torch.empty(2 * chunks, dtype=kind, device=rows.device)
        args = (
            rows, rows.stride(0) // launch.unit, *order, out, height, scale, edges, edge_ids, *dropout,
            launch.stretches,
        )  # fmt: skip
        device.launch(kernel, (chunks * launch.stretches,), args, launch.options)
        if edges is None:
            return out
        rows, dropout = edges, NO_DROPOUT
        order = Order(edge_ids, None, None, None, 2 * chunks)


def _sparse(
    rows: Tensor, token_ids: Tensor, weight: Tensor, scale: float, dropout: DropoutWords
) -> Tensor:
    """As torch.nn.functional.embedding has it: a row for each token, not added up."""
    if dropout[0] is not None:
        own = Order(None, None, None, None, rows.shape[0])
        values = row_sums(rows, own, weight[:1].expand(rows.shape), scale, dropout)
    else:
        values = (rows if scale == 1.0 else rows.float() * scale).to(weight.dtype)
    indices = token_ids.reshape(1, -1).to(torch.int64)
    return torch.sparse_coo_tensor(
        indices, values, weight.shape, check_invariants=False, is_coalesced=False
    )
