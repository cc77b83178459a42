"""Which module is patched how: the table, and the walk over a model that applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from pyfuse.hf import fused, layers
from pyfuse.hf.fingerprint import fingerprint
from pyfuse.hf.linears import activation_name, expect_activation, is_linear, patch_linear
from pyfuse.hf.norms import is_norm, patch_norm
from pyfuse.hf.receipt import Tally
from pyfuse.hf.rope import patch_rope, rebound_forward, uses_rope
from pyfuse.hf.state import ATTRIBUTE, bind, state_of

MLP, RESIDUAL, ROPE = "feed-forward", "residual + norm", "attention + RoPE"
Why = Callable[[nn.Module], str | None]


class Fused(NamedTuple):
    """A fused method for one fingerprint; ``why_not`` looks at what stands inside the module."""

    kind: str
    function: Callable[..., Any]
    why_not: Why
    method: str = "forward"
    name: str = ""  # in fused.FEED_FORWARD


def _packed(module: nn.Module | None) -> bool:
    state = None if module is None else module.__dict__.get(ATTRIBUTE)
    return state is not None and state.linear is not None


def _feed_forward(name: str, function: Callable[..., Any], method: str = "forward") -> Fused:
    *linears, act = fused.FEED_FORWARD[name][1]

    def why_not(module: nn.Module) -> str | None:
        if not all(_packed(module._modules.get(linear)) for linear in linears):
            return "not all of its linear layers are packed"
        return _recognise_activation(module, act, linears[0])

    return Fused(MLP, function, why_not, method, name)


def _recognise_activation(module: nn.Module, name: str, before: str | None = None) -> str | None:
    """Note the activation ``module.name``; the linear layer ``before`` will be asked to take it along."""
    activation = getattr(module, name, None)
    kind = None if activation is None else activation_name(activation)
    if kind is None:
        return "its activation is none of gelu, gelu_tanh, silu, relu"
    state_of(module).activation = (activation, kind)
    linear = module._modules.get(before) if before is not None else None
    if linear is not None and _packed(linear):
        expect_activation(linear, kind)
    return None


def _intermediate(module: nn.Module) -> str | None:
    if not _packed(module._modules.get("dense")):
        return "its linear layer is not packed"
    return _recognise_activation(module, "intermediate_act_fn", "dense")


def _bert_layer(module: nn.Module) -> str | None:
    for name in ("intermediate", "output"):
        part = module._modules.get(name)
        state = None if part is None else part.__dict__.get(ATTRIBUTE)
        if state is None or not state.fused:
            return f"its {name} is not fused"
    if not _packed(module._modules["output"]._modules.get("dense")):  # type: ignore[union-attr]
        return "its output's linear layer is not packed"
    return None


def _norms(*names: str) -> Why:
    def why_not(module: nn.Module) -> str | None:
        for name in names:
            norm = module._modules.get(name)
            state = None if norm is None else norm.__dict__.get(ATTRIBUTE)
            if state is None or state.norm is None:
                return f"its {name} is not patched"
        return None

    return why_not


def _bart(*names: str) -> Why:
    norms = _norms(*names)

    def why_not(module: nn.Module) -> str | None:
        reason = norms(module)
        if reason is None and _recognise_activation(module, "activation_fn", "fc1") is not None:
            state_of(module).activation = (None, "")  # the activation then runs by itself
        return reason

    return why_not


def _rotates(module: nn.Module) -> str | None:
    cls: Any = type(module)
    if rebound_forward(cls) is None:
        return "its apply_rotary_pos_emb is not the half-split rotation of q and k"
    return None


def _inner_mlp(module: nn.Module) -> str | None:
    block: Any = module._modules["DenseReluDense"]
    state = block.__dict__.get(ATTRIBUTE)
    return None if state is not None and state.fused else "its feed-forward block is not fused"


# Fingerprint -> the fused method written for this body. The comment names the class it was read in;
# many others share it. Order of application: from the inside out.
FUSED: dict[str, Fused] = {
    "6710dcaa350de3ce": _feed_forward("llama_mlp", fused.llama_mlp),  # LlamaMLP
    "81b856baadf5323f": _feed_forward("t5_gated", fused.t5_mlp),  # T5DenseGatedActDense
    "42be5fa28bd0ab84": _feed_forward("t5_dense", fused.t5_mlp),  # T5DenseActDense
    "6f969780608bef51": _feed_forward("gpt2_mlp", fused.t5_mlp),  # GPT2MLP
    "1541e15a1e6891f6": _feed_forward("distilbert_ffn", fused.distilbert_ffn, "ff_chunk"),  # FFN
    "b15aae69d2963fa5": Fused(  # BertLayer
        MLP, fused.bert_feed_forward, _bert_layer, "feed_forward_chunk"
    ),
    "6002bcd3b4e123a0": Fused(MLP, fused.bert_intermediate, _intermediate),  # BertIntermediate
    "354ffc440c3edfc0": Fused(
        RESIDUAL, fused.bert_output, _norms("LayerNorm")
    ),  # BertSelfOutput, BertOutput
    "3ba2507a5bd32fab": Fused(RESIDUAL, fused.t5_layer_ff, _inner_mlp),  # T5LayerFF
    "12f7488eb2973ab7": Fused(  # LlamaDecoderLayer
        RESIDUAL, layers.llama_layer, _norms("post_attention_layernorm")
    ),
    "0715ed467a0fd34b": Fused(RESIDUAL, layers.gpt2_block, _norms("ln_2")),  # GPT2Block
    "57d1b308c344a234": Fused(  # DistilBERT's TransformerBlock
        RESIDUAL, layers.distilbert_block, _norms("sa_layer_norm", "output_layer_norm")
    ),
    "06f1df2bfb82f912": Fused(  # BartEncoderLayer
        RESIDUAL, layers.bart_encoder_layer, _bart("self_attn_layer_norm", "final_layer_norm")
    ),
    "6ff47dcfcc565e73": Fused(  # BartDecoderLayer
        RESIDUAL, layers.bart_decoder_layer, _bart("self_attn_layer_norm", "final_layer_norm")
    ),
    "caabf338587d7fcd": Fused(ROPE, layers.llama_attention, _rotates),  # LlamaAttention
    "38226b4e7ef77fbd": Fused(ROPE, layers.llama_attention, _rotates),  # MistralAttention
    "98f80de5d1b428b2": Fused(ROPE, layers.llama_attention, _rotates),  # Qwen2Attention
    "f07d341d639db405": Fused(ROPE, layers.llama_attention, _rotates),  # Qwen3Attention
}


def patch_modules(model: nn.Module, tally: Tally, blocked: dict[str, str], linear: bool) -> None:
    """Patch every module of ``model`` that the tables know; count in ``tally`` what was not.

    blocked: for "norm" and "rope", why no kernel of pyfuse serves this model's device and dtype.
    """
    modules = list(dict.fromkeys(model.modules()))
    for module in modules:
        if is_norm(module):
            kind = "LayerNorm" if isinstance(module, nn.LayerNorm) else "RMSNorm"
            tally.add(kind, blocked.get("norm") or patch_norm(module))
        elif linear and is_linear(module):
            tally.add(_linear_kind(module), patch_linear(module))
        elif not linear and is_linear(module):
            tally.add(_linear_kind(module), "linear=False")
    for module in reversed(
        modules
    ):  # parts come after their whole in modules(): from the inside out
        _patch_fused(module, tally, blocked)


def _linear_kind(module: nn.Module) -> str:
    return "Linear" if isinstance(module, nn.Linear) else "Conv1D"


def _patch_fused(module: nn.Module, tally: Tally, blocked: dict[str, str]) -> None:
    for method in ("forward", "ff_chunk", "feed_forward_chunk"):
        original = getattr(type(module), method, None)
        key = None if original is None else fingerprint(original)
        entry = FUSED.get(key or "")
        if entry is None or entry.method != method:
            continue
        reason = blocked.get("rope") if entry.kind == ROPE else None
        if method in module.__dict__:
            reason = "its forward is replaced already"
        reason = reason or entry.why_not(module)
        if reason is None:
            bind(module, method, entry.function)
            state_of(module).fused = entry.name or entry.function.__name__
        tally.add(entry.kind, reason)
        return
    if uses_rope(module):
        tally.add("RoPE", blocked.get("rope") or patch_rope(module))
