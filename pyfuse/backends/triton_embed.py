"""The embedding sum on the Triton kernels: the forward's call."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor

from pyfuse.backends import gpu_embed, triton_device
from pyfuse.backends.gpu_embed import vector
from pyfuse.backends.triton_device import dropout_words, kernels


def why_not_embed(token_ids: Tensor, weight: Tensor, **options: Any) -> str | None:
    return gpu_embed.why_not(triton_device.why_not, token_ids, weight, **options)


def embed(token_ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See pyfuse.embed. A token with an id outside of its table gives NaN, and nothing is read for it: to raise
    IndexError, the host would have to wait for the GPU. With TRITON_DEBUG=1 the kernel stops there, as torch's do."""
    return _embed(None, token_ids, weight, **options)


def forward(
    token_ids: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    statistics = gpu_embed.new_statistics(token_ids, weight, **options)
    return _embed(statistics, token_ids, weight, **options), (statistics,)


def _embed(
    statistics: Tensor | None,
    token_ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sparse: bool = False,
    **rows: Any,
) -> Tensor:
    tokens, d = token_ids.numel(), weight.shape[1]
    y = weight.new_empty((*token_ids.shape, d))
    if y.numel() == 0:
        return y
    device = triton_device.of(weight)
    size = weight.element_size()
    unit, source = sources(16 // size, token_ids, weight, **rows)
    launch = kernels("position_configs").gather(
        d, size, unit, norm_weight is not None, bool(rows.get("sinusoidal")), device.arch
    )
    args: tuple[Any, ...] = (
        *source, vector(norm_weight), vector(norm_bias), y, statistics,
        tokens, scale, eps, *dropout_words(dropout_p, dropout_seed),
    )  # fmt: skip
    module = kernels("embedding")
    if launch.wide:
        kernel = module.embed_wide_kernel
    else:
        kernel = module.embed_kernel
        args = (*args, launch.stretches)
    device.launch(kernel, (launch.programs(tokens),), args, launch.options)
    return y


def sources(
    unit: int, token_ids: Tensor, weight: Tensor, **rows: Any
) -> tuple[int, tuple[Any, ...]]:
    """(what strides are counted in: `unit` elements or what of it divides them all, the arguments that say which rows
    are summed up: see kernels/embedding.py)."""
    tables, ids, length, turns = gpu_embed.sources(token_ids, weight, **rows)
    strides = [0 if t is None else t.stride(0) for t in tables]
    unit = gcd(unit, *strides)
    return unit, (
        tables,
        *[stride // unit for stride in strides],
        *[0 if t is None else t.shape[0] for t in tables],
        ids,
        length,
        turns,
    )
