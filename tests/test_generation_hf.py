"""The loops give the tokens of Hugging Face's generate, on tiny random models and on a real one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from generation_cases import one_thread, prompts_of  # noqa: F401 (one_thread is a fixture)
from hf_cases import build

from pyfuse.generation import Result, generate
from pyfuse.generation.runner import Runner
from pyfuse.generation.text import Tokenizer
from pyfuse.models import zoo
from pyfuse.models.checkpoint import from_pretrained

NAMES = {
    "beams": "num_beams",
    "n": "num_return_sequences",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
    "bad_words": "bad_words_ids",
}
MODELS = ("gpt2", "llama", "bart", "t5")
PROMPTS = prompts_of(11, 4, 9, 1)
BEAMS: dict[str, Any] = {"beams": 4, "n": 3}
PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram": {"no_repeat_ngram": 1},
    "min_new_tokens": {"min_new_tokens": 9, "ends": True},
    "bad_words": {"bad_words": ((7,), (20, 21), *((i, j) for i in range(40) for j in range(50)))},
    "all": {
        "repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 5, "ends": True,
        "bad_words": ((9,), (31, 5)),
    },
}  # fmt: skip


def padded(model: hf.PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """On the left, or on the right where an encoder reads them."""
    width = max(map(len, prompts))
    gaps = [[0] * (width - len(p)) for p in prompts]
    masks = [[1] * len(p) for p in prompts]
    if model.config.is_encoder_decoder:
        rows = [[*p, *gap] for p, gap in zip(prompts, gaps, strict=True)]
        masks = [[*m, *gap] for m, gap in zip(masks, gaps, strict=True)]
    else:
        rows = [[*gap, *p] for p, gap in zip(prompts, gaps, strict=True)]
        masks = [[*gap, *m] for m, gap in zip(masks, gaps, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def theirs(
    model: hf.PreTrainedModel, prompts: Sequence[Sequence[int]], stop_tokens: Sequence[int] = (),
    forced: dict[str, int] | None = None, **knobs: Any,
) -> list[list[int]]:  # fmt: skip
    """New tokens of each sequence, without the end token."""
    inputs = padded(model, prompts)
    options = {NAMES.get(name, name): value for name, value in knobs.items()}
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [list(word) for word in options["bad_words_ids"]]
    ids = model.generate(
        **inputs, do_sample=False, pad_token_id=0, eos_token_id=list(stop_tokens) or None,
        **(forced or {}), **options,
    )  # fmt: skip
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [cut(row, stop_tokens) for row in ids[:, begin:].tolist()]


def cut(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0]] if ends else tokens


@cache
def ends_of(name: str) -> tuple[int, ...]:
    """Some that do occur: of what the model says without any, at some steps."""
    texts = theirs(build(name), PROMPTS, max_new_tokens=14)
    return tuple(dict.fromkeys([texts[0][13], texts[2][5], texts[3][9]]))


def ours(model: hf.PreTrainedModel, prompts: list[list[int]], **knobs: Any) -> list[Result]:
    if model.config.is_encoder_decoder:
        knobs["decoder_start"] = model.config.decoder_start_token_id
    return generate(from_pretrained(model), prompts, **knobs)


def check(
    name: str, *, padding: bool = True, forced: dict[str, int] | None = None, ends: bool = False, **knobs: Any
) -> list[Result]:  # fmt: skip
    """One call against one of theirs, or against one for each prompt."""
    model = build(name)
    if ends:
        knobs["stop_tokens"] = ends_of(name)
    batches = [PROMPTS] if padding else [[prompt] for prompt in PROMPTS]
    expected = [t for batch in batches for t in theirs(model, batch, forced=forced, **knobs)]
    if forced:
        first, last = forced["forced_bos_token_id"], forced["forced_eos_token_id"]
        knobs["forced_tokens"] = {0: first, -1: last}
    results = ours(model, PROMPTS, **knobs)
    assert [result.tokens for result in results] == expected
    n = knobs.get("n", 1)
    assert [r.prompt for r in results] == [i for i in range(len(PROMPTS)) for _ in range(n)]
    return results


def reasons(results: list[Result]) -> set[str]:
    return {result.finish_reason for result in results}


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str) -> None:
    assert reasons(check(name, max_new_tokens=20)) == {"length"}
    assert "stop_token" in reasons(check(name, max_new_tokens=20, ends=True))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 1.4, -0.7])
@pytest.mark.parametrize("name", MODELS)
def test_beams(name: str, length_penalty: float, early_stopping: bool | str) -> None:
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    assert "stop_token" in reasons(check(name, max_new_tokens=18, ends=True, **BEAMS, **options))


@pytest.mark.parametrize("name", MODELS)
def test_beams_with_one_end_token_or_none(name: str) -> None:
    check(name, max_new_tokens=12, **BEAMS)
    check(name, max_new_tokens=12, stop_tokens=ends_of(name)[:1], **BEAMS)


@pytest.mark.parametrize("way", [{}, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", MODELS)
def test_processors(name: str, processors: str, way: dict[str, Any]) -> None:
    """Prompt by prompt on their side, whose n-grams would go over the padding."""
    results = check(name, padding=False, max_new_tokens=16, **PROCESSORS[processors], **way)
    ends = {"stop_tokens": ends_of(name)} if "ends" in PROCESSORS[processors] else {}
    assert results != ours(build(name), PROMPTS, max_new_tokens=16, **ends, **way)


@pytest.mark.parametrize("way", [{}, BEAMS], ids=["greedy", "beams"])
def test_forced_first_and_last_token(way: dict[str, Any]) -> None:
    """As BART's configuration asks for: its first token, and an end token at the last step."""
    forced = {"forced_bos_token_id": 7, "forced_eos_token_id": 2}
    check("bart", max_new_tokens=9, stop_tokens=(2,), forced=forced, **way)


# ---- a real model --------------------------------------------------------------------------------

TEXTS = (
    "The sky is blue because",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "My favourite recipe for bread needs",
    "1, 2, 3,",
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[hf.PreTrainedModel, Runner, Tokenizer]:
    """In float32: theirs, and ours with room for what the tests ask of it."""
    if zoo.problem("smollm2") is not None:
        pytest.skip("smollm2 is not fetched: make models")
    folder = zoo.path("smollm2")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runner = Runner(from_pretrained(model), max_tokens=96, sequences=8)
    return model, runner, Tokenizer.of("smollm2")


@pytest.mark.parametrize(
    ("batch", "knobs"),
    [
        (slice(5), {"max_new_tokens": 64}),
        (slice(1, 3), {"max_new_tokens": 24, **BEAMS}),
    ],
    ids=["greedy", "beams"],
)
def test_smollm2(
    batch: slice, knobs: dict[str, Any], smollm2: tuple[hf.PreTrainedModel, Runner, Tokenizer]
) -> None:
    model, runner, tokenizer = smollm2
    prompts = [tokenizer.encode(text) for text in TEXTS[batch]]
    expected = theirs(model, prompts, stop_tokens=tokenizer.end_tokens, **knobs)
    results = generate(runner, TEXTS[batch], tokenizer=tokenizer, **knobs)
    assert [result.tokens for result in results] == expected
    assert [result.text for result in results] == [tokenizer.decode(t) for t in expected]
