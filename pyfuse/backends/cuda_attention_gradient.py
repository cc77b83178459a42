"""The backward of attention on the CUDA kernels, padded and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_attention import call_arguments, lse_strides
from pyfuse.backends.cuda_device import DTYPE, address
from pyfuse.backends.gpu_attention import MaskSums, dense_like, strides, unit_last
from pyfuse.backends.gpu_attention_ops import Call


class Backward:
    """See gpu_attention_ops.Backward."""

    def __init__(
        self,
        call: Call,
        o: Tensor,
        lse: Tensor,
        do: Tensor | None,
        dlse: Tensor | None,
        exact: bool,
    ) -> None:
        self.device, self.call = cuda_device.of(o), call
        self.lse = lse.contiguous()
        self.lse2, self.delta = torch.empty_like(self.lse), torch.empty_like(self.lse)
        rest = torch.empty_like(self.lse) if exact else None
        do = torch.zeros_like(o) if do is None else unit_last(do)
        self.grads = tuple(dense_like(t) for t in call[:3])
        arguments, tensors = call_arguments(*call[:5], (o, do, *self.grads), **call.options)
        self.arguments = (
            *arguments, o.data_ptr(), strides(o), do.data_ptr(), strides(do), address(dlse), _row_strides(dlse),
            self.lse.data_ptr(), self.lse2.data_ptr(), address(rest), self.delta.data_ptr(),
            lse_strides(self.lse), call.options["scale"],
        )  # fmt: skip
        self.tensors = (*tensors, o, do, dlse, self.lse, self.lse2, rest, self.delta)
        self._start("attention_terms", (), ())

    def dk_dv(self) -> tuple[Tensor, Tensor]:
        _, dk, dv = self.grads
        self._start(
            "attention_dkdv", (dk.data_ptr(), strides(dk), dv.data_ptr(), strides(dv)), (dk, dv)
        )
        return dk, dv

    def dq(self, slopes: Tensor | None) -> Tensor:
        dq = self.grads[0]
        self._start("attention_dq", (dq.data_ptr(), strides(dq), address(slopes)), (dq, slopes))
        return dq

    def dmask(self, mask: Tensor) -> Tensor:
        batch, heads, m = self.call.q.shape[:3]
        sums = MaskSums.of(mask, batch, heads, m, self.call.k.shape[2])
        result = torch.empty(sums.sizes, dtype=sums.dtype, device=mask.device)
        arguments = (
            result.data_ptr(),
            DTYPE[sums.dtype],
            *sums.sharing,
            *sums.apart,
            result.stride(),
        )
        self._start("attention_dmask", arguments, (result,))
        return sums.finish(result, mask)

    def _start(
        self, name: str, arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
    ) -> None:
        self.device.call(name, (*self.arguments, *arguments), (*self.tensors, *tensors))


def _row_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of batch, head and row in [B, Hq, M] or [Hq, T]."""
    if t is None:
        return (0, 0, 0)
    return t.stride() if t.ndim == 3 else (0, *t.stride())
