"""The sum that a transformer starts with: token, position and segment."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.ops._autocast import autocast_enabled, for_tables
from pyfuse.ops._random import draw_seed


def embed(
    token_ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | Literal["sinusoidal"] | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """e = dropout(norm(scale · weight[token] + position row + segment row)).

    token_ids [..., T] (int64 or int32); weight [V, D], floating point. Returns [..., T, D] in
      weight's dtype; everything in float32 (float64 for float64), rounded once.
    position_weight: learned positions [P, D]; "sinusoidal", the rows of `sinusoidal_encoding`
      (Vaswani et al., arXiv:1706.03762, who also have scale = sqrt(D)); None, nothing.
    positions: broadcastable to token_ids' shape, [T] or [..., T]; by default 0 … T-1. Only with
      position_weight.
    segment_ids, like token_ids, and segment_weight [S, D]: both or neither (BERT's token types).
    norm_weight, norm_bias [D]: LayerNorm with eps after the sum; norm_weight None leaves it out.
    dropout_p: as in `layer_norm`, of the result.
    sparse: the gradient of weight is a sparse COO tensor with a row for each token, as that of
      torch.nn.functional.embedding, for torch.optim.SparseAdam and SGD.
    ValueError, TypeError: an argument that does not fit; IndexError: an id outside its table (on a GPU, which nothing
    here waits for, that token's row is NaN instead).
    """
    if autocast_enabled():
        tables = for_tables(weight, position_weight, segment_weight)
        weight, position_weight, segment_weight = tables
    _check_ids("token_ids", token_ids, None)
    _check_table("weight", weight, None)
    _check_positions(token_ids, weight, position_weight, positions)
    if (segment_ids is None) != (segment_weight is None):
        raise ValueError("segment_ids, segment_weight: got one of the two, needs both or neither")
    if segment_ids is not None and segment_weight is not None:
        _check_ids("segment_ids", segment_ids, token_ids)
        _check_table("segment_weight", segment_weight, weight)
    _check_norm(weight, norm_weight, norm_bias, eps)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    options = {
        "position_weight": position_weight if isinstance(position_weight, Tensor) else None,
        "sinusoidal": isinstance(position_weight, str),
        "positions": positions,
        "segment_ids": segment_ids,
        "segment_weight": segment_weight,
        "scale": scale,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "eps": eps,
        "dropout_p": dropout_p,
        "dropout_seed": draw_seed() if dropout_p > 0.0 else None,
        "sparse": sparse,
    }
    return dispatch.run("embed", (token_ids, weight), options, backend)


def _check_ids(name: str, ids: Tensor, like: Tensor | None) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}")
    if like is None and ids.ndim == 0:
        raise ValueError(f"{name}: expected [..., T], got a single number")
    if like is not None and ids.shape != like.shape:
        raise ValueError(
            f"{name}: expected token_ids' shape {tuple(like.shape)}, got {tuple(ids.shape)}"
        )


def _check_table(name: str, table: Tensor, weight: Tensor | None) -> None:
    if table.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions [rows, D], got shape {tuple(table.shape)}")
    if not table.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {table.dtype}")
    if weight is None:
        return
    if table.shape[1] != weight.shape[1]:
        raise ValueError(f"{name}: D is {table.shape[1]}, but weight has D = {weight.shape[1]}")
    if table.dtype != weight.dtype:
        raise TypeError(f"{name}: expected weight's dtype {weight.dtype}, got {table.dtype}")


def _check_positions(
    token_ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | str | None,
    positions: Tensor | None,
) -> None:
    if isinstance(position_weight, Tensor):
        _check_table("position_weight", position_weight, weight)
    elif position_weight not in (None, "sinusoidal"):
        raise ValueError(
            f"position_weight: got {position_weight!r}, needs a tensor, 'sinusoidal' or None"
        )
    length = token_ids.shape[-1]
    if positions is None:
        if isinstance(position_weight, Tensor) and length > position_weight.shape[0]:
            raise ValueError(
                f"position_weight: has {position_weight.shape[0]} rows, but token_ids has"
                f" {length} tokens"
            )
        return
    if position_weight is None:
        raise ValueError("positions: given, but position_weight is None")
    _check_ids("positions", positions, None)
    if positions.shape not in (token_ids.shape, (length,)):
        raise ValueError(
            f"positions: expected shape ({length},) or {tuple(token_ids.shape)},"
            f" got {tuple(positions.shape)}"
        )


def _check_norm(
    weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> None:
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias: given, but norm_weight is None")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        if parameter.shape != weight.shape[1:]:
            raise ValueError(
                f"{name}: expected shape ({weight.shape[1]},), got {tuple(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {parameter.dtype}")
