"""The rotary embedding on the CUDA kernels: the launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import cuda_device
from pyfuse.backends.cuda_device import DTYPE, integers
from pyfuse.backends.gpu_rope import Pairs, Rope, position_strides, table_strides

NO_PART = (0, 0, (0, 0, 0), 0, (0, 0, 0))


def turn(
    pairs: Pairs,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    positions: Tensor | None,
    sign: float,
) -> None:
    """The arguments in the order in which csrc/api/cuda_rope.cpp reads them."""
    x = pairs[0][0]
    batch, _, rows, d = x.shape
    parts: list[Any] = []
    for source, target in pairs:
        parts += (source.shape[1], source.data_ptr(), source.stride()[:3])
        parts += (target.data_ptr(), target.stride()[:3])
    parts += NO_PART if len(pairs) == 1 else ()
    arguments = (
        DTYPE[x.dtype], batch * rows, rows, d, 2 * cos.shape[-1], *parts, cos.data_ptr(), sin.data_ptr(),
        int(cos.dtype == torch.float32), table_strides(cos), cos.shape[-2], *integers(positions),
        position_strides(positions), int(layout == "interleaved"), sign,
    )  # fmt: skip
    tensors = (*(t for pair in pairs for t in pair), cos, sin, positions)
    cuda_device.of(x).call("rope", arguments, tensors)


OPS = Rope(turn, cuda_device.why_not).impls()
