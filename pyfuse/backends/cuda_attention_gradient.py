"""The backward of attention on the CUDA kernels, padded and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_attention as forward
from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_device import DTYPE, address
from pyfuse.backends.gpu_attention import (
    MaskSums,
    dense_like,
    empty_like_q,
    per_head,
    sink_gradient,
    strides,
    unit_last,
    without_pairs,
)

Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]
Result = Tensor | tuple[Tensor, Tensor]


def why_not(needs: frozenset[str], *_tensors: Tensor, **_: Any) -> str | None:
    return None  # whatever the forward takes


def attention_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Result, Saved]:
    """The result, and what the backward needs beside the arguments: o and lse."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o = empty_like_q(q, v.shape[3])
    forward.forward_into(o, lse, q, k, v, None, None, options)
    return (o, lse) if options["return_lse"] else o, (o, lse)


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Result, Saved]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    o = q.new_empty((*q.shape[:2], v.shape[2]))
    forward.forward_into(o, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    return (o, lse) if options["return_lse"] else o, (o, lse)


def restore(results: tuple[Tensor, ...], *_: Any) -> Saved:
    """What a forward saves, from the results of any."""
    o, lse = results
    return o, lse


def attention_backward(
    grads: Grads,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of q, k, v, mask, sinks and alibi_slopes from those of o and lse."""
    q, k, v = tensors
    return _gradients(grads, q, k, v, None, None, options, saved, needs)


def varlen_attention_backward(
    grads: Grads,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    return _gradients(grads, q, k, v, cu_seqlens_q, cu_seqlens_k, options, saved, needs)


def _gradients(
    grads: Grads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    options: dict[str, Any],
    saved: Saved,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    o, lse = saved
    assert o is not None and lse is not None
    if o.numel() == 0 or k.numel() == 0:
        return without_pairs(grads, q, k, v, options, lse, needs)
    # Σ o do has the rounding of o. In half precision that shows where distances magnify it, and in float32 sinks and
    # masks.
    exact = q.dtype == torch.float32 or not needs.isdisjoint(("alibi_slopes", "mask", "sinks"))
    run = _Backward(grads, q, k, v, cu_q, cu_k, o, lse, exact, options)
    result: dict[str, Tensor] = {}
    if not needs.isdisjoint("kv"):
        result["k"], result["v"] = run.dk_dv()
    slopes = torch.empty_like(run.delta) if "alibi_slopes" in needs else None
    if "q" in needs or slopes is not None:
        result["q"] = run.dq(slopes)
    if slopes is not None:
        result["alibi_slopes"] = per_head(slopes, options["alibi_slopes"])
    if "sinks" in needs:
        result["sinks"] = sink_gradient(options["sinks"], run.lse, run.delta)
    if "mask" in needs:
        result["mask"] = run.dmask(options["mask"])
    return {name: result[name] for name in needs}


class _Backward:
    """The kernels over one call's tensors. exact: the terms of its rows from the scores rather than from o."""

    def __init__(
        self,
        grads: Grads,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        o: Tensor,
        lse: Tensor,
        exact: bool,
        options: dict[str, Any],
    ) -> None:
        self.device = cuda_device.of(q)
        self.q, self.k, self.v = q, k, v
        self.lse = lse.contiguous()
        self.lse2, self.delta = torch.empty_like(self.lse), torch.empty_like(self.lse)
        rest = torch.empty_like(self.lse) if exact else None
        do = torch.zeros_like(o) if grads[0] is None else unit_last(grads[0])
        dlse = None if len(grads) == 1 else grads[1]
        self.grads = tuple(dense_like(t) for t in (q, k, v))
        call, tensors = forward.call_arguments(q, k, v, cu_q, cu_k, (o, do, *self.grads), **options)
        self.arguments = (
            *call, o.data_ptr(), strides(o), do.data_ptr(), strides(do), address(dlse), _row_strides(dlse),
            self.lse.data_ptr(), self.lse2.data_ptr(), address(rest), self.delta.data_ptr(),
            forward.lse_strides(self.lse), options["scale"],
        )  # fmt: skip
        self.tensors = (*tensors, o, do, dlse, self.lse, self.lse2, rest, self.delta)
        self._call("attention_terms", (), ())

    def dk_dv(self) -> tuple[Tensor, Tensor]:
        _, dk, dv = self.grads
        self._call(
            "attention_dkdv", (dk.data_ptr(), strides(dk), dv.data_ptr(), strides(dv)), (dk, dv)
        )
        return dk, dv

    def dq(self, slopes: Tensor | None) -> Tensor:
        dq = self.grads[0]
        self._call("attention_dq", (dq.data_ptr(), strides(dq), address(slopes)), (dq, slopes))
        return dq

    def dmask(self, mask: Tensor) -> Tensor:
        batch, heads, m = self.q.shape[:3]
        sums = MaskSums.of(mask, batch, heads, m, self.k.shape[2])
        result = torch.empty(sums.sizes, dtype=sums.dtype, device=mask.device)
        arguments = (
            result.data_ptr(),
            DTYPE[sums.dtype],
            *sums.sharing,
            *sums.apart,
            result.stride(),
        )
        self._call("attention_dmask", arguments, (result,))
        return sums.finish(result, mask)

    def _call(
        self, name: str, arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
    ) -> None:
        self.device.call(name, (*self.arguments, *arguments), (*self.tensors, *tensors))


def _row_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of batch, head and row in [B, Hq, M] or [Hq, T]."""
    if t is None:
        return (0, 0, 0)
    return t.stride() if t.ndim == 3 else (0, *t.stride())
