"""Small inputs for any model: probe batches with every kind of padding, and how to run them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROBE_TOKENS = 24

Inputs = dict[str, Any]


def probe_batches(model: PreTrainedModel) -> dict[str, Inputs]:
    """Without padding, with right and with left padding."""
    if model.main_input_name == "pixel_values" and hasattr(model.config, "image_size"):
        return {"an image": image(model)}
    if model.main_input_name != "input_ids" or _vocabulary(model) is None:
        raise ValueError(
            f"verify: no probe batch for the main input {model.main_input_name!r} of "
            f"{type(model).__name__}; call accelerate(model, verify=False)"
        )
    size = length(model, PROBE_TOKENS)
    rows = 1 if _classifies_one_row(model) else 2
    ids = tokens(model, rows, size)
    padding = torch.ones_like(ids)
    padding[-1, size - size // 3 :] = 0
    found: dict[str, Inputs] = {"no padding": {"input_ids": ids}}
    for name, mask in (("right padding", padding), ("left padding", padding.flip(1))):
        pad = getattr(model.config, "pad_token_id", None) or 0
        found[name] = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        for inputs in found.values():
            inputs["decoder_input_ids"] = tokens(model, rows, max(size // 3, 1), seed=1)
    return found


def length(model: PreTrainedModel, wanted: int) -> int:
    """``wanted`` tokens, or what the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or wanted
    return max(min(wanted, limit - 2), 1)  # RoBERTa's positions start at 2


def _classifies_one_row(model: PreTrainedModel) -> bool:
    """Classifiers on a decoder refuse several rows unless they know the padding token."""
    return (
        getattr(model.config, "pad_token_id", None) is None
        and "Classification" in type(model).__name__
    )


def tokens(model: PreTrainedModel, rows: int, count: int, seed: int = 0) -> Tensor:
    """Random ids without the special ones, drawn from a generator of their own."""
    config = model.config
    special = {
        getattr(config, f"{name}_token_id", None)
        for name in ("pad", "bos", "eos", "decoder_start", "mask")
    }
    usable = torch.tensor(
        [i for i in range(min(_vocabulary(model) or 1, 50_000)) if i not in special]
    )
    draw = torch.Generator().manual_seed(seed)
    picked = usable[torch.randint(len(usable), (rows, count), generator=draw)]
    return picked.to(model.device)


def _vocabulary(model: PreTrainedModel) -> int | None:
    """The number of token ids; None where the model has no one table of token embeddings."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for several towers
        return None
    weight = getattr(embedding, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else None


def image(model: PreTrainedModel) -> Inputs:
    """Two images of noise."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, getattr(model.config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(model.device, model.dtype)}


def run(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    inputs = {
        k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    return _logits(model(**inputs))


def _logits(output: Any) -> Tensor:
    for name in ("logits", "start_logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    first = next(
        (v for v in output.to_tuple() if isinstance(v, Tensor) and v.is_floating_point()), None
    )
    if first is None:
        raise ValueError(
            "verify: the model returns no tensor to compare; call accelerate(model, verify=False)"
        )
    return first


def decodes(model: PreTrainedModel) -> bool:
    """Whether it is a decoder that generates from a cache."""
    takes_cache = "past_key_values" in inspect.signature(type(model).forward).parameters
    return takes_cache and bool(model.can_generate()) and not model.config.is_encoder_decoder


def decode(model: PreTrainedModel, inputs: Inputs, steps: int = 3) -> Tensor:
    """The logits of the last ``steps`` tokens, fed one by one after the rest, as by generate()."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = max(ids.shape[1] - steps, 1)
    output = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
    logits = []
    for i in range(start, ids.shape[1]):
        output = model(
            input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], use_cache=True,
            past_key_values=output.past_key_values,
        )  # fmt: skip
        logits.append(output.logits)
    return torch.cat(logits, 1)
