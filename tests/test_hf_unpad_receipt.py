"""What the receipt says of unpadding, what verification refuses, and which models are left padded and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import VOCAB, build, small_models  # noqa: F401 (small_models is a fixture)
from torch import Tensor, nn
from unpad_cases import (  # noqa: F401 (unpads is a fixture)
    NAMES,
    Double,
    accelerate,
    batch,
    packed_rows,
    unpads,
    with_head,
)

import pyfuse
from pyfuse.hf import AccuracyError, entry
from pyfuse.hf import attention as hf_attention
from pyfuse.hf.encoders import CHUNKS, MODELS, TOKEN_BY_TOKEN
from pyfuse.hf.fingerprint import fingerprint


def test_the_receipt_says_so() -> None:
    receipt = pyfuse.accelerate(build("bert"), linear=False)
    text = str(receipt)
    for part in (
        "unpadding              1",
        "unpadding: the encoder leaves out padding where that is a tenth of a batch or more",
        "last_hidden_state is zero there, not stock's values; unpad=False keeps them",
        "speed, forward 4 x 62, 40 % padding: ",
    ):
        assert part in text
    assert {"right padding", "left padding"} <= set(receipt.errors)


@pytest.mark.parametrize("name", [*NAMES, "bert with a head"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["f32", "bf16"])
def test_verification(
    name: str,
    dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyfuse.hf.verify.TIMED_SECONDS", 0.0)
    model = build(name) if name in NAMES else with_head(hf.BertForSequenceClassification, "bert")
    receipt = pyfuse.accelerate(model, linear=False, dtype=dtype, unpad=True)
    assert all(error <= budget for error, budget in receipt.errors.values()) and packed_rows


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as sequences that are not kept apart."""

    def mixed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> Any:
        ends = torch.tensor([0, len(q)])
        return pyfuse.varlen_attention(q, k, v, ends, torch.tensor([0, len(k)]), **options)

    monkeypatch.setattr(hf_attention, "varlen_attention", mixed)
    with pytest.raises(AccuracyError, match="with right padding"):
        pyfuse.accelerate(build("bert"), linear=False)


def _vit() -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
    return hf.ViTModel(hf.ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8))


def _mpnet() -> Any:
    return hf.MPNetModel(
        hf.MPNetConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def _bert(**more: Any) -> Any:
    config = build("bert").config.to_dict()
    return hf.BertModel(hf.BertConfig(**{**config, **more}))


def _tampered() -> Any:
    model = build("bert")
    model.encoder.layer[0].output.dense = Double(model.encoder.layer[0].output.dense)
    return model


def _replaced() -> Any:
    model = build("bert")
    dense = model.encoder.layer[0].output.dense
    dense.forward = lambda x: nn.Linear.forward(dense, x)
    return model


def _modernbert_by_length() -> Any:
    config = build("modernbert").config
    config.rope_parameters["full_attention"].update(rope_type="dynamic", factor=2.0)
    return hf.ModernBertModel(config)


REASONS = {
    "llama": (lambda: build("llama"), "it is a decoder"),
    "gpt2": (lambda: build("gpt2"), "it is a decoder"),
    "bert decoder": (lambda: _bert(is_decoder=True), "it is a decoder"),
    "t5": (lambda: build("t5"), "only encoders alone are unpadded"),
    "bart": (lambda: build("bart"), "only encoders alone are unpadded"),
    "t5 encoder": (
        lambda: hf.T5EncoderModel(build("t5").config),
        "its attention adds a bias that belongs to two positions",
    ),
    "mpnet": (_mpnet, "its attention adds a bias that belongs to two positions"),
    "an encoder with a norm after it": (
        lambda: build("prelayernorm"),
        "RobertaPreLayerNormModel is none of the encoders that are known to allow it",
    ),
    "vit": (_vit, "it takes pixel_values, not padded token ids"),
    "no padding token": (lambda: _bert(pad_token_id=None), "its config has no pad_token_id"),
    "another module": (_tampered, "its Double is not known to treat each token by itself"),
    "a replaced forward": (_replaced, "the forward of its Linear is replaced already"),
    "dynamic rope": (_modernbert_by_length, "its rotary frequencies depend on the length"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_not(case: str) -> None:
    make, why = REASONS[case]
    receipt = accelerate(make())
    (reason,) = receipt.skipped["unpadding"]
    assert reason.startswith(why) and reason in str(receipt)
    assert "unpadding" not in receipt.patched and "leaves out padding" not in str(receipt)
    model = make()
    with pytest.raises(ValueError, match=r"unpad: True, but .* cannot: ") as error:
        accelerate(model, unpad=True)
    assert reason in str(error.value)
    assert not any("_pyfuse" in module.__dict__ for module in model.modules())


def test_without_a_kernel_nothing_is_unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula computes every row with every key: that would be slower, not faster."""
    monkeypatch.setattr(entry, "_objections", lambda _: {"packed attention": "cpu: not built"})
    assert accelerate(build("bert")).skipped["unpadding"] == {"cpu: not built": 1}
    with pytest.raises(ValueError, match="unpad: True, but BertModel cannot: cpu: not built"):
        accelerate(build("bert"), unpad=True)


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ValueError, match="unpad: got 'yes', needs 'auto', True or False"):
        accelerate(build("bert"), unpad="yes")


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_fit_the_installed_transformers(name: str) -> None:
    """A failure after an update: read the new method, and whether it still allows unpadding."""
    model = build(name)
    family = MODELS[fingerprint(type(model).forward, decorated=True) or ""]
    inside = model if family.encoder is None else model.get_submodule(family.encoder)
    for module in inside.modules():
        cls = type(module)
        if cls.__module__.startswith("transformers.models.") and module is not model:
            assert fingerprint(cls.forward, decorated=True) in TOKEN_BY_TOKEN, cls
            for method in CHUNKS:
                if hasattr(cls, method):
                    assert fingerprint(getattr(cls, method)) == CHUNKS[method]
