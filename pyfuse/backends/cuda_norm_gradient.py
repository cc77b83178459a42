"""The gradients of LayerNorm and RMSNorm by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_device import DTYPE, address
from pyfuse.backends.cuda_norm import call_arguments, read, written
from pyfuse.backends.gpu_chip import multiprocessors
from pyfuse.backends.gpu_norm import Flow, Inputs

AT_ONCE = 2  # blocks of a multiprocessor
LEAST = 8192  # elements of x that are worth another block, which writes d sums for each parameter
# A thread adds so many rows to its sums; with more the rounding of float32 would show. A block goes through as many
# rows at a time as have TILE elements, at least one.
MOST_ROWS, TILE = 128, 1024


def write_gradients(given: Inputs, flow: Flow, out: dict[str, Tensor]) -> None:
    """Write the tensors of out."""
    source = flow.source(given)
    call, tensors = call_arguments(source, flow.statistics)
    (dy_rows, dy), (dz_rows, dz) = read(flow.dy), read(flow.dz)
    dx, dresidual, dweight, dbias = (out.get(n) for n in ("x", "residual", "weight", "bias"))
    d, device = given.x.shape[-1], cuda_device.of(given.x)
    blocks = block_count(given.x.numel(), d, device.arch)
    sums = [
        None if t is None else t.new_empty((blocks, d), dtype=torch.float32)
        for t in (dweight, dbias)
    ]
    # A float64 parameter's gradient is summed in float32, like any other, and widened afterwards.
    added = [
        t.new_empty(d, dtype=torch.float32) if t is not None and t.dtype not in DTYPE else t
        for t in (dweight, dbias)
    ]
    drop = given.dropout_p != 0.0 and flow.z is None
    rows = (dy_rows, dz_rows, written(dx), written(dresidual))
    arguments = (
        *call, *(number for of in rows for number in of), int(drop), blocks, *map(address, sums),
        *(number for t in added for number in written(t)),
    )  # fmt: skip
    touched = (*tensors, *flow.statistics, dy, dz, dx, dresidual, *sums, *added)
    device.call("norm_backward", arguments, touched)
    for to, t in zip((dweight, dbias), added, strict=True):
        if to is not None and t is not None and t is not to:
            to.copy_(t)


def block_count(size: int, d: int, arch: int) -> int:
    """Among how many blocks the rows are divided: `size` elements. The order of the parameters' sums follows it."""
    at_once = AT_ONCE * multiprocessors(arch)
    least = -(-size // (MOST_ROWS * max(d, TILE)))
    return min(size // d, -(-size // LEAST), max(at_once, least))
