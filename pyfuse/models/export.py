"""A `Transformer` in the files that Hugging Face's libraries, and `pyfuse.models.checkpoint`, read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.models.families import FAMILIES
from pyfuse.models.transformer import Attention, Config, Transformer

_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def hf_config(config: Config, end: int | None) -> dict[str, Any]:
    """config.json of a decoder. end: the id of the token after a document.

    ValueError: neither GPT-2 nor Llama is made like that.
    """
    c = config
    common = {
        "vocab_size": c.vocabulary,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": c.tied,
        "dtype": "float32",
    }
    if c.head != "lm" or not c.causal or c.encoder_layers or c.head_bias or not c.norm_first:
        raise ValueError("config: only decoders with norms first have a form to be saved in")
    if (c.position, c.norm, c.gated, c.window, c.kv_heads) == ("learned", "layer", False, None, None):  # fmt: skip
        return common | _gpt2(c)
    if (c.position, c.norm, c.gated) == ("rope", "rms", True):
        return common | _llama(c)
    raise ValueError("config: neither GPT-2 nor Llama is made like that")


def _gpt2(c: Config) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": _NAMES[c.activation],
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
    }


def _llama(c: Config) -> dict[str, Any]:
    rope = c.rope_scaling or {"rope_type": "default", "rope_theta": c.rope_theta}
    kind = "llama" if c.window is None else "mistral"
    return {
        "model_type": kind,
        "architectures": ["LlamaForCausalLM" if c.window is None else "MistralForCausalLM"],
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "head_dim": c.d,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": _NAMES[c.activation],
        "attention_bias": c.attention_bias,
        "mlp_bias": c.hidden_bias,
        "attention_dropout": c.attention_dropout,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope,
        **({} if c.window is None else {"sliding_window": c.window}),
    }


def hf_tensors(model: Transformer, kind: str) -> dict[str, Tensor]:
    """The weights under their names: the inverse of `from_pretrained`, bit by bit."""
    family, found = FAMILIES[kind], {}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        stack, _, rest = layer.partition(".blocks.")
        if not layer:
            found[family.outer[name][0]] = tensor
            continue
        if rest:
            index, _, inner = rest.partition(".")
            theirs = [f"{family.stacks[stack]}.{index}.{n}" for n in family.block[inner]]
        else:
            theirs = family.outer[layer]
        sizes = _sizes(model, layer, len(theirs), tensor)
        for their_name, piece in zip(theirs, tensor.split(sizes), strict=True):
            turned = (
                family.transposed and tensor.dim() == 2 and rest and part == "weight"
            )  # GPT-2's Conv1D
            found[f"{family.prefix}{their_name}.{part}"] = piece.t() if turned else piece
    dense = torch.contiguous_format
    return {name: t.detach().cpu().clone(memory_format=dense) for name, t in found.items()}


def _sizes(model: Transformer, layer: str, pieces: int, tensor: Tensor) -> list[int]:
    """Rows of the layers that ours is made of."""
    if pieces == 3:
        attention = model.get_submodule(layer.rpartition(".")[0])
        assert isinstance(attention, Attention)
        return attention.sizes
    return [len(tensor) // pieces] * pieces
