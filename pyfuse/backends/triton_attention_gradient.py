"""The backward of attention on the Triton kernels, padded and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import triton_attention as forward
from pyfuse.backends.gpu_attention import (
    MaskSums,
    dense_like,
    empty_like_q,
    only_scaled,
    per_head,
    sink_gradient,
    strides,
    unit_last,
    without_pairs,
)
from pyfuse.backends.triton_attention import Call, options_of
from pyfuse.backends.triton_device import kernels

Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]
Result = Tensor | tuple[Tensor, Tensor]


def why_not(needs: frozenset[str], *_tensors: Tensor, **_: Any) -> str | None:
    return None  # whatever the forward takes


def attention_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Result, Saved]:
    """The result, and what the backward needs beside the arguments: o and lse."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o = empty_like_q(q, v.shape[3])
    forward.forward_into(o, lse, q, k, v, **options)
    return (o, lse) if options["return_lse"] else o, (o, lse)


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Result, Saved]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    o = q.new_empty((*q.shape[:2], v.shape[2]))
    forward.forward_into(o, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
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
    call = Call.of(q, k, v, cu_q, cu_k, **{"seqlens_k": None, "mask": None, **options})
    call = call._replace(kind=call.kind._replace(fold=call.kind.fold or only_scaled(options)))
    do = torch.zeros_like(o) if grads[0] is None else unit_last(grads[0])
    dlse = None if len(grads) == 1 else grads[1]
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    # Σ o do has the rounding of o. In half precision that shows where distances magnify it, and in a float32 mask.
    if q.dtype == torch.float32 or not needs.isdisjoint(("alibi_slopes", "mask")):
        rest = torch.empty_like(lse)
        run = _Backward(call, q, k, v, do, lse2, rest, delta, cu_q, cu_k, options)
        run.terms(lse, dlse)
    else:
        run = _Backward(call, q, k, v, do, lse2, None, delta, cu_q, cu_k, options)
        _row_terms(call, o, do, lse, dlse, lse2, delta)
    result: dict[str, Tensor] = {}
    if not needs.isdisjoint("kv"):
        result["k"], result["v"] = run.dk_dv()
    slopes = None
    if "alibi_slopes" in needs:
        slopes = torch.empty_like(delta)
    if "q" in needs or slopes is not None:
        result["q"] = run.dq(slopes)
    if slopes is not None:
        result["alibi_slopes"] = per_head(slopes, options["alibi_slopes"])
    if "sinks" in needs:
        result["sinks"] = sink_gradient(options["sinks"], lse, delta)
    if "mask" in needs:
        result["mask"] = run.dmask(options["mask"])
    return {name: result[name] for name in needs}


def _row_terms(
    call: Call, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, lse2: Tensor, delta: Tensor
) -> None:
    tiles = kernels("configs").ROW_TERMS
    batch = 1 if call.packed else call.batch
    if dlse is not None and call.packed:
        dlse = dlse[None]
    args = (
        o, do, lse, dlse, lse2, delta, strides(o), strides(do), None if dlse is None else dlse.stride(),
        call.heads, call.m, call.kind.dv, kernels("configs").block(call.kind.dv), tiles.block_m,
    )  # fmt: skip
    programs = -(-call.m // tiles.block_m) * batch * call.heads
    options = kernels("configs").triton_options(tiles.warps)
    call.device.launch(kernels("flash_bwd").row_terms_kernel, (programs,), args, options)


class _Backward:
    """The three kernels over one call's tensors."""

    def __init__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        lse2: Tensor,
        rest: Tensor | None,
        delta: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        self.call = call
        self.inputs = (q, k, v, do, lse2, rest, delta)
        self.strides = (strides(q), strides(k), strides(v), strides(do))
        self.rows = forward.lse_strides(lse2)
        self.scores = (call.scale, call.softcap)
        self.factor = options["scale"]
        self.limits = (call.left, call.right)
        self.extras = (
            options["alibi_slopes"],
            options.get("seqlens_k"),
            call.mask,
            call.mask_strides,
        )
        self.bounds = (cu_q, cu_k)
        self.sinks = options["sinks"]
        self.dropout = call.dropout
        self.size = q.element_size()

    def dk_dv(self) -> tuple[Tensor, Tensor]:
        call, (_, k, v, *_) = self.call, self.inputs
        dk, dv = dense_like(k), dense_like(v)
        args = (
            *self.inputs, dk, dv, *self.strides, strides(dk), strides(dv), self.rows,
            call.batch, call.heads, call.group, call.m, call.n, call.n, *self.scores, self.factor, *self.limits,
            *self.extras, *self.bounds, *self.dropout,
        )  # fmt: skip
        kernel = kernels("flash_bwd").flash_bwd_dkdv_kernel
        heads = call.heads // call.group
        call.launch(
            "dkdv", kernel, args, k, lambda tiles: call.programs(call.n, heads, tiles.block_n)
        )
        return dk, dv

    def terms(self, lse: Tensor, dlse: Tensor | None) -> None:
        if dlse is not None and self.call.packed:
            dlse = dlse[None]
        self._by_queries("terms", lse, dlse, None, None)

    def dq(self, dslopes: Tensor | None) -> Tensor:
        dq = dense_like(self.inputs[0])
        self._by_queries("dq" if dslopes is None else "slopes", None, None, dq, dslopes)
        return dq

    def _by_queries(
        self,
        gives: str,
        lse: Tensor | None,
        dlse: Tensor | None,
        dq: Tensor | None,
        dslopes: Tensor | None,
    ) -> None:
        call = self.call
        args = (
            *self.inputs[:4], lse, *self.inputs[4:], dlse, self.sinks, dq, dslopes, *self.strides,
            None if dlse is None else dlse.stride(), None if dq is None else strides(dq), self.rows,
            call.batch, call.heads, call.group, call.m, call.n, *self.scores, self.factor, *self.limits,
            *self.extras, *self.bounds, *self.dropout,
        )  # fmt: skip
        kernel, q = kernels("flash_bwd").flash_bwd_dq_kernel, self.inputs[0]
        call.launch(
            "dq", kernel, args, q, lambda tiles: call.programs(call.m, call.heads, tiles.block_m), ("GIVES", gives)
        )  # fmt: skip

    def dmask(self, mask: Tensor) -> Tensor:
        call = self.call
        sums = MaskSums.of(mask, call.batch, call.heads, call.m, call.n)
        (batches, heads), (own_rows, own_cols) = sums.sharing, sums.apart
        result = torch.empty(sums.sizes, dtype=sums.dtype, device=mask.device)
        largest = max(call.kind.d, call.kind.dv)
        tiles = kernels("configs").shipped("dmask", largest, self.size, call.arch, True)
        args = (
            *self.inputs, result, *self.strides, self.rows, result.stride(),
            call.heads, call.group, call.m, call.n, batches, heads, *self.scores, *self.limits,
            *self.extras, *self.dropout,
        )  # fmt: skip
        blocks = (-(-call.m // tiles.block_m) if own_rows else 1) * (
            -(-call.n // tiles.block_n) if own_cols else 1
        )
        options = options_of(call.kind, tiles, ("ROWS", own_rows), ("COLS", own_cols))
        options = {n: x for n, x in options.items() if n not in ("BLOCK_B", "FOLD", "STAGES")}
        kernel = kernels("flash_bwd_mask").flash_bwd_dmask_kernel
        programs = blocks * (call.batch // batches) * (call.heads // heads)
        call.device.launch(kernel, (programs,), args, options)
        return sums.finish(result, mask)
