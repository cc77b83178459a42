"""The CPU kernels of csrc/cpu, called with pointers, sizes and strides."""

from __future__ import annotations

from pyfuse.backends import (
    cpu_attention,
    cpu_attention_gradient,
    cpu_decode,
    cpu_dropout,
    cpu_embed,
    cpu_norm,
    cpu_norm_gradient,
    cpu_rope,
)
from pyfuse.backends.cpu_module import available_isas, isa, select_isa, why_unavailable
from pyfuse.backends.rope_pair import pair_of
from pyfuse.dispatch import Gradient, Impl

__all__ = ["OPS", "available_isas", "isa", "select_isa", "why_unavailable"]

OPS: dict[str, Impl] = {
    "attention": Impl(
        cpu_attention.attention,
        cpu_attention.why_not_attention,
        Gradient(
            cpu_attention_gradient.attention_forward,
            cpu_attention_gradient.attention_backward,
            cpu_attention_gradient.why_not,
            cpu_attention_gradient.restore,
        ),
    ),
    "varlen_attention": Impl(
        cpu_attention.varlen_attention,
        cpu_attention.why_not_varlen_attention,
        Gradient(
            cpu_attention_gradient.varlen_attention_forward,
            cpu_attention_gradient.varlen_attention_backward,
            cpu_attention_gradient.why_not,
            cpu_attention_gradient.restore,
        ),
    ),
    "decode_attention": Impl(cpu_decode.decode_attention, cpu_decode.why_not_decode_attention),
    "dropout": cpu_dropout.DROPOUT,
    "embed": Impl(
        cpu_embed.embed,
        cpu_embed.why_not_embed,
        Gradient(cpu_embed.forward, cpu_embed.backward, cpu_embed.why_not_backward),
    ),
    "layer_norm": Impl(
        cpu_norm.layer_norm,
        cpu_norm.why_not_layer_norm,
        Gradient(
            cpu_norm_gradient.layer_norm_forward,
            cpu_norm_gradient.layer_norm_backward,
            cpu_norm_gradient.why_not,
            cpu_norm_gradient.restore,
        ),
    ),
    "rms_norm": Impl(
        cpu_norm.rms_norm,
        cpu_norm.why_not_rms_norm,
        Gradient(
            cpu_norm_gradient.rms_norm_forward,
            cpu_norm_gradient.rms_norm_backward,
            cpu_norm_gradient.why_not,
            cpu_norm_gradient.restore,
        ),
    ),
    "rope": Impl(
        cpu_rope.rope,
        cpu_rope.why_not_rope,
        Gradient(cpu_rope.forward, cpu_rope.backward, cpu_rope.why_not_backward, cpu_rope.restore),
    ),
}
OPS["rope_pair"] = pair_of(OPS["rope"])
