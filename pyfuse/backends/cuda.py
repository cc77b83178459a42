"""The CUDA kernels of csrc/cuda (pyfuse._cuda), on NVIDIA's GPUs from sm_80 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyfuse.backends import (
    cuda_attention,
    cuda_attention_gradient,
    cuda_decode,
    cuda_device,
    cuda_embed,
    cuda_embed_gradient,
    cuda_norm,
    cuda_norm_gradient,
    cuda_rope,
    gpu_order,
)
from pyfuse.backends.cuda_device import why_unavailable
from pyfuse.backends.gpu_attention_ops import Attention
from pyfuse.backends.gpu_norm import Norms
from pyfuse.dispatch import Gradient, Impl

__all__ = ["OPS", "why_unavailable"]


def _yields(operation: str) -> Callable[..., str | None]:
    def yields(
        gradient: bool, q: Tensor, k: Tensor, v: Tensor, *_: Tensor, **options: Any
    ) -> str | None:
        arch = cuda_device.of(q).arch
        return gpu_order.triton_first(operation, arch, q, v, gradient, options)

    return yields


ATTENTION = Attention(
    cuda_device.why_not,
    cuda_attention.write,
    cuda_attention_gradient.Backward,
    cuda_decode.decode_into,
    _yields,
)
OPS: dict[str, Impl] = {
    **ATTENTION.ops(),
    "embed": Impl(
        cuda_embed.embed,
        cuda_embed.why_not_embed,
        Gradient(
            cuda_embed.forward,
            cuda_embed_gradient.backward,
            cuda_embed_gradient.why_not_backward,
        ),
    ),
    **cuda_rope.OPS,
    **Norms(cuda_norm.why_not, cuda_norm.write, cuda_norm_gradient.write_gradients).ops(),
}
