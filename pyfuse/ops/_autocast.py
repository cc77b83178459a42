"""torch.autocast: what an operation casts there, as its counterpart in torch does.

Attention casts q, k and v to autocast's dtype, as F.scaled_dot_product_attention does (float64 stays). The others
compute in the dtype that they are given, as F.layer_norm and F.embedding do; but what they would refuse for
its dtype, since nobody mixes dtypes knowingly, autocast mixes: it is promoted, as by torch's additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

autocast_enabled = torch._C._is_any_autocast_enabled  # for any device: cheap, and False as a rule

_HALF = (torch.bfloat16, torch.float16)


def for_attention(qkv: tuple[Tensor, ...], *beside: Tensor | None) -> tuple[Any, ...]:
    """q, k and v in autocast's dtype; what stands beside them (mask, sinks, slopes) in q's or float32."""
    device = qkv[0].device.type
    if not torch.is_autocast_enabled(device):
        return *qkv, *beside
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) if t.dtype in (torch.float32, *_HALF) else t for t in qkv)
    return q, k, v, *(_not_another_half(t, q.dtype) for t in beside)


def for_rope(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin in one dtype, x's or float32."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = _promoted((cos, sin))
        cos, sin = (_not_another_half(t.to(dtype), x.dtype) for t in (cos, sin))
    return cos, sin


def for_residual(x: Tensor, residual: Tensor) -> Tensor:
    """residual in the dtype that x + residual has."""
    if torch.is_autocast_enabled(x.device.type) and residual.is_floating_point():
        return residual.to(torch.promote_types(x.dtype, residual.dtype))
    return residual


def for_tables(*tensors: Any) -> list[Any]:
    """The tables of an embedding sum in one dtype, that to which torch promotes them all."""
    floating = [isinstance(t, Tensor) and t.is_floating_point() for t in tensors]
    tables = [t for t, is_it in zip(tensors, floating, strict=True) if is_it]
    if not tables or not torch.is_autocast_enabled(tables[0].device.type):
        return list(tensors)
    dtype = _promoted(tables)
    return [t.to(dtype) if is_it else t for t, is_it in zip(tensors, floating, strict=True)]


def _promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, [t.dtype for t in tensors])


def _not_another_half(t: Any, dtype: torch.dtype) -> Any:
    return t.float() if isinstance(t, Tensor) and t.dtype in _HALF and t.dtype != dtype else t
