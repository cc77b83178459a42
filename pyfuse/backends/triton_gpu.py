"""The Triton kernels of kernels/, on NVIDIA's and AMD's GPUs."""

from __future__ import annotations

from pyfuse.backends import triton_attention, triton_attention_gradient
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
}
