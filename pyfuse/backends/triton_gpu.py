"""The Triton kernels of kernels/, on NVIDIA's and AMD's GPUs."""

from __future__ import annotations

from pyfuse.backends import (
    triton_attention,
    triton_attention_gradient,
    triton_decode,
    triton_embed,
    triton_embed_gradient,
    triton_norm,
    triton_norm_gradient,
    triton_rope,
)
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
    "layer_norm": Impl(
        triton_norm.layer_norm,
        triton_norm.why_not_layer_norm,
        Gradient(
            triton_norm_gradient.layer_norm_forward,
            triton_norm_gradient.layer_norm_backward,
            triton_norm_gradient.why_not,
            triton_norm_gradient.restore_layer_norm,
        ),
    ),
    "rms_norm": Impl(
        triton_norm.rms_norm,
        triton_norm.why_not_rms_norm,
        Gradient(
            triton_norm_gradient.rms_norm_forward,
            triton_norm_gradient.rms_norm_backward,
            triton_norm_gradient.why_not,
            triton_norm_gradient.restore_rms_norm,
        ),
    ),
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
