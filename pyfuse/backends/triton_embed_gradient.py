"""The gradient of the embedding sum on the Triton kernels: the launches."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import gpu_embed_gradient, triton_device
from pyfuse.backends.gpu_embed import vector
from pyfuse.backends.gpu_embed_gradient import Order, edges_of
from pyfuse.backends.triton_device import DropoutWords, dropout_words, kernels
from pyfuse.backends.triton_embed import sources

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
    return gpu_embed_gradient.backward(Kernels(), grads, tensors, options, saved, needs)


class Kernels:
    """See gpu_embed_gradient.Kernels."""

    def dropout(self, p: float, seed: Tensor | None) -> DropoutWords | None:
        return None if p == 0.0 else dropout_words(p, seed)

    def through_norm(
        self,
        dy: Tensor,
        dropout: DropoutWords | None,
        token_ids: Tensor,
        weight: Tensor,
        statistics: Tensor,
        options: dict[str, Any],
        dsum: bool,
        sums: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        tokens, d = dy.shape
        device = triton_device.of(dy)
        configs, module = kernels("position_configs"), kernels("embedding_bwd")
        unit = gcd(configs.BACKWARD_UNIT, dy.stride(0))
        unit, source = sources(unit, token_ids, weight, **options)
        launch = configs.gather_backward(d, unit, device.arch)
        parts = configs.norm_sums(d, unit, device.arch) if launch.wide else launch
        programs = parts.programs(tokens, configs.BACKWARD_TOKENS)

        def room(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device=dy.device) if wanted else None

        rows, shares = room(dsum, tokens, d), room(sums, programs // parts.stretches, 2 * d)

        def start(kernel: Any, plan: Any, programs: int, *more: Tensor | None) -> None:
            words = dropout or NO_DROPOUT
            scale = options.get("scale", 1.0)
            args = (*source, statistics, dy, dy.stride(0) // unit, *more, tokens, scale, *words)
            device.launch(kernel, (programs,), args, plan.options)

        norm = vector(options["norm_weight"])
        if not launch.wide:
            start(module.embed_backward_kernel, launch, programs, norm, rows, shares)
        if launch.wide and rows is not None:
            start(module.embed_wide_backward_kernel, launch, launch.programs(tokens), norm, rows)
        if launch.wide and shares is not None:
            start(module.embed_norm_sums_kernel, parts, programs, shares)
        return rows, shares

    def sum_once(
        self, rows: Tensor, order: Order, out: Tensor, scale: float, dropout: DropoutWords | None
    ) -> tuple[Tensor, Tensor] | None:
        height, d = out.shape
        device = triton_device.of(rows)
        unit = gcd(16 // rows.element_size(), rows.stride(0))
        configs = kernels("position_configs")
        launch = configs.row_sums(d, unit, dropout is not None, device.arch)
        chunks = -(-order.tokens // launch.chunk)
        left = edges_of(chunks, d, order, rows.device) if chunks > 1 else None
        args = (
            rows, rows.stride(0) // launch.unit, *order, out, height, scale, *(left or (None, None)),
            *(dropout or NO_DROPOUT), launch.stretches,
        )  # fmt: skip
        kernel = kernels("row_sums").row_sums_kernel
        device.launch(kernel, (chunks * launch.stretches,), args, launch.options)
        return left
