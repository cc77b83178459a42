"""A `Transformer` in the files that Hugging Face's libraries, and `pyfuse.models.checkpoint`, read.

    save_pretrained(model, "folder", end=2)            # config.json and model.safetensors

A decoder is written as GPT-2, Llama or Mistral, an encoder as BERT, an encoder-decoder as BART, or as Marian, which is
the first paper's. Which one it is, is not guessed from single fields: a form fits if reading it gives the model back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfuse import ops
from pyfuse.models.families import FAMILIES, config_fields, of_head
from pyfuse.models.transformer import Attention, Config, Transformer

_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def save_pretrained(
    model: Transformer, folder: str | Path, *, end: int | None = None, begin: int | None = None, pad: int | None = None
) -> None:  # fmt: skip
    """Write config.json and model.safetensors into a folder, which is made. Arguments and errors: see `hf_config`."""
    from safetensors.torch import save_file

    config = hf_config(model.config, end, begin=begin, pad=pad)
    tensors = hf_tensors(model, config["model_type"])
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def hf_config(
    config: Config, end: int | None = None, *, begin: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """config.json.

    end: the id of the token after a document or sequence. begin: of the one before it, with which a decoder of an
    encoder begins; by default the same. pad: of what fills a batch up.
    Rates of dropout that the form lacks are left out. An encoder-decoder's sinusoidal positions are written as a table,
    which is then read as a learned one; with `from_pretrained(folder, position="sinusoidal")` it is not.

    ValueError: no form is made like that.
    """
    common = {
        "vocab_size": config.vocabulary,
        "bos_token_id": end if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": pad,
        "tie_word_embeddings": config.tied or config.head is None,
        "dtype": "float32",
    }
    if config.encoder_layers:
        common |= {"is_encoder_decoder": True, "decoder_start_token_id": common["bos_token_id"]}
    for kind, write in _FORMS.items():
        classes = {head: name for name, head in FAMILIES[kind].heads.items()}
        if config.head in classes:
            theirs = {"model_type": kind, "architectures": [classes[config.head]]}
            theirs |= common | write(config)
            if _normal(Config(**config_fields(theirs))) == _normal(config):
                return theirs
    raise ValueError(f"config: none of {', '.join(_FORMS)} is made like {config}")


def _normal(c: Config) -> Config:
    """The same model in training without dropout, in one of several ways to say so."""
    scaling = c.rope_scaling
    if scaling is not None and scaling.get("rope_type") == "default":
        scaling = None
    return replace(
        c, head_dim=c.d, kv_heads=c.kv_heads or c.heads, rope_scaling=scaling,
        position="learned" if c.encoder_layers and c.position == "sinusoidal" else c.position,
        tied=c.tied or c.head not in ("lm", "mlm"), head_bias=c.head_bias and c.head == "lm",
        dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip


def _gpt2(c: Config) -> dict[str, Any]:
    return {
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
    return {
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
        "rope_parameters": c.rope_scaling or {"rope_type": "default", "rope_theta": c.rope_theta},
    }


def _mistral(c: Config) -> dict[str, Any]:
    return _llama(c) | {"sliding_window": c.window}


def _bert(c: Config) -> dict[str, Any]:
    names = c.labels or tuple(f"LABEL_{i}" for i in range(c.classes))
    classes = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return {
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_positions,
        "type_vocab_size": c.segments,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": _NAMES[c.activation],
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
    } | (classes if names else {})


def _bart(c: Config) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("attention_heads", c.heads), ("ffn_dim", c.hidden))
    }
    return sides | {
        "d_model": c.width,
        "encoder_layers": c.encoder_layers,
        "decoder_layers": c.layers,
        "max_position_embeddings": c.max_positions,
        "activation_function": _NAMES[c.activation],
        "scale_embedding": c.embedding_scale != 1.0,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "activation_dropout": c.hidden_dropout,
        "forced_eos_token_id": None,
    }


_FORMS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "bert": _bert, "bart": _bart, "marian": _bart,
}  # fmt: skip


def hf_tensors(model: Transformer, kind: str) -> dict[str, Tensor]:
    """The weights under their names: the inverse of `from_pretrained`, bit by bit. kind: hf_config's model_type."""
    family, found = FAMILIES[kind], {}
    # In a model without a head the names have no prefix; BERT's pooler is no part of the head.
    prefix = "" if model.config.head is None else family.prefix
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if not layer:
            (their_name,) = family.outer[name]
            found[their_name] = tensor[None] if their_name == "final_logits_bias" else tensor
            continue
        theirs = family.names(layer)
        if layer.endswith("embedding.position"):  # the rows before the first one are never read
            tensor = torch.nn.functional.pad(tensor, (0, 0, family.first_position, 0))
        sizes = _sizes(model, layer, len(theirs), tensor)
        before = "" if of_head(layer) and layer != "pooler" else prefix
        for their_name, piece in zip(theirs, tensor.split(sizes), strict=True):
            turned = (
                family.transposed and tensor.dim() == 2 and ".blocks." in layer
            )  # GPT-2's Conv1D
            found[f"{before}{their_name}.{part}"] = piece.t() if turned else piece
    if model.matrix is not None:
        found |= {copy: found[name] for copy, name in family.copies.items()}
    if model.config.position == "sinusoidal":
        found |= _sinusoids(model, kind)
    if kind == "bert" and model.config.head is None:
        found |= _new_pooler(model)
    dense = torch.contiguous_format
    return {name: t.detach().cpu().clone(memory_format=dense) for name, t in found.items()}


def _sizes(model: Transformer, layer: str, pieces: int, tensor: Tensor) -> list[int]:
    """Rows of the layers that ours is made of."""
    if pieces == 3:
        attention = model.get_submodule(layer.rpartition(".")[0])
        assert isinstance(attention, Attention)
        return attention.sizes
    return [len(tensor) // pieces] * pieces


def _sinusoids(model: Transformer, kind: str) -> dict[str, Tensor]:
    """The table that there is no parameter for. Marian's own has all sines before all cosines; it reads any."""
    c, family = model.config, FAMILIES[kind]
    table = ops.sinusoidal_encoding(c.max_positions, c.width, dtype=next(model.parameters()).dtype)
    table = torch.nn.functional.pad(table, (0, 0, family.first_position, 0))
    prefix = "" if c.head is None else family.prefix
    return {
        f"{prefix}{family.outer[f'{side}.embedding.position'][0]}.weight": table
        for side in family.stacks
    }


def _new_pooler(model: Transformer) -> dict[str, Tensor]:
    """BertModel's layer for classes, which ours has in that head only: one that is still to be trained."""
    w, like = model.config.width, next(model.parameters())
    drawn = torch.randn(w, w, generator=torch.Generator().manual_seed(0)) * 0.02
    return {"pooler.dense.weight": drawn.to(like.dtype), "pooler.dense.bias": like.new_zeros(w)}
