"""generate() and the in-place cache: stock's tokens, and stock's cache after every operation."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import (  # noqa: F401 (small_models is a fixture)
    ALL_MODELS,
    DECODERS,
    MORE_DECODERS,
    SEQ2SEQ,
    build,
    padded,
    small_models,
    tokens,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import pyfuse
from pyfuse.hf.cache import InPlaceLayer, InPlaceSlidingLayer, adopt

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "length_penalty": 0.7},
    "beam_sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
GENERATORS = [name for name in ALL_MODELS if name in {**DECODERS, **MORE_DECODERS, **SEQ2SEQ}]


def generate(
    model: hf.PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
    torch.manual_seed(7)
    ids: torch.Tensor = model.generate(**inputs, pad_token_id=0, max_new_tokens=20, **options)
    return ids


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
def test_same_tokens_as_stock(name: str, way: str, side: str) -> None:
    model = build(name)
    inputs = padded(tokens(3, 11), side)
    theirs = generate(model, inputs, **WAYS[way])
    with pyfuse.accelerate(model, linear=False, verify=False):
        ours = generate(model, inputs, **WAYS[way])
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > 12  # it did not stop at once


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "num_beams": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_same_tokens_with_other_caches(name: str, options: dict[str, Any]) -> None:
    model = build(name)
    rows = 1 if "prompt_lookup_num_tokens" in options else 3
    inputs = {"input_ids": tokens(1, 11)} if rows == 1 else padded(tokens(3, 11), "left")
    theirs = generate(model, inputs, do_sample=False, **options)
    with pyfuse.accelerate(model, linear=False, verify=False):
        ours = generate(model, inputs, do_sample=False, **options)
    assert torch.equal(ours, theirs)


def test_assisted_generation_crops_the_cache() -> None:
    model, assistant = build("llama"), build("llama", seed=0)
    with torch.no_grad():  # an assistant that is mostly right
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.02)
    inputs = {"input_ids": tokens(1, 11)}
    theirs = generate(model, inputs, do_sample=False, assistant_model=assistant)
    with (
        pyfuse.accelerate(model, linear=False, verify=False),
        pyfuse.accelerate(assistant, linear=False, verify=False),
    ):
        ours = generate(model, inputs, do_sample=False, assistant_model=assistant)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_writes_in_place(name: str) -> None:
    model = build(name)
    with pyfuse.accelerate(model, linear=False, verify=False):
        output = model.generate(
            tokens(2, 11),
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    layers = output.past_key_values.layers
    kind = InPlaceSlidingLayer if name == "mistral" else InPlaceLayer
    assert [type(layer) for layer in layers] == [kind, kind]
    assert all(layer._room is not None and layer._room.holds(layer) for layer in layers)


def test_a_cache_that_the_user_filled_before_is_adopted() -> None:
    model, ids = build("llama"), tokens(2, 14)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        reference = copy.deepcopy(cache)
        with pyfuse.accelerate(model, linear=False, verify=False):
            for i in range(9, 14):
                ours = model(ids[:, i : i + 1], past_key_values=cache).logits
        for i in range(9, 14):
            theirs = model(ids[:, i : i + 1], past_key_values=reference).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(cache.layers, reference.layers, strict=True):
        assert type(a) is InPlaceLayer and type(b) is DynamicLayer
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-5, atol=1e-5)


def test_a_copied_cache_grows_apart() -> None:
    model, ids = build("llama"), tokens(2, 14)
    with pyfuse.accelerate(model, linear=False, verify=False), torch.no_grad():
        prompt = model.generate(
            ids[:, :9],
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=0,
        ).past_key_values
        first, second = copy.deepcopy(prompt), copy.deepcopy(prompt)
        before = [layer.keys.clone() for layer in prompt.layers]
        a = model(ids[:, 9:10], past_key_values=first).logits
        b = model(ids[:, 10:11], past_key_values=second).logits
        again = model(ids[:, 9:10], past_key_values=prompt).logits
    assert torch.equal(a, again) and not torch.equal(a, b)
    for layer, keys in zip(prompt.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :-1], keys)


# The cache layers beside those of transformers, operation by operation.


def pair(sliding: bool) -> tuple[Any, Any]:
    if sliding:
        return InPlaceSlidingLayer(sliding_window=6), DynamicSlidingWindowLayer(sliding_window=6)
    return InPlaceLayer(), DynamicLayer()


@torch.no_grad()
@pytest.mark.parametrize("expected", [0, 40, 10_000])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("seed", range(8))
def test_random_operations(seed: int, sliding: bool, expected: int) -> None:
    draw = random.Random(seed)
    ours, theirs = pair(sliding)
    ours._expected_length = expected
    batch = 2
    for _ in range(60):
        names = ["update"] * 6 + ["reorder", "repeat", "select", "assign", "reset"]
        if not sliding and theirs.get_seq_length() > 4:
            names += ["crop"] * 3
        name = draw.choice(names)
        if name == "update":
            rows = draw.choice([1, 1, 1, 1, 2, 5, 9])
            k, v = torch.randn(batch, rows, 3, 8).transpose(1, 2), torch.randn(batch, 3, rows, 4)
            got, want = ours.update(k, v), theirs.update(k, v)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        elif name == "reset":
            if draw.random() < 0.2:
                ours.reset(), theirs.reset()
                batch = 2
        elif not theirs.is_initialized:
            continue
        elif name == "crop":
            count = draw.randint(1, 3)
            ours.crop(-count), theirs.crop(-count)
        elif name == "assign":  # what offloading does
            for layer in (ours, theirs):
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        elif name == "repeat":
            if batch < 6:
                ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
                batch *= 2
        else:
            index = torch.tensor(
                [draw.randrange(batch) for _ in range(batch if name == "reorder" else 2)]
            )
            method = "reorder_cache" if name == "reorder" else "batch_select_indices"
            getattr(ours, method)(index), getattr(theirs, method)(index)
            batch = len(index)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if theirs.is_initialized:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_appending_does_not_copy() -> None:
    layer, _ = pair(sliding=False)
    layer._expected_length = 64
    layer.update(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8))
    first = layer.keys.data_ptr()
    for _ in range(59):
        layer.update(torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8))
    assert layer.keys.data_ptr() == first and layer.keys.shape == (2, 3, 64, 8)


def test_with_gradients_it_is_the_stock_layer() -> None:
    ours, theirs = pair(sliding=False)
    k = torch.randn(1, 2, 3, 4, requires_grad=True)
    for layer in (ours, theirs):
        layer.update(k, k), layer.update(k, k)
        keys, _ = layer.update(k, k)
        keys.pow(2).sum().backward()
    assert ours._room is None
    torch.testing.assert_close(k.grad, 12 * k.detach())


def test_inference_mode_and_back() -> None:
    layer, stock = pair(sliding=False)
    chunk = torch.randn(1, 2, 3, 4)
    with torch.inference_mode():
        layer.update(chunk, chunk), layer.update(chunk, chunk)
    with torch.no_grad():
        keys, _ = layer.update(chunk, chunk)
        for _ in range(3):
            expected, _ = stock.update(chunk, chunk)
    assert torch.equal(keys, expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_shapes_that_torch_cat_refuses_are_refused(rows: int) -> None:
    layer, _ = pair(sliding=False)
    for _ in range(2):
        layer.update(torch.randn(2, 3, rows, 8), torch.randn(2, 3, rows, 8))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(torch.randn(1, 3, rows, 8), torch.randn(1, 3, rows, 8))


def test_only_plain_dynamic_caches_are_adopted() -> None:
    config = hf.LlamaConfig(num_hidden_layers=2)
    static = hf.StaticCache(config, max_cache_len=8)
    adopt(static)
    assert not any(isinstance(layer, InPlaceLayer) for layer in static.layers)
    lazy = DynamicCache()
    adopt(lazy)
    lazy.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    assert type(lazy.layers[0]) is InPlaceLayer
