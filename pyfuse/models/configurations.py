"""Hugging Face's configurations of GPT-2, Llama and Mistral, BERT, BART, Marian and T5 as the arguments of `Config`.

Each takes what config.json says. ValueError: an option that the Transformer lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


def _only(theirs: Mapping[str, Any], **wanted: Any) -> None:
    """Options that have but one value here."""
    for name, value in wanted.items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"{theirs['model_type']}: {name}={theirs[name]!r}, the Transformer has {value!r} only"
            )


def _activation(theirs: Mapping[str, Any], name: str) -> str:
    if theirs[name] not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{theirs['model_type']}: {name}={theirs[name]!r}, needs one of {known}")
    return _ACTIVATIONS[theirs[name]]


def gpt2(theirs: Mapping[str, Any]) -> dict[str, Any]:
    _only(
        theirs,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    _only(theirs, embd_pdrop=theirs.get("resid_pdrop", 0.1))
    return {
        "vocabulary": theirs["vocab_size"],
        "width": theirs["n_embd"],
        "layers": theirs["n_layer"],
        "heads": theirs["n_head"],
        "hidden": theirs.get("n_inner") or 4 * theirs["n_embd"],
        "max_positions": theirs["n_positions"],
        "norm_eps": theirs["layer_norm_epsilon"],
        "activation": _activation(theirs, "activation_function"),
        "dropout": theirs.get("resid_pdrop", 0.1),
        "attention_dropout": theirs.get("attn_pdrop", 0.1),
        "tied": theirs.get("tie_word_embeddings", True),
    }


def llama(theirs: Mapping[str, Any]) -> dict[str, Any]:
    scaling = theirs.get("rope_parameters") or theirs.get("rope_scaling")
    theta = (scaling or {}).get("rope_theta") or theirs.get("rope_theta") or 10000.0
    if (scaling or {}).get("rope_type") == "default":
        scaling = None
    _only(theirs, partial_rotary_factor=1.0)
    return {
        "vocabulary": theirs["vocab_size"],
        "width": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "kv_heads": theirs.get("num_key_value_heads"),
        "head_dim": theirs.get("head_dim"),
        "hidden": theirs["intermediate_size"],
        "max_positions": theirs["max_position_embeddings"],
        "position": "rope",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm": "rms",
        "norm_eps": theirs["rms_norm_eps"],
        "activation": _activation(theirs, "hidden_act"),
        "gated": True,
        "attention_bias": theirs.get("attention_bias", False),
        "hidden_bias": theirs.get("mlp_bias", False),
        "window": theirs.get("sliding_window"),
        "attention_dropout": theirs.get("attention_dropout", 0.0),
        "tied": theirs.get("tie_word_embeddings", False),
    }


def bert(theirs: Mapping[str, Any]) -> dict[str, Any]:
    _only(theirs, is_decoder=False, position_embedding_type="absolute")
    return {
        "vocabulary": theirs["vocab_size"],
        "width": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "hidden": theirs["intermediate_size"],
        "max_positions": theirs["max_position_embeddings"],
        "causal": False,
        "norm_first": False,
        "norm_eps": theirs["layer_norm_eps"],
        "activation": _activation(theirs, "hidden_act"),
        "embedding_norm": True,
        "segments": theirs["type_vocab_size"],
        "dropout": theirs["hidden_dropout_prob"],
        "attention_dropout": theirs["attention_probs_dropout_prob"],
        "tied": theirs.get("tie_word_embeddings", True),
    }


def bart(theirs: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("attention_heads", "ffn_dim"):
        _only(theirs, **{f"encoder_{name}": theirs[f"decoder_{name}"]})
    return {
        "vocabulary": theirs["vocab_size"],
        "width": theirs["d_model"],
        "layers": theirs["decoder_layers"],
        "encoder_layers": theirs["encoder_layers"],
        "heads": theirs["decoder_attention_heads"],
        "hidden": theirs["decoder_ffn_dim"],
        "max_positions": theirs["max_position_embeddings"],
        "norm_first": False,
        "activation": _activation(theirs, "activation_function"),
        "embedding_norm": True,
        "embedding_scale": theirs["d_model"] ** 0.5 if theirs.get("scale_embedding") else 1.0,
        "head_bias": True,
        "dropout": theirs["dropout"],
        "attention_dropout": theirs["attention_dropout"],
        "hidden_dropout": theirs["activation_dropout"],
        "tied": theirs.get("tie_word_embeddings", True),
    }


def marian(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """BART without its norm of the embedding. The sinusoids of its positions are read as a learned table."""
    _only(theirs, share_encoder_decoder_embeddings=True)
    return bart(theirs) | {"embedding_norm": False}


def t5(theirs: Mapping[str, Any]) -> dict[str, Any]:
    gate, _, activation = theirs.get("feed_forward_proj", "relu").rpartition("-")
    if (gate, activation) == ("gated", "gelu"):
        activation = "gelu_new"
    # T5 1.1 has a matrix of its own for the logits, and no scale before it.
    tied = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
    rates = ("dropout", "attention_dropout", "hidden_dropout")
    return dict.fromkeys(rates, theirs["dropout_rate"]) | {
        "vocabulary": theirs["vocab_size"],
        "width": theirs["d_model"],
        "layers": theirs.get("num_decoder_layers") or theirs["num_layers"],
        "encoder_layers": theirs["num_layers"],
        "heads": theirs["num_heads"],
        "head_dim": theirs["d_kv"],
        "hidden": theirs["d_ff"],
        "position": "relative",
        "buckets": theirs["relative_attention_num_buckets"],
        "max_distance": theirs.get("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "norm": "rms",
        "norm_eps": theirs["layer_norm_epsilon"],
        "activation": _activation({**theirs, "feed_forward_proj": activation}, "feed_forward_proj"),
        "gated": gate == "gated",
        "attention_bias": False,
        "hidden_bias": False,
        "tied": tied,
        "head_scale": theirs["d_model"] ** -0.5 if tied else 1.0,
    }
