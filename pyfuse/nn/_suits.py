"""Whether a call of one of torch's functions is one that pyfuse's operation answers as torch would: why not, if not.

Arguments that do not fit get a reason here as well: torch then raises what its users know.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Of fewer elements a call is all overhead, of which torch has less.
LEAST_DROPOUT = 8192
_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def why_not_tensors(tensors: Iterable[Tensor | None]) -> str | None:
    """What holds for every function: dense tensors of torch's own type, on one device, outside of torch.jit.trace."""
    device = None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN:
            return f"an argument is a {type(t).__name__}"
        if t.layout is not torch.strided or t.is_nested:
            return "an argument is nested or sparse"
        if t.device != device:
            if device is not None:
                return "arguments on several devices"
            device = t.device
    return "torch.jit.trace records no kernel" if torch.jit.is_tracing() else None


def why_not_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    reason = why_not_tensors((input, weight, bias))
    if reason is not None:
        return reason
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return "sizes that do not fit"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "a bias whose size does not fit"
    return why_not_dtypes(input, weight, bias)


def why_not_dtypes(input: Tensor, *parameters: Tensor | None) -> str | None:
    """One dtype for all, as products of matrices need; autocast sees to it by itself."""
    if torch.is_autocast_enabled(input.device.type):
        return None
    for parameter in parameters:
        if parameter is not None and parameter.dtype != input.dtype:
            return f"a parameter of {parameter.dtype} beside {input.dtype}"
    return None


def why_not_dropout(input: Tensor, p: float, inplace: bool) -> str | None:
    reason = why_not_tensors((input,))
    if reason is not None:
        return reason
    if input.device.type != "cpu":
        return "torch's own is fast on this device"
    if input.dtype not in _FLOATING:
        return f"dtype {input.dtype}"
    if input.dim() == 0:
        return "no dimensions"
    if inplace:
        return "inplace"
    return None if 0.0 <= p < 1.0 else "p outside of [0, 1)"


def is_large(input: Tensor) -> bool:
    """Whether the operation is the faster one. Where it is not, torch's is a choice, no fallback."""
    return input.numel() >= LEAST_DROPOUT


def why_not_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str | None:
    reason = why_not_tensors((query, key, value, attn_mask))
    if reason is not None:
        return reason
    if query.dtype not in _FLOATING:
        return f"dtype {query.dtype}"
    if not (query.dtype == key.dtype == value.dtype):
        return "query, key and value have different dtypes"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return "fewer than two dimensions"
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return "an empty tensor"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return "sizes that do not fit"
    if not 0.0 <= dropout_p < 1.0:
        return "dropout_p outside of [0, 1)"
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask beside is_causal"
    if attn_mask.dtype not in (torch.bool, query.dtype):
        return f"attn_mask of {attn_mask.dtype} beside {query.dtype}"
    return None


def why_not_norm(
    input: Tensor, shape: tuple[int, ...], eps: float, *parameters: Tensor | None
) -> str | None:
    reason = why_not_tensors((input, *parameters))
    if reason is not None:
        return reason
    if input.dtype not in _FLOATING:
        return f"dtype {input.dtype}"
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        return "normalized_shape that does not fit"
    if 0 in shape:
        return "normalized_shape with a 0"
    if not eps >= 0.0:
        return "a negative eps"
    for parameter in parameters:
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            return "a parameter's shape that does not fit"
        if parameter.dtype != input.dtype:
            return f"a parameter of {parameter.dtype} beside {input.dtype}"
    if input.device.type != "cpu" and torch.is_autocast_enabled(input.device.type):
        return "autocast casts norms on this device"
    return None
