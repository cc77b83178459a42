"""The weights of real models for `pyfuse.models.transformer`: GPT-2, Llama and Mistral, BERT, BART.

    model = from_pretrained("folder")                    # config.json beside model.safetensors
    model = from_pretrained("file.gguf")                 # dequantized by transformers
    model = from_pretrained(hf_model)                    # a Hugging Face model in memory

A family of models is a table: its configuration in our terms, and for each of our layers the names of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse import ops as pyfuse_ops
from pyfuse.models.transformer import Config, Transformer

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


def from_pretrained(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    ops: Any = pyfuse_ops,
    **changes: Any,
) -> Transformer:
    """A `Transformer` with the weights of `source`, in inference mode.

    source: a folder with config.json and safetensors (one file or several with an index), a GGUF file, or a Hugging
      Face model. dtype: of the weights, by default as they are there. ops: see `Transformer`.
    changes: of the `Config`, as dropout=0.1, or head="classes", classes=2: layers of a head that the source lacks
      keep their initial values.

    ValueError: a type of model, or an option of one, that the Transformer lacks; a weight that is missing or has no
    place; weights in nothing but a pickle. FileNotFoundError: no such folder, or no weights in it.
    """
    theirs, tensors, where = _read(source)
    kind = theirs.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ValueError(f"{where}: model_type {kind!r}, needs one of {', '.join(FAMILIES)}")
    fields = family.config(theirs)
    (architecture,) = theirs.get("architectures") or [None]
    fields.setdefault("head", family.heads.get(architecture, None))
    if fields["head"] == "classes":
        fields["classes"] = len(theirs.get("id2label") or (0, 1))
    own_head = fields["head"]
    config = Config(**fields | changes)
    model = Transformer(config, ops)
    state = model.state_dict()
    weights = _Weights(family, tensors, config.position == "learned")
    missing = [name for name in state if not weights.copy_to(name, state[name])]
    lost = [n for n in missing if config.head == own_head or not _of_head(n)]
    if lost:
        raise ValueError(f"{where}: no weights for {', '.join(lost[:5])}{' …' * (len(lost) > 5)}")
    placeless = weights.unread()
    if placeless and config.head == own_head:
        raise ValueError(
            f"{where}: weights without a place: {', '.join(placeless[:5])}{' …' * (len(placeless) > 5)}"
        )
    return model.to(
        dtype or next(t.dtype for t in tensors.values() if t.is_floating_point())
    ).eval()


def _of_head(name: str) -> bool:
    return not name.startswith(("encoder.", "decoder."))


class _Weights:
    """Their tensors under our names."""

    def __init__(self, family: Family, tensors: Mapping[str, Tensor], learned: bool) -> None:
        self.family, self.tensors = family, tensors
        self.read: set[str] = set()
        self.learned = learned

    def copy_to(self, name: str, to: Tensor) -> bool:
        """Whether there is such a weight; copied then."""
        layer, _, kind = name.rpartition(".")
        if not layer:  # a parameter of the model itself: its name says all
            layer, kind = name, ""
        parts = [self._find(t, kind) for t in self._names(layer)]
        if not parts or None in parts:
            return False
        found = [p for p in parts if p is not None]
        if (
            self.family.transposed
            and kind == "weight"
            and ".embedding." not in name
            and to.dim() == 2
        ):
            found = [t.t() for t in found]
        if layer.endswith("embedding.position"):
            found = [t[self.family.first_position :] for t in found]
        whole = torch.cat([t.reshape(-1) if to.dim() == 1 else t for t in found])
        if whole.shape != to.shape:
            raise ValueError(f"{name}: shape {tuple(whole.shape)}, needs {tuple(to.shape)}")
        to.copy_(whole)
        return True

    def _names(self, layer: str) -> Iterator[str]:
        stack, _, rest = layer.partition(".blocks.")
        if not rest:
            yield from self.family.outer.get(layer, ())
            return
        index, _, part = rest.partition(".")
        for theirs in self.family.block.get(part, ()):
            yield f"{self.family.stacks[stack]}.{index}.{theirs}"

    def _find(self, layer: str, kind: str) -> Tensor | None:
        name = f"{layer}.{kind}" if kind else layer
        for candidate in (self.family.prefix + name, name):
            if candidate in self.tensors:
                self.read.add(candidate)
                return self.tensors[candidate]
        return None

    def unread(self) -> list[str]:
        prefix, skipped = self.family.prefix, self.family.unread
        return [
            name
            for name in self.tensors
            if name not in self.read
            and not name.removeprefix(prefix).startswith(skipped)
            and not name.endswith((".attn.bias", ".attn.masked_bias", "inv_freq", "position_ids"))
        ]


# ---- reading -------------------------------------------------------------------------------------


def _read(source: str | Path | nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """(configuration, weights, a name for errors)"""
    if isinstance(source, nn.Module):
        config = dict(source.config.to_dict()) | {"architectures": [type(source).__name__]}  # type: ignore[union-attr, operator]
        return config, dict(source.state_dict()), type(source).__name__
    path = Path(source)
    if path.suffix == ".gguf":
        return _read(_dequantized(path))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no folder of a model (it has no config.json), nor a GGUF file"
        )
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config, _read_safetensors(path), str(path)


def _dequantized(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [p.name for p in folder.glob("model.safetensors")]
    if files:
        return {name: t for file in files for name, t in load_file(folder / file).items()}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    if pickles:
        raise ValueError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run any code when it is read; save them as"
            " safetensors: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors")


# ---- families ------------------------------------------------------------------------------------


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
