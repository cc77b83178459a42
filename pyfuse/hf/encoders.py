"""Which models unpad, and why the others do not: the tables, and the patch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from pyfuse.hf.attention import NAMES
from pyfuse.hf.fingerprint import fingerprint
from pyfuse.hf.receipt import Tally
from pyfuse.hf.slots import UnpadSlot
from pyfuse.hf.state import bind, state_of
from pyfuse.hf.unpad import modernbert, packing_encoder, planning, replaced_by_others

UNPADDING = "unpadding"
NOTES = [
    "unpadding: the encoder leaves out padding where that is a tenth of a batch or more",
    "  last_hidden_state is zero there, not stock's values; unpad=False keeps them",
]


class Family(NamedTuple):
    """A model's forward, and the child that is its encoder; None: it runs its layers itself."""

    forward: Callable[[Any], Callable[..., Any]]
    encoder: str | None


# Fingerprint of a model's forward, its decorators included. They hand what they do not know of to
# the encoder, which hands it on to its layers only.
MODELS = {
    "9ad598e21c7f4ae1": Family(planning, "encoder"),  # BertModel, RobertaModel, XLMRobertaModel
    "5ef3f97ef9120ef7": Family(planning, "encoder"),  # ElectraModel
    "6cda880bade672a9": Family(planning, "encoder"),  # ErnieModel
    "be41b0485b301790": Family(planning, "transformer"),  # DistilBertModel
    "f7837a64f0d1c687": Family(modernbert, None),  # ModernBertModel
}
# Fingerprints of forwards in which tokens meet in the attention function and nowhere else.
TOKEN_BY_TOKEN = frozenset(
    [
        "be88b720e89a8840",  # BertEncoder
        "61246ff739eb4154",  # BertLayer
        "ed4d74f22062c7ab",  # BertAttention
        "97c043994f702d04",  # BertSelfAttention
        "354ffc440c3edfc0",  # BertSelfOutput, BertOutput
        "6002bcd3b4e123a0",  # BertIntermediate
        "2ea7945464660ddb",  # DistilBERT's Transformer
        "57d1b308c344a234",  # its TransformerBlock
        "44f134cddcc089c6",  # DistilBertSelfAttention
        "cab61095fb56ce9a",  # its FFN
        "430b159b519f4ae8",  # ModernBertEmbeddings
        "546add35f57a70b3",  # ModernBertRotaryEmbedding
        "de28c76b4d970ed5",  # ModernBertEncoderLayer
        "cf90585e535cd173",  # ModernBertAttention
        "f7db3635c2dcaba2",  # ModernBertMLP
    ]
)
# Methods that those forwards call.
CHUNKS = {
    "feed_forward_chunk": "b15aae69d2963fa5",  # BertLayer
    "ff_chunk": "1541e15a1e6891f6",  # FFN
}
POINTWISE = (
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.Mish,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.Hardswish,
)
PLAIN = (nn.Linear, nn.Dropout, nn.Identity, nn.Embedding, nn.ModuleList)
PAIRS = ("relative_attention_bias", "rel_embeddings")  # T5, MPNet; DeBERTa
# Heads of transformers that read the first position of a row, which is always computed, or every
# position by itself. The others compare positions (question answering), or take a loss over all.
HEADS = (
    "ForSequenceClassification",
    "ForNextSentencePrediction",
    "ForMultipleChoice",
    "ForTokenClassification",
)


def patch_encoders(
    model: nn.Module, tally: Tally, blocked: str | None, unpad: Literal["auto"] | bool
) -> list[str]:
    """Have the encoders in ``model`` unpad; what the receipt has to say on it.

    blocked: why no kernel of pyfuse attends to packed rows here. ValueError: unpad is True, but no
    encoder can.
    """
    if unpad is False:
        tally.add(UNPADDING, "unpad=False")
        return []
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    found = [(m, MODELS[key]) for m in models if (key := _print(type(m))) in MODELS]
    reasons = [] if found else [_why_none(model)]
    for encoder, family in found:
        reason = blocked or _why_not(encoder, family)
        if reason is None and unpad == "auto":
            reason = _why_not_by_itself(model, encoder)
        if reason is None:
            _patch(encoder, family)
            tally.add(UNPADDING, None)
        else:
            reasons.append(reason)
    for reason in reasons:
        tally.add(UNPADDING, reason)
    if tally.patched[UNPADDING]:
        return NOTES
    if unpad is True:
        raise ValueError(f"unpad: True, but {type(model).__name__} cannot: {'; '.join(reasons)}")
    return []


def _print(cls: Any, method: str = "forward") -> str:
    return fingerprint(getattr(cls, method), decorated=True) or ""


def _patch(model: nn.Module, family: Family) -> None:
    parts = _parts(model, family)
    inside = {type(m) for name in parts for m in model._modules[name].modules()}  # type: ignore[union-attr]
    state_of(model).unpad = UnpadSlot(parts, frozenset(inside))
    bind(model, "forward", family.forward(type(model)))
    if family.encoder is not None:
        encoder: Any = model._modules[family.encoder]
        cls: Any = type(encoder)
        bind(encoder, "forward", packing_encoder(cls))


def _parts(model: nn.Module, family: Family) -> tuple[str, ...]:
    if family.encoder is not None:
        return (family.encoder,)
    return tuple(name for name, part in model._modules.items() if part is not None)


def _why_not(model: Any, family: Family) -> str | None:
    config = model.config
    if getattr(config, "is_decoder", False):
        return "it is a decoder"
    if not isinstance(config.pad_token_id, int):
        return "its config has no pad_token_id to know padding by"
    if config._attn_implementation not in NAMES:
        return "its attention is not pyfuse's"
    if model.device.type != "cpu":
        return f"it is on {model.device}, which would have to be waited for to see the padding"
    if family.encoder is None and _by_length(config):
        return "its rotary frequencies depend on the length of the batch"
    parts = [model._modules[name] for name in _parts(model, family)]
    for module in (model, *(m for part in parts for m in part.modules())):
        if replaced_by_others(module):
            return f"the forward of its {type(module).__name__} is replaced already"
        if module is not model and not _token_by_token(module):
            return f"its {type(module).__name__} is not known to treat each token by itself"
    return None


def _by_length(config: Any) -> bool:
    kinds = {parameters["rope_type"] for parameters in config.rope_parameters.values()}
    return bool(kinds & {"dynamic", "longrope"})


def _token_by_token(module: Any) -> bool:
    cls = type(module)
    if cls in PLAIN or (cls is nn.LayerNorm and len(module.normalized_shape) == 1):
        return True
    if _print(cls) in TOKEN_BY_TOKEN:
        return all(_print(cls, n) == key for n, key in CHUNKS.items() if hasattr(cls, n))
    return cls in POINTWISE or cls.__module__ == "transformers.activations"


def _why_not_by_itself(model: nn.Module, encoder: nn.Module) -> str | None:
    """Why unpad="auto" leaves this encoder alone: something may read its states at the padding."""
    if model is encoder:
        return None
    cls = type(model)
    known = cls.__module__.startswith("transformers.models.") and cls.__name__.endswith(HEADS)
    if (
        known and "sequence_summary" not in model._modules
    ):  # Electra's may take the mean or the last
        return None
    return f"{cls.__name__} may read its states at the padding; unpad=True if that does not matter"


def _why_none(model: Any) -> str:
    if model.main_input_name != "input_ids":
        return f"it takes {model.main_input_name}, not padded token ids"
    if model.config.is_encoder_decoder:
        return "only encoders alone are unpadded, not the half of an encoder-decoder"
    if any(getattr(module, "is_causal", False) for module in model.modules()):
        return "it is a decoder"
    if any(name.endswith(PAIRS) for name, _module in model.named_modules()):
        return "its attention adds a bias that belongs to two positions of the padded batch"
    return f"{type(model).__name__} is none of the encoders that are known to allow it"
