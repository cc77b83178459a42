"""Speculative decoding: the very tokens of the loop without it, whatever is drafted; how much is, and where from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from generation_cases import (  # noqa: F401 (one_thread is a fixture)
    CONTEXT,
    SMALL,
    V,
    mini,
    one_thread,
    prompts_of,
    repeating,
    repeating_prompts,
)

from pyfuse.generation import Result, generate, speculative, stream
from pyfuse.generation.pace import Pace
from pyfuse.generation.runner import Runner
from pyfuse.generation.sequence import Row, Speculation
from pyfuse.models.transformer import Transformer

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "seed": (5, 6, 7, 8)},
    "several": {"temperature": 1.1, "top_k": 5, "n": 3, "seed": 2**63},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "n-grams": {"no_repeat_ngram": 3},
    "words": {"bad_words": [[5, 6], [7]], "logit_bias": {3: 1.0}, "suppress_tokens": [8]},
    "length": {"min_new_tokens": 9, "stop_tokens": [3, 4, 5, 6, 7, 8]},
    "stop": {"stop_tokens": [5], "temperature": 1.0},
    "forced": {"forced_tokens": {0: 3, 5: 4, -1: 9}},
    "log-probabilities": {"logprobs": 2, "temperature": 0.9, "repetition_penalty": 1.1},
}
CASES = [
    *(("gpt2", way) for way in WAYS),
    *itertools.product(("llama", "mistral", "encoder-decoder", "t5"), ("several", "penalties")),
]


class Guesses:
    """A drafter that knows what is right, and says so, or part of it, or something else."""

    def __init__(self, texts: Mapping[tuple[int, int], list[int]], vocabulary: int) -> None:
        self.texts, self.vocabulary = texts, vocabulary
        self.draw, self.seen = random.Random(0), set[Row]()

    def kind(self, row: Row) -> int | None:
        self.seen.add(row)
        return self.draw.choice([None, 0, 2])

    def draft(self, lengths: Mapping[Row, int]) -> dict[Row, list[int]]:
        found = {}
        for row, count in lengths.items():
            right = self.texts[row.prompt, row.index][row.step :][: self.draw.randint(0, count)]
            wrong = self.draw.choices(range(self.vocabulary), k=count)
            found[row] = [*right, *wrong][:count]
        return found

    def forget(self, row: Row) -> None:
        self.seen.discard(row)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of any length at every step."""
    draw = random.Random(1)
    monkeypatch.setattr(Pace, "length", lambda self, kind, cost, most: draw.randint(1, most))


def start_of(model: Transformer) -> dict[str, Any]:
    return {"decoder_start": (1, 7)} if model.config.encoder_layers else {}


def told(results: list[Result]) -> list[Speculation]:
    found = [result.speculation for result in results]
    assert all(found)
    return [one for one in found if one is not None]


def check_guesses(
    model: Transformer | Runner,
    given: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    **knobs: Any,
) -> list[Result]:
    """The same results with drafts that are partly right."""
    expected = generate(model, given, **knobs)
    texts = {
        (i, j): result.tokens
        for i, results in itertools.groupby(expected, lambda result: result.prompt)
        for j, result in enumerate(results)
    }
    guesses = Guesses(texts, SMALL)
    monkeypatch.setattr(speculative, "Lookup", lambda sources: guesses)
    results = generate(model, given, speculate="prompt", **knobs)
    assert results == expected
    assert not guesses.seen
    for result, one in zip(results, told(results), strict=True):
        assert 0 <= one.accepted <= one.proposed
        assert one.calls + one.accepted == len(result.tokens) + (
            result.finish_reason == "stop_token"
        )
    assert sum(one.accepted for one in told(results)) > 0
    return results


# ---- the same text -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), CASES)
def test_any_drafts_give_the_same_text(
    name: str, way: str, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = repeating(name)
    knobs = {"max_new_tokens": 25, **WAYS[way], **start_of(model)}
    check_guesses(model, repeating_prompts(9, 1, 4, 33), monkeypatch, **knobs)


@pytest.mark.parametrize("cache", ["model", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_the_same_in_every_kind_of_runner(
    name: str, dtype: torch.dtype, cache: str, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = repeating(name).to(dtype), repeating_prompts(9, 1, 4, 33)
    for kernel in (None, False):
        runner = Runner(model, sequences=3, page_size=4, cache=cache, kernel=kernel)
        check_guesses(runner, given, monkeypatch, max_new_tokens=20, temperature=1.0, n=2)
        assert runner.cache.pages_in_use == 0


def test_the_same_on_any_number_of_threads(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = repeating("llama"), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            check_guesses(
                model, repeating_prompts(5, 2), monkeypatch, max_new_tokens=20, logprobs=1
            )
        )
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_look_up_gives_the_same_text(name: str, way: str, eager: None) -> None:
    model = repeating(name)
    knobs = {"max_new_tokens": 25, **WAYS[way], **start_of(model)}
    expected = generate(model, repeating_prompts(9, 1, 4, 33), **knobs)
    results = generate(model, repeating_prompts(9, 1, 4, 33), speculate="prompt", **knobs)
    assert results == expected
    assert sum(one.proposed for one in told(results)) > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_draft_model_gives_the_same_text(way: str, eager: None) -> None:
    model, draft = repeating("llama"), repeating("gpt2", seed=1)
    knobs = {"max_new_tokens": 25, **WAYS[way]}
    expected = generate(model, repeating_prompts(9, 1, 4, 33), **knobs)
    for given in (draft, Runner(draft, max_tokens=30, sequences=2, page_size=4)):
        results = generate(model, repeating_prompts(9, 1, 4, 33), speculate=given, **knobs)
        assert results == expected
        assert sum(one.proposed for one in told(results)) > 0
        if isinstance(given, Runner):
            assert given.cache.pages_in_use == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_model_itself_is_always_right(way: str, eager: None) -> None:
    """By the same options, seeds and steps."""
    model, knobs = repeating("llama"), {"max_new_tokens": 25, **WAYS[way]}
    results = generate(model, repeating_prompts(9, 1, 4), speculate=model, **{**knobs, "seed": 3})
    assert results == generate(model, repeating_prompts(9, 1, 4), **{**knobs, "seed": 3})
    assert all(one.accepted == one.proposed for one in told(results))
    assert sum(one.accepted for one in told(results)) > 0


def test_without_a_measure_too() -> None:
    """As it is used."""
    model = repeating("gpt2")
    ways: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "n": 2})
    for knobs in ways:
        expected = generate(model, repeating_prompts(9, 1, 4, 33), max_new_tokens=30, **knobs)
        drafts: tuple[Any, ...] = ("prompt", repeating("gpt2", seed=1))
        for speculate in drafts:
            results = generate(
                model,
                repeating_prompts(9, 1, 4, 33),
                max_new_tokens=30,
                speculate=speculate,
                **knobs,
            )
            assert results == expected


def test_prompts_wait_and_join(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(repeating("llama"), max_tokens=40, sequences=2)
    check_guesses(runner, repeating_prompts(9, 1, 4, 7, 12, 3), monkeypatch, max_new_tokens=20)


def test_the_end_of_the_context(eager: None) -> None:
    model = repeating("gpt2")
    given = repeating_prompts(CONTEXT - 1, CONTEXT - 2, CONTEXT - 9)
    expected = generate(model, given, max_new_tokens=20)
    for speculate in ("prompt", repeating("llama", seed=1)):
        assert generate(model, given, max_new_tokens=20, speculate=speculate) == expected
    short = Runner(repeating("llama", seed=1), max_tokens=CONTEXT - 5, sequences=3)
    assert generate(model, given, max_new_tokens=20, speculate=short) == expected


@pytest.mark.parametrize("n", [1, 2])
def test_streams(n: int, eager: None) -> None:
    model = repeating("gpt2")
    knobs: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.5, "n": n, "logprobs": 0}
    expected = list(stream(model, repeating_prompts(6, 9), **knobs))
    pieces = list(stream(model, repeating_prompts(6, 9), speculate="prompt", **knobs))
    for key in itertools.product(range(2), range(n)):
        one, other = ([p for p in x if (p.prompt, p.index) == key] for x in (pieces, expected))
        assert one == other and len(one) == 20
    runner = Runner(model, sequences=4)
    draft = Runner(repeating("gpt2", seed=1), sequences=4)
    with_drafts = stream(runner, repeating_prompts(6, 9), speculate=draft, **knobs)
    for _ in range(7):
        next(with_drafts)
    with_drafts.close()
    assert runner.cache.pages_in_use == draft.cache.pages_in_use == 0


def test_stop_strings(eager: None) -> None:
    text_cases = pytest.importorskip("text_cases")
    from pyfuse.generation.text import Tokenizer

    tokenizer = Tokenizer(text_cases.byte_level())
    model = mini("gpt2", vocabulary=262)
    plain = generate(model, "ab ab ab", tokenizer=tokenizer, max_new_tokens=40, temperature=0.3)[0]
    assert plain.text is not None
    stop = (plain.text[4:6], plain.text[20:23])
    knobs: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.3, "tokenizer": tokenizer}
    for stops in (stop, stop[1:]):
        expected = generate(model, "ab ab ab", stop=stops, **knobs)
        for speculate in ("prompt", model):
            assert generate(model, "ab ab ab", stop=stops, speculate=speculate, **knobs) == expected
            pieces = list(stream(model, "ab ab ab", stop=stops, speculate=speculate, **knobs))
            assert "".join(p.text or "" for p in pieces) == expected[0].text
        assert expected[0].finish_reason == "stop_string"


def test_fewer_calls_where_the_text_repeats_itself() -> None:
    model = repeating("gpt2")
    prompt = next(  # of which greedy decoding goes in a circle
        p for seed in range(50) for p in [prompts_of(8, seed=seed, vocabulary=SMALL)[0]]
        if len({tuple(generate(model, p, max_new_tokens=50)[0].tokens[i : i + 6]) for i in (20, 26, 32)}) == 1
    )  # fmt: skip
    runner = Runner(model)
    result = generate(runner, prompt, max_new_tokens=50, speculate="prompt")[0]
    one = told([result])[0]
    assert one.calls < 25 and one.accepted == 50 - one.calls
    assert one.acceptance == one.accepted / one.proposed > 0.5


def test_nobody_looks_behind_a_wrong_token(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that makes everything after it NaN does no harm as long as it is only guessed."""
    model = repeating("llama")
    knobs: dict[str, Any] = {"max_new_tokens": 20, "suppress_tokens": [4], "temperature": 1.0}
    given = [[token for token in prompt if token != 4] for prompt in repeating_prompts(9, 5)]
    with torch.no_grad():
        model.decoder.embedding.token.weight[4] = float("nan")
    check_guesses(model, given, monkeypatch, **knobs)
    check_guesses(model, given, monkeypatch, repetition_penalty=1.3, **knobs)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"speculate": "prompt", "beams": 2}, "speculate: beam search .* beams is 2"),
        ({"speculate": "text"}, "speculate: got 'text', needs 'prompt'"),
        ({"speculate": 3}, "speculate: got 3"),
        ({"speculate": mini("gpt2", vocabulary=V + 1)}, f"speculate: .* {V + 1} tokens.* {V}"),
        ({"speculate": mini("t5")}, "speculate: .* encoder"),
        ({"speculate": "prompt", "draft_tokens": 0}, "draft_tokens: got 0, needs 1 … 15"),
        ({"speculate": "prompt", "draft_tokens": 16}, "draft_tokens: got 16"),
        ({"draft_tokens": 4}, "draft_tokens: got 4, but without speculate"),
    ],
)
def test_bad_requests(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(mini("gpt2"), [[3]], **knobs)


def test_other_bad_requests() -> None:
    model = mini("gpt2")
    runner = Runner(model)
    with pytest.raises(ValueError, match="speculate: got the model's own runner"):
        generate(runner, [[3]], speculate=runner)
    with pytest.raises(ValueError, match=r"speculate: .* window"):
        generate(repeating("llama"), [[3]], speculate=repeating("mistral"))
    with pytest.raises(TypeError, match="draft_tokens: got True"):
        generate(model, [[3]], speculate="prompt", draft_tokens=True)
    with pytest.raises(ValueError, match="draft_tokens"):
        stream(model, [[3]], draft_tokens=3)
    assert generate(model, [], speculate="prompt") == []


def test_drafts_are_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def length(self: Pace, kind: int, cost: float, most: int) -> int:
        asked.append(most)
        return most

    monkeypatch.setattr(Pace, "length", length)
    generate(
        repeating("gpt2"),
        repeating_prompts(9),
        speculate=repeating("llama"),
        draft_tokens=3,
        max_new_tokens=20,
    )
    assert max(asked) == 3
