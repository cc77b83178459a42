"""How Hugging Face writes GPT-2, Llama, Mistral, BERT, BART, Marian and T5 down: for each of our layers the names of
theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyfuse.models import configurations

Names = dict[str, list[str]]


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes models of a type down.

    config: their configuration -> ours. prefix: before the names of all but the head, in a model that has one.
    stacks: ours -> where their layers are. block: our layer, of all stacks or of a certain one -> theirs, several one
    after another; outer: the same outside the blocks.
    heads: their classes -> Config.head. unread: beginnings of names whose weights have no place here, or stand in
    another as well. copies: of which name another one is a copy, where the head is not tied.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    prefix: str
    stacks: dict[str, str]
    block: Names
    outer: Names
    heads: dict[str, str | None]
    unread: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False  # matrices are [in, out]
    first_position: int = 0  # row of their position table

    def names(self, layer: str) -> list[str]:
        """Theirs of one of our layers; none, if it has no place there."""
        stack, _, rest = layer.partition(".blocks.")
        if not rest:
            return self.outer.get(layer, [])
        index, _, part = rest.partition(".")
        inner = self.block.get(part) or self.block.get(f"{stack}.{part}", [])
        return [f"{self.stacks[stack]}.{index}.{name}" for name in inner]


def family_of(theirs: Mapping[str, Any]) -> Family:
    """Of their configuration. ValueError: a type of model that the Transformer lacks."""
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r}, needs one of {', '.join(FAMILIES)}")
    if kind == "t5" and "gated" in theirs.get("feed_forward_proj", ""):  # T5 1.1
        kind = "mt5"
    return FAMILIES[kind]


def of_head(ours: str) -> bool:
    """Whether a layer or parameter stands beside the blocks and their embedding."""
    return not ours.startswith(("encoder.", "decoder."))


def config_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their configuration as the arguments of `Config`. ValueError: a type or an option that the Transformer lacks."""
    family = family_of(theirs)
    architecture, *_ = theirs.get("architectures") or [None]
    found = family.config(theirs) | {"head": family.heads.get(architecture)}
    if found["head"] == "classes":
        names = theirs.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        labels = tuple(names[i] for i in sorted(names, key=int))
        found["classes"] = len(labels)
        unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(labels))
        found["labels"] = () if unnamed else labels
    return found


_LLAMA = Family(
    configurations.llama,
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
    {"LlamaForCausalLM": "lm", "LlamaModel": None},
    ("lm_head.",),
)
_BART = Family(
    configurations.bart,
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
    copies={
        f"model.{side}.embed_tokens.weight": "model.shared.weight"
        for side in ("encoder", "decoder")
    },
    first_position=2,
)
_T5 = Family(
    configurations.t5,
    "",
    {"encoder": "encoder.block", "decoder": "decoder.block"},
    {
        "norm1": ["layer.0.layer_norm"],
        "attention.qkv": [f"layer.0.SelfAttention.{name}" for name in "qkv"],
        "attention.out": ["layer.0.SelfAttention.o"],
        "cross_norm": ["layer.1.layer_norm"],
        "cross.query": ["layer.1.EncDecAttention.q"],
        "cross.key_value": ["layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"],
        "cross.out": ["layer.1.EncDecAttention.o"],
    }
    | {
        f"{side}.{ours}": [f"layer.{i}.{theirs}"]
        for side, i in (("encoder", 1), ("decoder", 2))
        for ours, theirs in (
            ("norm2", "layer_norm"),
            ("feed_forward.up", "DenseReluDense.wi"),
            ("feed_forward.down", "DenseReluDense.wo"),
        )
    },
    {
        f"{side}.{ours}": [theirs if theirs == "shared" else f"{side}.{theirs}"]
        for side in ("encoder", "decoder")
        for ours, theirs in (
            ("embedding.token", "shared"),
            ("relative", "block.0.layer.0.SelfAttention.relative_attention_bias"),
            ("norm", "final_layer_norm"),
        )
    }
    | {"matrix": ["lm_head.weight"]},
    {
        "T5ForConditionalGeneration": "lm",
        "MT5ForConditionalGeneration": "lm",
        "T5Model": None,
        "MT5Model": None,
    },
    ("lm_head.", "encoder.embed_tokens.", "decoder.embed_tokens."),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        configurations.gpt2,
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
        {"GPT2LMHeadModel": "lm", "GPT2Model": None},
        ("lm_head.",),
        transposed=True,
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, heads={"MistralForCausalLM": "lm", "MistralModel": None}),
    "bert": Family(
        configurations.bert,
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
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    ),
    "bart": _BART,
    "marian": replace(
        _BART,
        config=configurations.marian,
        heads={"MarianMTModel": "lm", "MarianModel": None},
        first_position=0,
    ),
    "t5": _T5,
    "mt5": replace(
        _T5,
        block=_T5.block
        | {
            f"{side}.feed_forward.up": [f"layer.{i}.DenseReluDense.wi_{j}" for j in (0, 1)]
            for side, i in (("encoder", 1), ("decoder", 2))
        },
    ),
}
