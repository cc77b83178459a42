"""How Hugging Face writes GPT-2, Llama and Mistral, BERT and BART down: for each, its configuration in the terms of
`pyfuse.models.transformer`, and for each of our layers the names of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Names = dict[str, list[str]]
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes models of a type down.

    config: their configuration -> ours. prefix: before the names in a model with a head. stacks: ours -> where their
    layers are. block, outer: our layer -> theirs, several one after another. heads: their classes -> Config.head.
    unread: beginnings of names whose weights have no place here, or stand in another as well.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    prefix: str
    stacks: dict[str, str]
    block: Names
    outer: Names
    heads: dict[str, str | None]
    unread: tuple[str, ...] = ()
    transposed: bool = False  # matrices are [in, out]
    first_position: int = 0  # row of their position table


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


def _gpt2(theirs: Mapping[str, Any]) -> dict[str, Any]:
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


def _llama(theirs: Mapping[str, Any]) -> dict[str, Any]:
    scaling = theirs.get("rope_parameters") or theirs.get("rope_scaling")
    theta = (scaling or {}).get("rope_theta") or theirs.get("rope_theta") or 10000.0
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


def _bert(theirs: Mapping[str, Any]) -> dict[str, Any]:
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


def _bart(theirs: Mapping[str, Any]) -> dict[str, Any]:
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


_LLAMA = Family(
    _llama,
    "model.",
    {"decoder": "layers"},
    {
        "norm1": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "norm2": ["post_attention_layernorm"],
        "feed_forward.up": ["mlp.gate_proj", "mlp.up_proj"],
        "feed_forward.down": ["mlp.down_proj"],
    },
    {
        "decoder.embedding.token": ["embed_tokens"],
        "decoder.norm": ["norm"],
        "matrix": ["lm_head.weight"],
    },
    {"LlamaForCausalLM": "lm", "MistralForCausalLM": "lm"},
    ("lm_head.",),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt2,
        "transformer.",
        {"decoder": "h"},
        {
            "norm1": ["ln_1"],
            "attention.qkv": ["attn.c_attn"],
            "attention.out": ["attn.c_proj"],
            "norm2": ["ln_2"],
            "feed_forward.up": ["mlp.c_fc"],
            "feed_forward.down": ["mlp.c_proj"],
        },
        {
            "decoder.embedding.token": ["wte"],
            "decoder.embedding.position": ["wpe"],
            "decoder.norm": ["ln_f"],
            "matrix": ["lm_head.weight"],
        },
        {"GPT2LMHeadModel": "lm"},
        ("lm_head.",),
        transposed=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "bert": Family(
        _bert,
        "bert.",
        {"decoder": "encoder.layer"},
        {
            "attention.qkv": [f"attention.self.{name}" for name in ("query", "key", "value")],
            "attention.out": ["attention.output.dense"],
            "norm1": ["attention.output.LayerNorm"],
            "feed_forward.up": ["intermediate.dense"],
            "feed_forward.down": ["output.dense"],
            "norm2": ["output.LayerNorm"],
        },
        {
            "decoder.embedding.token": ["embeddings.word_embeddings"],
            "decoder.embedding.position": ["embeddings.position_embeddings"],
            "decoder.embedding.segment": ["embeddings.token_type_embeddings"],
            "decoder.embedding.norm": ["embeddings.LayerNorm"],
            "transform": ["cls.predictions.transform.dense"],
            "transform_norm": ["cls.predictions.transform.LayerNorm"],
            "matrix": ["cls.predictions.decoder.weight"],
            "bias": ["cls.predictions.bias"],
            "pooler": ["pooler.dense"],
            "classifier": ["classifier"],
        },
        {"BertForMaskedLM": "mlm", "BertForSequenceClassification": "classes", "BertModel": None},
        ("pooler.", "cls.predictions.decoder.", "cls.seq_relationship."),
    ),
    "bart": Family(
        _bart,
        "model.",
        {"encoder": "encoder.layers", "decoder": "decoder.layers"},
        {
            "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attention.out": ["self_attn.out_proj"],
            "norm1": ["self_attn_layer_norm"],
            "cross.query": ["encoder_attn.q_proj"],
            "cross.key_value": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
            "cross.out": ["encoder_attn.out_proj"],
            "cross_norm": ["encoder_attn_layer_norm"],
            "feed_forward.up": ["fc1"],
            "feed_forward.down": ["fc2"],
            "norm2": ["final_layer_norm"],
        },
        {
            f"{side}.embedding.{ours}": [theirs if theirs == "shared" else f"{side}.{theirs}"]
            for side in ("encoder", "decoder")
            for ours, theirs in (
                ("token", "shared"),
                ("position", "embed_positions"),
                ("norm", "layernorm_embedding"),
            )
        }
        | {"matrix": ["lm_head.weight"], "bias": ["final_logits_bias"]},
        {"BartForConditionalGeneration": "lm", "BartModel": None},
        ("lm_head.", "encoder.embed_tokens.", "decoder.embed_tokens."),
        first_position=2,
    ),
}
