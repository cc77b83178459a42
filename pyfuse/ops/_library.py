"""The operations as torch.library operators ``torch.ops.pyfuse.*``: what a compiled or exported graph holds.

Eager calls do not pass here (they would pay 5-10 µs for it): :func:`pyfuse.dispatch.run` comes here under
torch.compile, export and fake tensors only, and only for values; gradients are traced through the eager formula.
Every operator returns ``Tensor[]``, since some operations return one or two tensors by option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyfuse import dispatch

# Name -> arguments, in the order and with the names of the operation: first its tensors, then its options.
SCHEMAS: dict[str, str] = {
    "attention": "Tensor q, Tensor k, Tensor v, *, Tensor? mask, bool causal, SymInt[]? window, float? softcap, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? seqlens_k, float dropout_p, Tensor? dropout_seed, "
    "float? scale, bool return_lse, str? backend",
    "embed": "Tensor token_ids, Tensor weight, *, Tensor? position_weight, bool sinusoidal, Tensor? positions, "
    "Tensor? segment_ids, Tensor? segment_weight, float scale, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "float dropout_p, Tensor? dropout_seed, bool sparse, str? backend",
    "layer_norm": "Tensor x, Tensor? weight, Tensor? bias, *, float eps, Tensor? residual, bool prenorm, "
    "float dropout_p, Tensor? dropout_seed, str? backend",
    "rms_norm": "Tensor x, Tensor? weight, *, float eps, Tensor? residual, bool prenorm, float dropout_p, "
    "Tensor? dropout_seed, str casting, str? backend",
    "rope": "Tensor x, Tensor cos, Tensor sin, *, str layout, Tensor? positions, bool inplace, str? backend",
}


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **_: Any
) -> list[torch.Tensor]:
    # o keeps the memory order of q ([B, M, Hq, D] as a rule).
    batch, heads, rows, _d = q.shape
    shape = (batch, heads, rows, v.shape[-1])
    o = (
        q.new_empty((batch, rows, heads, v.shape[-1])).transpose(1, 2)
        if _rows_first(q)
        else q.new_empty(shape)
    )
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [o, q.new_empty(shape[:3], dtype=lse_dtype)] if return_lse else [o]


def _rows_first(q: torch.Tensor) -> bool:
    return bool(q.stride(1) < q.stride(2))


def _fake_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *_: Any,
    residual: torch.Tensor | None,
    prenorm: bool,
    casting: str = "",
    **__: Any,
) -> list[torch.Tensor]:
    dtype = x.dtype
    if casting == "llama" and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype)
    z_like = x if residual is None else residual
    return [y, torch.empty_like(z_like)] if prenorm else [y]


def _fake_embed(token_ids: torch.Tensor, weight: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    return [weight.new_empty((*token_ids.shape, weight.shape[1]))]


def _fake_rope(x: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
    return [torch.empty_like(x)]


_FAKES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "attention": _fake_attention,
    "embed": _fake_embed,
    "layer_norm": _fake_norm,
    "rms_norm": _fake_norm,
    "rope": _fake_rope,
}

_library = torch.library.Library("pyfuse", "DEF")


def _define(op: str) -> None:
    tensor_count = SCHEMAS[op].split("*")[0].count("Tensor")

    def kernel(
        *tensors: torch.Tensor | None, backend: str | None, **options: Any
    ) -> list[torch.Tensor]:
        assert len(tensors) == tensor_count
        tensors = tuple(None if t is None else t.resolve_neg() for t in tensors)
        result = dispatch.choose(op, tensors, options, backend).fn(*tensors, **options)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    _library.define(f"{op}({SCHEMAS[op]}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyfuse::{op}", _FAKES[op], lib=_library)


for _op in SCHEMAS:
    _define(_op)


def call(op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Any:
    """Call the operator; an in-place request becomes a copy at the end, since operators here do not alias."""
    in_place = options.get("inplace", False)
    if in_place:
        options = {**options, "inplace": False}
    results = getattr(torch.ops.pyfuse, op)(*tensors, **options, backend=backend)
    if in_place:
        return tensors[0].copy_(results[0])
    return results[0] if len(results) == 1 else tuple(results)
