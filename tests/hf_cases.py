"""Small random models of each family, and the truth to hold them to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from pyfuse.hf.exact import EXACT

VOCAB, LENGTH = 97, 40
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 48}


def _t5(**more: Any) -> hf.PreTrainedModel:
    config = hf.T5Config(
        **_SEQ2SEQ, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0, **more
    )
    return hf.T5ForConditionalGeneration(config)


def _bart() -> hf.PreTrainedModel:
    sides = ("encoder", "decoder")
    sizes = {
        f"{side}_{name}": n
        for side in sides
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))
    }
    config = hf.BartConfig(
        **_SEQ2SEQ, **sizes, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def _gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _distilbert() -> hf.PreTrainedModel:
    config = hf.DistilBertConfig(
        vocab_size=VOCAB, dim=48, n_layers=2, n_heads=4, hidden_dim=80, max_position_embeddings=64
    )
    return hf.DistilBertModel(config)


DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, sliding_window=7)),
    "gpt2": _gpt2,
}
MORE_DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_DECODER, head_dim=16, sliding_window=7)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_DECODER,
            head_dim=16,
            sliding_window=8,
            num_local_experts=2,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
}
ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_SIZES)),
    "distilbert": _distilbert,
}
MORE_ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_SIZES)),
    "xlm_roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_SIZES)),
    "camembert": lambda: hf.CamembertModel(hf.CamembertConfig(**_SIZES)),
    "data2vec": lambda: hf.Data2VecTextModel(hf.Data2VecTextConfig(**_SIZES)),
    "prelayernorm": lambda: hf.RobertaPreLayerNormModel(hf.RobertaPreLayerNormConfig(**_SIZES)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**_SIZES, embedding_size=32)),
    "ernie": lambda: hf.ErnieModel(hf.ErnieConfig(**_SIZES, use_task_id=True)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **_SIZES,
            global_attn_every_n_layers=2,
            local_attention=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
}
SEQ2SEQ: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "t5": _t5,
    "t5_gated": lambda: _t5(feed_forward_proj="gated-gelu"),
    "bart": _bart,
}
MODELS = {**DECODERS, **ENCODERS, **SEQ2SEQ}
ALL_MODELS = {**MODELS, **MORE_DECODERS, **MORE_ENCODERS}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For test files that import it: one thread, and kernels also where they are not worth it."""
    monkeypatch.setattr("pyfuse.hf.norms.SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> hf.PreTrainedModel:
    """The model in eval mode, with weights large enough that masks, norms and positions matter."""
    torch.manual_seed(seed)
    model = ALL_MODELS[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:  # T5 does not scale its scores: its q does
                parameter.normal_(std=0.07 if path.endswith(".q.weight") else 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().to(dtype)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, side: str) -> dict[str, Tensor]:
    """``ids`` with two thirds of the second row, and two tokens of the third, turned to padding."""
    mask = torch.ones_like(ids)
    if side == "none":
        return {"input_ids": ids}
    mask[1, : ids.shape[1] * 2 // 3] = 0
    mask[2, :2] = 0
    if side == "right":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 3:5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_for(model: hf.PreTrainedModel, side: str, length: int = LENGTH) -> dict[str, Tensor]:
    inputs = padded(tokens(3, length), side)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(3, 9, seed=2)
    return inputs


@torch.no_grad()
def logits(model: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the model gives at the tokens that are no padding."""
    output = model(**inputs)
    values: Tensor = output.logits if "logits" in output else output.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or model.config.is_encoder_decoder:
        return values
    return values[mask.bool()]


def exact(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """A float64 copy of a stock model, with sdpa: many an eager attention rounds to float32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._experts_implementation_internal = (
                "eager"  # the grouped products have no float64
            )
            if config._attn_implementation == "eager":
                config._attn_implementation_internal = EXACT
    return model
