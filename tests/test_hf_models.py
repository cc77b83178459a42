"""Every family against Hugging Face, with each kind of padding: the accuracy rule on logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import (  # noqa: F401 (small_models is a fixture)
    ALL_MODELS,
    DECODERS,
    MODELS,
    build,
    exact,
    inputs_for,
    logits,
    small_models,
    tokens,
)
from numerics import check

import pyfuse
from pyfuse.linear import Choice

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """linear="auto" takes the fast ways for every shape, whatever a calibration would say."""
    choice = Choice(("rows",) * 4 + ("packed",) * 4, {})
    monkeypatch.setattr("pyfuse.linear.calibrate", lambda *_: choice)


@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_logits(name: str, dtype: str, side: str) -> None:
    model = build(name, DTYPES[dtype])
    inputs = inputs_for(model, side)
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    with pyfuse.accelerate(model, linear=False, verify=False) as receipt:
        assert receipt.patched["attention"] > 0 and "attention" not in receipt.skipped
        ours = logits(model, inputs)
    check(ours, truth, stock, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2", "bert", "distilbert", "bart"])
def test_logits_where_torch_normalises_as_fast(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfuse.hf.norms.SMALL", 1 << 40)
    monkeypatch.setattr("pyfuse.hf.norms.layer_norm", None)
    model = build(name, DTYPES[dtype])
    inputs = inputs_for(model, "left")
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    with pyfuse.accelerate(model, linear=False, verify=False):
        check(logits(model, inputs), truth, stock, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_with_packed_linear_layers(name: str, dtype: str, packed: None) -> None:
    model = build(name, DTYPES[dtype])
    inputs = inputs_for(model, "right")
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    receipt = pyfuse.accelerate(model, verify=False)
    assert receipt.patched["Linear"] > 0 and "Linear" not in receipt.skipped
    if name != "bart":  # its feed-forward block is part of the layer
        assert receipt.patched["feed-forward"] > 0 and "feed-forward" not in receipt.skipped
    assert receipt.memory_bytes > 0
    check(logits(model, inputs), truth, stock, name)


@pytest.mark.parametrize("name", DECODERS)
def test_fused_layers_are_in_force(
    name: str, packed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock bodies of the fused methods do not run in inference, and do in training."""
    model = build(name)
    receipt = pyfuse.accelerate(model, verify=False)
    assert receipt.patched["residual + norm"] == 2
    layer = model.get_decoder().layers[0] if name != "gpt2" else model.transformer.h[0]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the stock forward ran")

    for module in layer.modules():
        if "forward" in module.__dict__:
            monkeypatch.setattr(type(module), "forward", refuse)
    with torch.no_grad():
        model(tokens(2, 9))
    with pytest.raises(AssertionError, match="the stock forward ran"):
        model(tokens(2, 9))


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("name", DECODERS)
def test_user_mask_of_four_dimensions(name: str, kind: str) -> None:
    """It is taken as it is: here a window of 5 beside the first token."""
    model = build(name)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    allowed = ((j <= i) & ((i - j < 5) | (j == 0))).expand(3, 1, 12, 12)
    added = torch.zeros(3, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = allowed if kind == "bool" else added
    inputs = {"input_ids": tokens(3, 12), "attention_mask": mask}
    truth, stock = (
        logits(exact(model), {**inputs, "attention_mask": added.double()}),
        logits(model, inputs),
    )
    without = logits(model, {"input_ids": inputs["input_ids"]})
    with pyfuse.accelerate(model, linear=False, verify=False):
        ours = logits(model, inputs)
    check(ours, truth, stock, name)
    assert (ours - without).abs().max() > 0.1  # the mask does something


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_packed_positions_keep_sequences_apart(name: str) -> None:
    model = build(name)
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(11), torch.arange(9)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    with pyfuse.accelerate(model, linear=False, verify=False):
        ours = logits(model, inputs)
        alone = logits(model, {"input_ids": ids[:, 11:], "use_cache": False})
    check(ours, truth, stock, name)
    torch.testing.assert_close(ours[:, 11:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*DECODERS, "gemma2"])
def test_chunked_prefill(name: str) -> None:
    """Several tokens onto a cache that is not empty, with left padding."""
    model = build(name)
    inputs = inputs_for(model, "left", 24)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    with pyfuse.accelerate(model, linear=False, verify=False), torch.no_grad():
        past, parts = None, []
        for start, end in ((0, 9), (9, 17), (17, 18), (18, 24)):
            output = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            parts.append(output.logits)
    check(torch.cat(parts, 1)[mask.bool()], truth, stock, name)


def test_a_mask_for_other_keys_is_refused() -> None:
    model = build("llama")
    with pyfuse.accelerate(model, linear=False, verify=False), torch.no_grad():
        seen = []
        attention = model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
        model(**inputs_for(model, "left"))
        arguments = {**seen[0], "hidden_states": seen[0]["hidden_states"][:, 1:]}
        arguments["position_embeddings"] = tuple(t[:, 1:] for t in arguments["position_embeddings"])
        with pytest.raises(ValueError, match="attention_mask: made for 40 keys, but key has 39"):
            attention(**{**arguments, "past_key_values": None})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart"])
def test_attention_weights_come_from_the_eager_path(name: str) -> None:
    model = build(name)
    inputs = inputs_for(model, "left", 11)
    reference = build(name)
    reference.set_attn_implementation("eager")
    field = "encoder_attentions" if model.config.is_encoder_decoder else "attentions"
    with pyfuse.accelerate(model, linear=False, verify=False), torch.no_grad():
        ours = model(**inputs, output_attentions=True)[field]
        theirs = reference(**inputs, output_attentions=True)[field]
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_recorded() -> None:
    model = build("llama")
    inputs = inputs_for(model, "right")
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True).hidden_states
        with pyfuse.accelerate(model, linear=False, verify=False):
            ours = model(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_static_cache_prefill_and_decoding(name: str, side: str) -> None:
    model = build(name)
    inputs = inputs_for(model, side, 15)
    ids, mask = (
        inputs["input_ids"],
        inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])),
    )
    truth, stock = logits(exact(model), inputs), logits(model, inputs)
    with pyfuse.accelerate(model, linear=False, verify=False), torch.no_grad():
        cache = hf.StaticCache(model.config, max_cache_len=32)
        parts = []
        for start, end in ((0, 12), (12, 13), (13, 14), (14, 15)):
            attention_mask = None if side == "none" else mask[:, :end]
            output = model(ids[:, start:end], attention_mask=attention_mask, past_key_values=cache)
            parts.append(output.logits)
    ours = torch.cat(parts, 1)
    check(ours if side == "none" else ours[mask.bool()], truth, stock, name)
