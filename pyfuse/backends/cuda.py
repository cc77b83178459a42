"""The CUDA kernels of csrc/cuda (pyfuse._cuda), on NVIDIA's GPUs from sm_80 on."""

from __future__ import annotations

from pyfuse.backends import cuda_attention, cuda_attention_gradient
from pyfuse.backends.cuda_device import why_unavailable
from pyfuse.dispatch import Gradient, Impl

__all__ = ["OPS", "why_unavailable"]

OPS: dict[str, Impl] = {
    "attention": Impl(
        cuda_attention.attention,
        cuda_attention.why_not_attention,
        Gradient(
            cuda_attention_gradient.attention_forward,
            cuda_attention_gradient.attention_backward,
            cuda_attention_gradient.why_not,
            cuda_attention_gradient.restore,
        ),
    ),
    "varlen_attention": Impl(
        cuda_attention.varlen_attention,
        cuda_attention.why_not_varlen_attention,
        Gradient(
            cuda_attention_gradient.varlen_attention_forward,
            cuda_attention_gradient.varlen_attention_backward,
            cuda_attention_gradient.why_not,
            cuda_attention_gradient.restore,
        ),
    ),
}
