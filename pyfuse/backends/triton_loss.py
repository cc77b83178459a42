"""The loss of a chunk of logits by the Triton kernel: what it takes, how large its chunks are, and its call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import triton_device, triton_tune
from pyfuse.backends.chunked_loss import LossOptions, Sizes
from pyfuse.backends.triton_device import kernels

MOST_WORDS = (1 << 31) - (1 << 16)  # counted in 32 bits, and rounded up to blocks
# With each chunk dW goes in and out of memory, 8 bytes an element, against 6 operations for each token. On a GPU that
# makes 300 operations while it moves a byte that is, with 2048 tokens, a fifth of the time of the products.
CHUNK_ROWS = 2048
CHUNK_BYTES = 512 * 2**20  # fewer tokens where they would take more
# Of a block of dW in float32: its product, in half a precision, stays in a GPU's L2, and its tiles fill the GPU.
BLOCK_BYTES = 32 * 2**20
# Bytes: rows of logits begin at whole lines, for which cuBLAS, too, has its faster kernels.
LINE = 128


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot take logits of these; None if it can."""
    reason = triton_device.why_not("x", x)
    if reason is None and weight.shape[0] > MOST_WORDS:
        reason = f"a vocabulary of {weight.shape[0]}, the kernel counts to {MOST_WORDS}"
    return reason


def sizes(vocabulary: int, k: int, dtype: torch.dtype) -> Sizes:
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (vocabulary * dtype.itemsize)))
    return Sizes(rows, max(1, BLOCK_BYTES // (4 * k)), LINE // dtype.itemsize)


class TritonRowLoss(NamedTuple):
    """A row whose target is ignore_index has the loss 0 and dr 0, and is not read. One with a target outside of the
    vocabulary has NaN: to raise IndexError, the host would have to wait for the GPU. With TRITON_DEBUG=1 the kernel
    stops there, as torch's do."""

    options: LossOptions
    ignore_index: int

    def __call__(
        self, r: Tensor, target: Tensor, flow: Tensor | None, losses: Tensor, gradient: bool
    ) -> None:
        """See RowLoss; r has unit stride in V."""
        device = triton_device.of(r)
        unit = gcd(r.stride(0), 16 // r.element_size())
        even = gcd(r.shape[1], unit)
        smoothing, z_loss, softcap = self.options
        given = (smoothing or None, z_loss or None, softcap)
        flow = None if flow is None else flow.contiguous()
        rest = (r.stride(0) // unit, r.shape[1] // even, self.ignore_index, *given)
        args = (target.contiguous(), flow, losses, *rest)
        constants = {"UNIT": unit, "EVEN": even, "GRADIENT": gradient}
        kernel = kernels("linear_cross_entropy").cross_entropy_kernel

        def start(r: Tensor, tiles: Any) -> None:
            device.launch(kernel, (r.shape[0],), (r, *args), constants | tiles.options)

        kind = (unit, even, gradient, flow is None, *(option is None for option in given))
        extras = smoothing > 0.0 or softcap is not None
        start(r, _tiles(device, kernel, r, extras, kind, start))


def _tiles(
    device: triton_device.Device,
    kernel: Any,
    r: Tensor,
    extras: bool,
    kind: tuple[Any, ...],
    start: Callable[[Tensor, Any], None],
) -> Any:
    """Those shipped, or the fastest ones, found with a copy of the logits: `start` overwrites them."""
    configs = kernels("loss_configs")
    what = (r.shape[1], r.element_size(), device.arch, extras)
    if not triton_tune.enabled:
        return configs.shipped(*what)

    @cache
    def copy() -> Tensor:
        return r.new_empty(r.shape[0], r.stride(0))[:, : r.shape[1]].copy_(r)

    alike = (str(r.dtype), *what, r.shape[0].bit_length(), *kind)
    candidates = configs.candidates(*what)
    return triton_tune.choose(device, kernel, alike, candidates, lambda tiles: start(copy(), tiles))
