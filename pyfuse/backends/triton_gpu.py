"""The Triton kernels of kernels/, on NVIDIA's and AMD's GPUs."""

from __future__ import annotations

from pyfuse.backends import (
    triton_attention,
    triton_attention_gradient,
    triton_decode,
    triton_device,
    triton_embed,
    triton_embed_gradient,
    triton_norm,
    triton_norm_gradient,
    triton_rope,
)
from pyfuse.backends.gpu_norm import Norms
from pyfuse.backends.triton_device import why_unavailable
from pyfuse.dispatch import Gradient, Impl

__all__ = ["OPS", "why_unavailable"]

OPS: dict[str, Impl] = {
    "attention": Impl(
        triton_attention.attention,
        triton_attention.why_not_attention,
        Gradient(
            triton_attention_gradient.attention_forward,
            triton_attention_gradient.attention_backward,
            triton_attention_gradient.why_not,
            triton_attention_gradient.restore,
        ),
    ),
    "varlen_attention": Impl(
        triton_attention.varlen_attention,
        triton_attention.why_not_varlen_attention,
        Gradient(
            triton_attention_gradient.varlen_attention_forward,
            triton_attention_gradient.varlen_attention_backward,
            triton_attention_gradient.why_not,
            triton_attention_gradient.restore,
        ),
    ),
    "decode_attention": Impl(
        triton_decode.decode_attention,
        triton_decode.why_not_decode_attention,
    ),
    **Norms(triton_device.why_not, triton_norm.write, triton_norm_gradient.write_gradients).ops(),
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
