"""What the options do to logits, beside Hugging Face's own list of processors; presence and frequency penalties beside
their formula."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from pyfuse.generation import Options
from pyfuse.generation.processors import Pipeline

V = 131
STOPS = (7, 11)
NAMES = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
}

Rows = list[list[int]]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    return GPT2LMHeadModel(config)


def hugging_face(
    model: GPT2LMHeadModel, knobs: dict[str, Any], prompt: int, tokens: list[int], logits: Tensor
) -> Tensor:
    """Its processed logits [V] of one row."""
    options = Options(**knobs)
    given = {theirs: knobs[ours] for ours, theirs in NAMES.items() if ours in knobs}
    if "temperature" in given:
        given["temperature"] = float(given["temperature"])
    if "logit_bias" in knobs:
        given["sequence_bias"] = [[[i], b] for i, b in options.logit_bias.items()]
    if "bad_words" in knobs:
        given["bad_words_ids"] = [list(word) for word in options.bad_words]
    if "suppress_tokens" in knobs:
        given["suppress_tokens"] = list(options.suppress_tokens)
    if 0 in options.forced_tokens:
        given["forced_bos_token_id"] = options.forced_tokens[0]
    if -1 in options.forced_tokens:
        given["forced_eos_token_id"] = options.forced_tokens[-1]
    config = GenerationConfig(
        do_sample=options.samples, max_length=prompt + options.max_new_tokens, **given
    )
    config._eos_token_tensor = torch.tensor(STOPS)
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")
    result: Tensor = processors(torch.tensor([tokens]), logits[None].clone())[0]
    return result


def check(
    model: GPT2LMHeadModel, knobs: dict[str, Any], prompts: list[int], rows: Rows, logits: Tensor
) -> Tensor:
    before = logits.clone()
    ours = Pipeline(Options(**knobs), STOPS, prompts)(rows, logits)
    assert torch.equal(logits, before), "the logits given were written to"
    assert ours.dtype == torch.float32 and ours.shape == logits.shape
    theirs = torch.stack([
        hugging_face(model, knobs, *row) for row in zip(prompts, rows, logits, strict=True)
    ])  # fmt: skip
    assert torch.equal(ours == -math.inf, theirs == -math.inf)
    assert (ours.softmax(1) - theirs.softmax(1)).abs().max() <= 1e-6
    return ours


def some_rows(seed: int, lengths: tuple[int, ...] = (1, 3, 17, 40, 65), few: int = 9) -> Rows:
    """Of few different tokens, so that all of them repeat."""
    chance = random.Random(seed)
    return [[chance.randrange(few) for _ in range(length)] for length in lengths]


KNOBS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "temperature-1": {"temperature": 1},
    "hot": {"temperature": 3.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k-1": {"temperature": 1.0, "top_k": 1},
    "top_k-all": {"temperature": 1.0, "top_k": 500},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p-tiny": {"temperature": 1.0, "top_p": 1e-6},
    "top_p-all": {"temperature": 1.0, "top_p": 1.0},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "min_p-0": {"temperature": 1.0, "min_p": 0.0},
    "min_p-1": {"temperature": 1.0, "min_p": 1.0},
    "typical_p": {"temperature": 1.0, "typical_p": 0.7},
    "typical_p-tiny": {"temperature": 1.0, "typical_p": 0.01},
    "typical_p-most": {"temperature": 1.0, "typical_p": 0.999},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_penalty-less": {"repetition_penalty": 0.7},
    "no_repeat_ngram-1": {"no_repeat_ngram": 1},
    "no_repeat_ngram-2": {"no_repeat_ngram": 2},
    "no_repeat_ngram-4": {"no_repeat_ngram": 4},
    "bad_words": {"bad_words": [[3], [1, 2], [4, 5, 6], [8, 8], [7], [11, 3], [7, 11]]},
    "logit_bias": {"logit_bias": {3: 2.5, 100: -math.inf, 11: -1.25, 5: 0.0}},
    "suppress_tokens": {"suppress_tokens": [0, 3, 7, 130]},
    "forced_first": {"forced_tokens": {0: 12}},
    "forced_last": {"forced_tokens": {-1: 7}, "max_new_tokens": 3},
    "min_new_tokens": {"min_new_tokens": 20},
    "all-warpers": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    "all-penalties": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram": 3,
        "bad_words": [[3], [1, 2]],
        "logit_bias": {3: 1.0, 4: 4.0},
        "suppress_tokens": [9, 20],
        "min_new_tokens": 3,
        "forced_tokens": {0: 7, -1: 11},
        "max_new_tokens": 3,
    },
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=list(KNOBS))
def test_each_knob(model: GPT2LMHeadModel, knobs: dict[str, Any]) -> None:
    """The rows have 0, 2, 2, 15 and 1 new tokens: Hugging Face forces a first token only after a prompt of one."""
    logits = torch.randn((5, V), generator=torch.Generator().manual_seed(1)) * 3
    check(model, knobs, [1, 1, 15, 25, 64], some_rows(2), logits)


@pytest.mark.parametrize("seed", range(60))
def test_combinations(model: GPT2LMHeadModel, seed: int) -> None:
    chance = random.Random(seed)

    def maybe(values: list[Any]) -> list[Any]:
        return [chance.choice(values)] if chance.random() < 0.5 else []

    pool = {
        "top_k": [1, 3, 20, 100],
        "top_p": [0.3, 0.7, 0.95],
        "min_p": [0.01, 0.1, 0.5],
        "typical_p": [0.2, 0.6, 0.95],
        "repetition_penalty": [0.8, 1.1, 2.0],
        "no_repeat_ngram": [1, 2, 3],
        "bad_words": [[[2]], [[3, 4], [5]], [[7], [0, 1, 2]]],
        "logit_bias": [{2: 3.0}, {5: -2.0, 80: 1.5}],
        "suppress_tokens": [[3], [60, 61, 62]],
        "min_new_tokens": [1, 3, 30],
        "forced_tokens": [{0: 7}, {-1: 9}],
    }
    knobs = {name: value for name, values in pool.items() for value in maybe(values)}
    knobs |= {"temperature": chance.choice([0.5, 1.0, 1.7]), "max_new_tokens": 40}
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((4, V), generator=generator) * chance.choice([0.5, 2.0, 5.0])
    rows = some_rows(seed, (1, 6, 20, 50), few=chance.choice([3, 12]))
    check(model, knobs, [1, 4, 19, 11], rows, logits)


def test_ties_at_the_kth() -> None:
    """As Hugging Face has it: all that equal the k-th stay."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    kept = Pipeline(Options(temperature=1.0, top_k=2), (), [0])([[]], logits)
    assert kept.isfinite().tolist() == [[False, True, True, True, False, True]]


def test_ties_with_hugging_face(model: GPT2LMHeadModel) -> None:
    """Logits of few bits, as half-precision models give them: equals of the k-th, and at the edge of top-p."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn((20, V), generator=generator) * 2).round()
    rows, prompts = some_rows(4, (1,) * 20), [1] * 20
    check(model, {"temperature": 1.0, "top_k": 4}, prompts, rows, logits)
    knobs = {"temperature": 1.0, "top_p": 0.77}
    ours = Pipeline(Options(**knobs), STOPS, prompts)(rows, logits)
    for row, theirs in enumerate(
        hugging_face(model, knobs, 1, tokens, x) for tokens, x in zip(rows, logits, strict=True)
    ):  # which of equals it keeps is not defined
        assert torch.equal(ours[row].sort().values, theirs.sort().values)
        kept = ours[row].isfinite()
        edge = ours[row][kept].min()
        equals = (logits[row] == edge).nonzero()[:, 0]
        assert kept[equals].tolist() == sorted(kept[equals].tolist(), reverse=True)


@pytest.mark.parametrize("presence", [0.0, 0.6, -0.5])
@pytest.mark.parametrize("frequency", [0.0, 0.3, -0.2])
def test_presence_and_frequency(presence: float, frequency: float) -> None:
    """OpenAI's API reference: mu[j] -> mu[j] - c[j] · frequency - (c[j] > 0) · presence, c of the text generated."""
    rows, prompts = [[5, 5, 1, 2, 1, 1], [3, 4], [9] * 70], [2, 2, 1]
    logits = torch.randn((3, V), generator=torch.Generator().manual_seed(5))
    options = Options(presence_penalty=presence, frequency_penalty=frequency)
    pipeline = Pipeline(options, (), prompts)
    expected = logits.double()
    for r, (tokens, start) in enumerate(zip(rows, prompts, strict=True)):
        for j in range(V):
            c = tokens[start:].count(j)
            expected[r, j] -= c * frequency + (c > 0) * presence
    assert (pipeline(rows, logits).softmax(1) - expected.softmax(1)).abs().max() <= 1e-6
    assert pipeline.is_empty == (presence == 0 and frequency == 0)


def test_presence_comes_after_repetition() -> None:
    options = Options(presence_penalty=1.0, repetition_penalty=2.0, logit_bias={1: 4.0})
    x = Pipeline(options, (), [1])([[0, 1]], torch.tensor([[-1.0, 2.0, 3.0]]))
    assert x.tolist() == [[-2.0, (2.0 + 4.0) / 2 - 1.0, 3.0]]


def test_forced_at_any_step() -> None:
    options = Options(forced_tokens={1: 4, -1: 2}, max_new_tokens=4, logit_bias={4: -math.inf})
    rows = [[9] * length for length in (3, 4, 5, 6)]  # steps 0, 1, 2, 3
    logits = torch.zeros(4, 10)
    x = Pipeline(options, (), [3] * 4).penalize(rows, logits)
    assert x[1].softmax(0).tolist() == [float(i == 4) for i in range(10)]
    assert x[3].softmax(0).tolist() == [float(i == 2) for i in range(10)]
    assert x[0].isfinite().sum() == x[2].isfinite().sum() == 9


def test_parts_make_the_whole() -> None:
    options = Options(temperature=0.7, top_k=9, repetition_penalty=1.5)
    pipeline = Pipeline(options, (), [1, 1])
    logits, rows = torch.randn((2, V), generator=torch.Generator().manual_seed(6)), [[1], [2]]
    whole = pipeline(rows, logits)
    assert torch.equal(pipeline.warp(pipeline.penalize(rows, logits)), whole)
    assert torch.equal(Pipeline(options, (), [1])([[2]], logits[1:]), whole[1:])
    assert pipeline.has_penalties and not pipeline.is_empty


def test_nothing_to_do() -> None:
    logits = torch.randn(2, V)
    greedy = Pipeline(Options(min_new_tokens=3, bad_words=[[7]]), (), [1, 1])
    assert not greedy.is_empty
    for options, stops in ((Options(min_new_tokens=3), ()), (Options(bad_words=[[7]]), STOPS)):
        pipeline = Pipeline(options, stops, [1, 1])
        assert pipeline.is_empty
        assert pipeline([[1], [2]], logits) is logits
    assert Pipeline(Options(temperature=1.0), (), [])([], logits[:0]).shape == (0, V)


def test_errors() -> None:
    pipeline = Pipeline(Options(repetition_penalty=2.0), (), [1, 1])
    with pytest.raises(ValueError, match=r"^tokens: got 1 rows"):
        pipeline([[1]], torch.zeros(2, V))
    with pytest.raises(ValueError, match=r"^tokens: got 2 rows"):
        pipeline([[1], [2]], torch.zeros(3, V))
    with pytest.raises(TypeError, match=r"^logits: got torch.float64"):
        pipeline([[1], [2]], torch.zeros(2, V, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^logits: got shape"):
        pipeline([[1], [2]], torch.zeros(V))
    with pytest.raises(ValueError, match=r"^logits: NaN in row 1"):
        logits = torch.zeros(2, V)
        logits[1, 5] = math.nan
        Pipeline(Options(temperature=1.0, top_p=0.5), (), [1, 1])([[1], [2]], logits)
    with pytest.raises(ValueError, match=r"^logits: nothing but -inf"):
        Pipeline(Options(temperature=1.0, min_p=0.5), (), [1])([[1]], torch.full((1, V), -math.inf))
