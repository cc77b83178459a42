"""The backward of attention on the Triton kernels, padded and packed."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends.gpu_attention import MaskSums, dense_like, only_scaled, strides, unit_last
from pyfuse.backends.gpu_attention_ops import Call as AttentionCall
from pyfuse.backends.triton_attention import Call, lse_strides, options_of
from pyfuse.backends.triton_device import kernels


def _row_terms(
    call: Call, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, lse2: Tensor, delta: Tensor
) -> None:
    tiles = kernels("configs").ROW_TERMS
    batch = 1 if call.packed else call.batch
    args = (
        o, do, lse, dlse, lse2, delta, strides(o), strides(do), None if dlse is None else dlse.stride(),
        call.heads, call.m, call.kind.dv, kernels("configs").block(call.kind.dv), tiles.block_m,
    )  # fmt: skip
    programs = -(-call.m // tiles.block_m) * batch * call.heads
    options = kernels("configs").triton_options(tiles.warps)
    call.device.launch(kernels("flash_bwd").row_terms_kernel, (programs,), args, options)


class Backward:
    """See gpu_attention_ops.Backward."""

    def __init__(
        self,
        given: AttentionCall,
        o: Tensor,
        lse: Tensor,
        do: Tensor | None,
        dlse: Tensor | None,
        exact: bool,
    ) -> None:
        (q, k, v, cu_q, cu_k, options), call = given, Call.of(*given[:5], **given.options)
        call = call._replace(kind=call.kind._replace(fold=call.kind.fold or only_scaled(options)))
        do = torch.zeros_like(o) if do is None else unit_last(do)
        lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
        self.call, self.lse, self.delta = call, lse, delta
        self.inputs = (q, k, v, do, lse2, torch.empty_like(lse) if exact else None, delta)
        self.strides = (strides(q), strides(k), strides(v), strides(do))
        self.rows = lse_strides(lse2)
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
        if dlse is not None and call.packed:
            dlse = dlse[None]
        if exact:
            self._by_queries("terms", lse, dlse, None, None)
        else:
            _row_terms(call, o, do, lse, dlse, lse2, delta)

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
