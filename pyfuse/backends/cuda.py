"""The CUDA kernels of csrc/cuda (pyfuse._cuda), on NVIDIA's GPUs from sm_80 on."""

from __future__ import annotations

from pyfuse.backends import cuda_attention, cuda_norm, cuda_norm_gradient
from pyfuse.backends.cuda_device import why_unavailable
from pyfuse.backends.gpu_norm import Norms
from pyfuse.dispatch import Impl

__all__ = ["OPS", "why_unavailable"]

OPS: dict[str, Impl] = {
    "attention": Impl(cuda_attention.attention, cuda_attention.why_not_attention),
    "varlen_attention": Impl(
        cuda_attention.varlen_attention, cuda_attention.why_not_varlen_attention
    ),
    **Norms(cuda_norm.why_not, cuda_norm.write, cuda_norm_gradient.write_gradients).ops(),
}
