"""The Triton kernels of kernels/, on NVIDIA's and AMD's GPUs."""

from __future__ import annotations

from pyfuse.backends import (
    triton_attention,
    triton_attention_gradient,
    triton_decode,
    triton_device,
    triton_dropout,
    triton_embed,
    triton_embed_gradient,
    triton_norm,
    triton_norm_gradient,
    triton_rope,
)
from pyfuse.backends.gpu_attention_ops import Attention
from pyfuse.backends.gpu_norm import Norms
from pyfuse.backends.triton_device import why_unavailable
from pyfuse.dispatch import Gradient, Impl

__all__ = ["OPS", "why_unavailable"]

OPS: dict[str, Impl] = {
    **Attention(
        triton_device.why_not,
        triton_attention.write,
        triton_attention_gradient.Backward,
        triton_decode.decode_into,
    ).ops(),
    **Norms(triton_device.why_not, triton_norm.write, triton_norm_gradient.write_gradients).ops(),
    "dropout": triton_dropout.DROPOUT,
    "embed": Impl(
        triton_embed.embed,
        triton_embed.why_not_embed,
        Gradient(
            triton_embed.forward,
            triton_embed_gradient.backward,
            triton_embed_gradient.why_not_backward,
        ),
    ),
    **triton_rope.OPS,
}
