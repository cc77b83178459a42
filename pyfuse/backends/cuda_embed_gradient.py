"""The gradient of the embedding sum on the CUDA kernels: the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device, gpu_embed_gradient
from pyfuse.backends.cuda_device import DTYPE, address
from pyfuse.backends.cuda_embed import call_arguments
from pyfuse.backends.gpu_dropout import Words, words
from pyfuse.backends.gpu_embed_gradient import Order, edges_of

CHUNK = 64  # of csrc/cuda/row_sums.cu
# Columns that a large GPU has under way: the norm's sums are shared out to so many. The order of sums may depend on
# sizes, not on the chip.
COLUMNS = 1 << 20
# One share adds up so many tokens one after the other: of more, float32's rounding would show.
MOST_TOKENS = 128


def why_not_backward(needs: frozenset[str], *_: Any, **__: Any) -> str | None:
    return None


def backward(
    grads: Sequence[Tensor | None],
    tensors: tuple[Tensor, Tensor],
    options: dict[str, Any],
    saved: tuple[Tensor | None, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return gpu_embed_gradient.backward(Kernels(), grads, tensors, options, saved, needs)


class Kernels:
    """See gpu_embed_gradient.Kernels."""

    def dropout(self, p: float, seed: Tensor | None) -> Words | None:
        return words(p, seed)

    def through_norm(
        self,
        dy: Tensor,
        dropout: Words | None,
        token_ids: Tensor,
        weight: Tensor,
        statistics: Tensor,
        options: dict[str, Any],
        dsum: bool,
        sums: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        tokens, d = dy.shape
        slots = min(tokens, max(COLUMNS // d, -(-tokens // MOST_TOKENS), 1))

        def room(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device=dy.device) if wanted else None

        rows, shares = room(dsum, tokens, d), room(sums, slots, 2 * d)
        given = {name: x for name, x in options.items() if name != "sparse"}
        call, read = call_arguments(token_ids, weight, **given)
        arguments = (
            *call, dy.data_ptr(), dy.stride(0), statistics.data_ptr(), address(rows), address(shares), slots,
        )  # fmt: skip
        device = cuda_device.of(dy)
        device.call("embed_through_norm", arguments, (*read, dy, statistics, rows, shares))
        return rows, shares

    def sum_once(
        self, rows: Tensor, order: Order, out: Tensor, scale: float, dropout: Words | None
    ) -> tuple[Tensor, Tensor] | None:
        """The arguments in the order in which csrc/api/cuda_embed.cpp reads them."""
        height, d = out.shape
        chunks = -(-order.tokens // CHUNK)
        left = edges_of(chunks, d, order, rows.device) if chunks > 1 else None
        edges, edge_ids = left or (None, None)
        id_bytes = 0 if order.ids is None else order.ids.element_size()
        arguments = (
            DTYPE[out.dtype], DTYPE[rows.dtype], rows.data_ptr(), rows.stride(0), address(order.ids), id_bytes,
            address(order.order), order.repeat or 1, order.length or 0, order.tokens, d, out.data_ptr(), height, scale,
            address(edges), address(edge_ids), *(dropout or (0, 0, 0, 1.0)),
        )  # fmt: skip
        tensors = (rows, order.ids, order.order, out, edges, edge_ids)
        cuda_device.of(rows).call("row_sums", arguments, tensors)
        return left
