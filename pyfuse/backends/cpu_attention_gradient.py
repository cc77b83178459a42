"""The backward of attention on the CPU kernels, padded and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cpu_attention as forward
from pyfuse.backends.cpu_attention import address, few, lse_strides, strides
from pyfuse.backends.cpu_module import module

Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]
Result = Tensor | tuple[Tensor, Tensor]


def why_not(needs: frozenset[str], *_tensors: Tensor, **_: Any) -> str | None:
    return None  # whatever the forward takes


def attention_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Result, Saved]:
    """The result, and what the backward needs beside the arguments: o, and lse in float64."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float64)
    o = forward.attention_into(lse, q, k, v, options)
    return _result(o, lse, q, options), (o, lse)


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Result, Saved]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float64)
    o = forward.varlen_attention_into(lse, q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    return _result(o, lse, q, options), (o, lse)


def restore(results: tuple[Tensor, ...], *_: Any) -> Saved:
    """What a forward saves, from the results of any: a graph keeps lse in float32, rounded once more."""
    o, lse = results
    return o, lse.double()


def _result(o: Tensor, lse: Tensor, q: Tensor, options: dict[str, Any]) -> Result:
    return (o, lse.to(forward.lse_dtype(q))) if options["return_lse"] else o


def attention_backward(
    grads: Grads,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of q, k, v, mask and sinks from those of o and lse."""
    q, k, v = tensors
    sizes = forward.padded_sizes(q, k, v)
    return _gradients(grads, (q, k, v), options, saved, needs, sizes, module().attention_gradient)


def varlen_attention_backward(
    grads: Grads,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    q, k, v, *cu_seqlens = tensors
    bounds = [few(t, torch.int64) for t in cu_seqlens]

    def launch(call: tuple[Any, ...], gradient: tuple[Any, ...]) -> None:
        module().varlen_attention_gradient(call, *map(address, bounds), gradient)

    sizes = forward.packed_sizes(q, k, v, cu_seqlens[0])
    result = _gradients(grads, (q, k, v), options, saved, needs, sizes, launch)
    for name, bound in zip("qkv", (cu_seqlens[0], cu_seqlens[1], cu_seqlens[1]), strict=True):
        if name in result:
            for outside in forward.rows_outside(bound, result[name].shape[0]):
                result[name][outside] = 0.0
    if "sinks" in result and len(grads) > 1 and grads[1] is not None:
        for outside in forward.rows_outside(cu_seqlens[0], q.shape[0]):  # there lse is the sink
            result["sinks"] += grads[1][:, outside].sum(-1).to(result["sinks"].dtype)
    return result


def _gradients(
    grads: Grads,
    qkv: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
    sizes: forward.Sizes,
    launch: Callable[..., None],
) -> dict[str, Tensor]:
    o, lse = saved
    assert o is not None and lse is not None
    d_o = torch.zeros_like(o) if grads[0] is None else _unit_last(grads[0])
    d_lse = None if len(grads) == 1 or grads[1] is None else grads[1].contiguous()
    result: dict[str, Tensor] = {}
    if not needs.isdisjoint("qkv"):  # the kernel computes these three together
        result = {n: _dense_like(x) for n, x in zip("qkv", qkv, strict=True)}
    mask: Any = options.get("mask")
    if "mask" in needs:
        result["mask"] = torch.zeros(mask.shape, dtype=mask.dtype)
    per_head = {
        name: torch.zeros(options[name].shape, dtype=torch.float64)
        for name in ("sinks", "alibi_slopes")
        if name in needs
    }
    call, _alive = forward.call_arguments(*qkv, o, lse, sizes, **options)
    gradient: tuple[Any, ...] = (
        address(d_o), strides(d_o), address(d_lse), lse_strides(d_lse),
        *(x for n in "qkv" for x in (address(result.get(n)), strides(result.get(n)))),
        address(per_head.get("sinks")), address(per_head.get("alibi_slopes")), address(result.get("mask")),
    )  # fmt: skip
    if "mask" in result:
        gradient = (*gradient, (1,) * (4 - mask.ndim) + tuple(mask.shape))
    if o.numel() > 0:
        launch(call, gradient)
    else:
        for t in result.values():
            t.zero_()
    result |= {name: t.to(options[name].dtype) for name, t in per_head.items()}
    return {name: t for name, t in result.items() if name in needs}


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense_like(t: Tensor) -> Tensor:
    """A tensor for the gradient of t, in t's memory order where that is dense."""
    return _unit_last(torch.empty_like(t))
