"""torch.nn.functional.scaled_dot_product_attention, signature and meaning, on pyfuse's kernels."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from pyfuse.ops._checks import bind_dims
from pyfuse.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · query · keyᵀ + attn_mask) · value, as torch defines it.

    query [..., Hq, L, E]; key [..., H, S, E]; value [..., H, S, Ev]: two or more dimensions, those
    before the last two broadcast against each other. Any strides. Returns [..., Hq, L, Ev].
    attn_mask: broadcastable to [..., Hq, L, S]; bool (True = attend), or added.
    is_causal: top-left alignment: query i sees the keys 0 … i, whatever L and S (in `attention` the
      last query sees the last key). Not together with attn_mask.
    enable_gqa: Hq may be a multiple of H.
    Differences from torch: the dropout mask is that of `attention` (another one for the same seed);
    attn_mask is bool, query's dtype or float32. Errors are ValueError and TypeError.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: got a mask and is_causal=True, needs one of the two at most")
    bind_dims(query=(query, "... L E"), key=(key, "... S E"), value=(value, "... S Ev"))
    lead = None
    if not _is_one_batch(query, key, value, enable_gqa):
        lead, query, key, value = _to_one_batch(query, key, value, enable_gqa)
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = _mask_to_one_batch(attn_mask, lead)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    options: dict[str, Any] = {}
    if is_causal:
        m, n = query.shape[2], key.shape[2]
        if n >= m:  # no query sees beyond the M-th key, and on the first M both alignments agree
            key, value = key[:, :, :m], value[:, :, :m]
            options["causal"] = True
        else:
            options["window"] = (-1, m - n)
    o: Tensor = attention(
        query, key, value, mask=attn_mask, dropout_p=dropout_p, scale=scale, **options
    )
    return o if lead is None else o.reshape(*lead, *o.shape[-2:])


def _is_one_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether these are [B, Hq, L, E], [B, H, S, E], [B, H, S, Ev] as `attention` takes them."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (enable_gqa or query.shape[1] == key.shape[1])
    )


def _to_one_batch(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The result's leading dimensions, and the three in four dimensions."""
    given = max(query.dim(), key.dim(), value.dim())
    count = max(given, 3)
    query, key, value = (x[(None,) * (count - x.dim())] for x in (query, key, value))
    batch = _broadcast("batch", query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads_k = _broadcast("head", key.shape[-3:-2], value.shape[-3:-2])
    heads_q: tuple[int, ...] = query.shape[-3:-2]
    if not enable_gqa:
        heads_q = _broadcast("head", heads_q, heads_k)
    query, key, value = (
        x.expand(*batch, *heads, *x.shape[-2:]).reshape(prod(batch), *heads, *x.shape[-2:])
        for x, heads in ((query, heads_q), (key, heads_k), (value, heads_k))
    )
    return (*batch, *heads_q)[count - given :], query, key, value


def _mask_to_one_batch(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[..., Hq, L, S] with the batch dimensions of lead as one."""
    batch, given = lead[:-1], mask.shape[:-3]
    if len(given) > len(batch) or any(
        size not in (1, full) for size, full in zip(reversed(given), reversed(batch), strict=False)
    ):
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to [..., Hq, L, S] with "
            f"leading dimensions {lead}"
        )
    return mask.expand(*batch, *mask.shape[-3:]).reshape(prod(batch), *mask.shape[-3:])


def _broadcast(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        got = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"query, key, value: {what} dimensions {got} do not broadcast (see enable_gqa)"
        ) from error
