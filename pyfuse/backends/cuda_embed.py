"""The embedding sum on the CUDA kernels: the forward's call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyfuse.backends import cuda_device, gpu_embed
from pyfuse.backends.cuda_device import DTYPE, address, integers

Arguments = tuple[Any, ...]


def why_not_embed(token_ids: Tensor, weight: Tensor, **options: Any) -> str | None:
    return gpu_embed.why_not(cuda_device.why_not, token_ids, weight, **options)


def embed(token_ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See pyfuse.embed. A token with an id outside of its table gives NaN, and nothing is read for it: to raise
    IndexError, the host would have to wait for the GPU."""
    return _embed(None, token_ids, weight, options)


def forward(
    token_ids: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    statistics = gpu_embed.new_statistics(token_ids, weight, **options)
    return _embed(statistics, token_ids, weight, options), (statistics,)


def _embed(
    statistics: Tensor | None, token_ids: Tensor, weight: Tensor, options: dict[str, Any]
) -> Tensor:
    y = weight.new_empty((*token_ids.shape, weight.shape[1]))
    if y.numel() == 0:
        return y
    call, tensors = call_arguments(token_ids, weight, **options)
    arguments = (*call, y.data_ptr(), address(statistics))
    cuda_device.of(weight).call("embed", arguments, (*tensors, y, statistics))
    return y


def call_arguments(
    token_ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    **rows: Any,
) -> tuple[Arguments, tuple[Tensor | None, ...]]:
    """The call in the order in which csrc/api/cuda_embed.cpp reads it, and the tensors that it tells of."""
    tables, ids, length, turns = gpu_embed.sources(token_ids, weight, **rows)
    parameters = gpu_embed.vector(norm_weight), gpu_embed.vector(norm_bias)
    tokens = token_ids.numel()
    arguments: Arguments = (DTYPE[weight.dtype], tokens, weight.shape[1])
    for table, numbers in zip(tables, ids, strict=True):
        rows_of = (0, 0, -1) if table is None else (address(table), table.stride(0), len(table))
        arguments += (*rows_of, *integers(numbers))
    arguments += (tokens if length is None else length, address(turns))
    for t in parameters:
        arguments += (address(t), 0 if t is None else DTYPE[t.dtype])
    arguments += (scale, eps, *cuda_device.dropout_words(dropout_p, dropout_seed))
    return arguments, (*tables, *ids, turns, *parameters)
