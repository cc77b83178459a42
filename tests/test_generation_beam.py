"""Beam search and diverse beam search beside a plain one, beside all sequences there are, and what they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from generation_cases import (  # noqa: F401 (one_thread is a fixture)
    RecomputeRunner,
    V,
    mini,
    one_thread,
    prompts_of,
)
from text_cases import byte_level
from torch import Tensor

from pyfuse.generation import generate
from pyfuse.generation.beam import _top
from pyfuse.generation.runner import Runner
from pyfuse.generation.text import Tokenizer
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Transformer

PROMPTS = prompts_of(9, 1, 5)
GROUPS: dict[str, dict[str, Any]] = {
    "beams": {"beams": 4, "n": 3},
    "groups_of_two": {"beams": 6, "beam_groups": 3, "diversity_penalty": 0.6, "n": 4},
    "groups_of_one": {"beams": 4, "beam_groups": 4, "diversity_penalty": 2.5, "n": 4},
}
LogProbabilities = Callable[[Sequence[int]], list[float]]


def says(model: Transformer) -> LogProbabilities:
    """ln p of every token after some tokens."""

    @torch.no_grad()
    def of(tokens: Sequence[int]) -> list[float]:
        logits: Tensor = model(torch.tensor([list(tokens)]))[0, -1]
        numbers: list[float] = logits.double().log_softmax(-1).tolist()
        return numbers

    return of


def plain_search(
    of: LogProbabilities, prompt: list[int], *, max_new_tokens: int, beams: int, n: int, beam_groups: int = 1,
    diversity_penalty: float = 0.0, length_penalty: float = 1.0, early_stopping: bool | str = False,
    stop_tokens: Sequence[int] = (),
) -> list[tuple[float, list[int]]]:  # fmt: skip
    """(score, new tokens) as the paper has it, group by group, with every sum over the whole vocabulary."""
    size = beams // beam_groups
    going: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(beam_groups)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(beam_groups)]
    for length in range(1, max_new_tokens + 1):
        said: list[int] = []
        for g in range(beam_groups):
            if not going[g]:
                continue
            every = [
                (score + p - diversity_penalty * said.count(token), [*text, token])
                for score, text in going[g]
                for token, p in enumerate(of(prompt + text))
            ]
            every.sort(reverse=True)
            every = every[: max(2, 1 + len(stop_tokens)) * size]
            ends = [
                (s / length**length_penalty, t[:-1])
                for s, t in every[:size]
                if t[-1] in stop_tokens
            ]
            ended[g] = sorted(ended[g] + ends, reverse=True)[:size]
            going[g] = [c for c in every if c[1][-1] not in stop_tokens][:size]
            said += [text[-1] for _, text in going[g]]
            best = every[0][0] if beam_groups > 1 else going[g][0][0]
            longest = early_stopping == "never" and length_penalty > 0
            attainable = best / (max_new_tokens if longest else length) ** length_penalty
            full = len(ended[g]) == size
            over = full and (early_stopping is True or attainable <= ended[g][-1][0])
            if length == max_new_tokens and not (over and beam_groups > 1):
                cut = [(s / length**length_penalty, t) for s, t in going[g]]
                ended[g] = sorted(ended[g] + cut, reverse=True)[:size]
            if over:
                going[g] = []
    return sorted(itertools.chain(*ended), reverse=True)[:n]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.4])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_plain_search_finds_the_same(
    groups: str, length_penalty: float, early_stopping: bool | str
) -> None:
    model = mini("gpt2")
    knobs = {
        "max_new_tokens": 7, "length_penalty": length_penalty, "early_stopping": early_stopping,
        "stop_tokens": tuple(range(0, V, 9)), **GROUPS[groups],
    }  # fmt: skip
    results = generate(model, PROMPTS, **knobs)
    expected = [pair for prompt in PROMPTS for pair in plain_search(says(model), prompt, **knobs)]
    assert [r.tokens for r in results] == [tokens for _, tokens in expected]
    for result, (score, tokens) in zip(results, expected, strict=True):
        assert result.score == pytest.approx(score, rel=1e-4)
        assert result.finish_reason == ("length" if len(tokens) == 7 else "stop_token")
    assert "stop_token" in {r.finish_reason for r in results} or length_penalty > 1


def test_as_many_beams_as_sequences_find_the_best_of_all() -> None:
    vocabulary, new = 6, 3
    model = mini("llama", vocabulary=vocabulary)
    of, prompt = says(model), [3, 1]
    every = []
    for text in itertools.product(range(vocabulary), repeat=new):
        score = sum(of([*prompt, *text[:i]])[token] for i, token in enumerate(text))
        every.append((score / new, list(text)))
    every.sort(reverse=True)
    results = generate(model, prompt, beams=vocabulary**2, n=20, max_new_tokens=new)
    assert [r.tokens for r in results] == [text for _, text in every[:20]]
    assert [r.score for r in results] == pytest.approx([score for score, _ in every[:20]], rel=1e-5)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 4111])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_the_largest_scores_by_blocks(size: int, k: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    x[torch.arange(0, size, 3)] = -math.inf
    expected = x.topk(min(k, size))
    possible = int((expected.values > -math.inf).sum())
    assert _top(x, k) == (expected.values.tolist()[:possible], expected.indices.tolist()[:possible])
    x[size // 2] = math.nan
    assert math.isnan(_top(x, k)[0][0])


# What transformers 4.55.4 returned, the last version that has group beam search, for `waves()`: prompt [5, 3, 8, 13],
# 10 new tokens, suppress_tokens [0]: (options, sequences without their end token, their scores).
KEPT: list[tuple[dict[str, Any], list[tuple[float, list[int]]]]] = [
    (
        {"beams": 4, "beam_groups": 2, "diversity_penalty": 0.5},
        [
            (-3.29354, [32, 19, 18, 10, 60, 21, 16, 7, 19, 43]),
            (-3.29371, [32, 19, 18, 10, 60, 21, 16, 7, 19, 18]),
            (-3.41286, [7, 8, 54, 49, 21, 10, 60, 21, 49, 21]),
            (-3.41298, [7, 8, 54, 49, 21, 10, 60, 21, 49, 46]),
        ],
    ),
    (
        {
            "beams": 6, "beam_groups": 3, "diversity_penalty": 1.5, "length_penalty": 0.6, "early_stopping": True,
            "stop_tokens": (20, 33, 46, 50),
        },
        [(-3.44925, []), (-4.26477, [7]), (-4.27476, [43]), (-6.37092, [7, 8, 54, 49])],
    ),
    (
        {
            "beams": 4, "beam_groups": 4, "diversity_penalty": 0.8, "length_penalty": 1.4, "early_stopping": "never",
            "stop_tokens": (20, 33, 46, 9, 11, 58),
        },
        [
            (-1.30786, [57, 55, 18, 10, 35, 21, 16, 7, 19, 43]),
            (-1.35729, [32, 19, 43, 35, 10, 10, 60, 21, 24, 21]),
            (-1.35789, [7, 44, 54, 24, 21, 35, 35, 10, 10]),
            (-1.38776, [21, 24, 21, 60, 60, 60, 10, 35, 60]),
        ],
    ),
]  # fmt: skip


def waves() -> Transformer:
    """GPT-2 whose weights are sines, and so the same everywhere."""
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            at = torch.arange(1, p.numel() + 1, dtype=torch.float64)
            sines = (at * (1.7 + i) ** 0.5 * 7.1).sin().reshape(p.shape)
            p.copy_(sines * (0.9 if p.ndim > 1 else 1.5))
    return from_pretrained(model)


@pytest.mark.parametrize(("knobs", "expected"), KEPT)
def test_hugging_faces_group_beam_search_found_the_same(
    knobs: dict[str, Any], expected: list[tuple[float, list[int]]]
) -> None:
    results = generate(waves(), [5, 3, 8, 13], n=4, max_new_tokens=10, suppress_tokens=(0,), **knobs)  # fmt: skip
    assert [r.tokens for r in results] == [tokens for _, tokens in expected]
    assert [r.score for r in results] == pytest.approx([s for s, _ in expected], abs=2e-5)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_search_does_not_depend_on_the_batch(groups: str) -> None:
    model = mini("encoder-decoder")
    knobs = {
        "max_new_tokens": 9,
        "stop_tokens": range(0, V, 7),
        "decoder_start": 1,
        **GROUPS[groups],
    }
    alone = [result for prompt in PROMPTS for result in generate(model, prompt, **knobs)]
    for runner in (model, Runner(model, max_tokens=16, page_size=4, sequences=6)):
        together = generate(runner, PROMPTS, **knobs)
        assert [(r.tokens, r.score) for r in together] == [(r.tokens, r.score) for r in alone]
        n = knobs["n"]
        assert [r.prompt for r in together] == [0] * n + [1] * n + [2] * n


def test_groups_differ_where_the_penalty_is_large() -> None:
    results = generate(
        mini("gpt2"),
        PROMPTS[0],
        beams=3,
        beam_groups=3,
        diversity_penalty=1e6,
        n=3,
        max_new_tokens=5,
    )
    for tokens in zip(*(r.tokens for r in results), strict=True):
        assert len(set(tokens)) == 3


@pytest.mark.parametrize("groups", GROUPS)
def test_scores_are_log_probabilities(groups: str) -> None:
    """Of what the tokens and the stop token have together, where nothing is taken off them."""
    model = mini("llama")
    of, prompt = says(model), PROMPTS[0]
    knobs = {"length_penalty": 0.8, "max_new_tokens": 6, "stop_tokens": (7, 50), **GROUPS[groups]}
    results = generate(model, prompt, **knobs)
    scores = [result.score for result in results]
    assert scores == sorted(scores, reverse=True)
    if groups != "beams":
        return
    for result in results:
        text = result.tokens
        total = sum(of(prompt + text[:i])[token] for i, token in enumerate(text))
        sums = [total]
        if result.finish_reason == "stop_token":
            sums = [total + of(prompt + text)[stop] for stop in (7, 50)]
        length = len(text) + (result.finish_reason == "stop_token")
        assert any(result.score == pytest.approx(s / length**0.8, rel=1e-5) for s in sums)


def test_a_stop_string_is_as_good_as_a_stop_token() -> None:
    tokenizer = Tokenizer(byte_level())
    model = mini("gpt2", vocabulary=len(tokenizer.library))
    others = [i for i in range(len(tokenizer.library)) if not tokenizer.decode([i]).isalpha()]
    knobs: dict[str, Any] = {
        "tokenizer": tokenizer, "suppress_tokens": others, "max_new_tokens": 12, "beams": 4, "n": 4,
        "length_penalty": 0.3,
    }  # fmt: skip
    free = generate(model, ["The sky", "a"], stop_tokens=(), **knobs)
    letter = (free[0].text or "")[3]
    by_token = generate(model, ["The sky", "a"], stop_tokens=tokenizer.encode(letter), **knobs)
    by_text = generate(model, ["The sky", "a"], stop_tokens=(), stop=(letter,), **knobs)
    assert [(r.text, r.score) for r in by_text] == [(r.text, r.score) for r in by_token]
    assert "stop_string" in {r.finish_reason for r in by_text}
    for mine, other in zip(by_text, by_token, strict=True):
        ended = mine.finish_reason == "stop_string"
        assert mine.tokens == other.tokens + tokenizer.encode(letter) * ended


def test_there_may_be_fewer_sequences_than_are_wanted() -> None:
    model = mini("gpt2")
    forced = generate(model, PROMPTS, beams=4, n=3, max_new_tokens=2, forced_tokens={0: 7, 1: 9})
    assert [(r.prompt, r.tokens) for r in forced] == [(i, [7, 9]) for i in range(3)]
    begun = generate(model, PROMPTS[0], beams=4, n=4, max_new_tokens=2, forced_tokens={0: 7})
    assert len({tuple(r.tokens) for r in begun}) == 4 and all(r.tokens[0] == 7 for r in begun)
    one_word = {"beams": 3, "n": 3, "max_new_tokens": 2, "suppress_tokens": range(1, V)}
    assert [r.tokens for r in generate(model, PROMPTS[0], **one_word)] == [[0, 0]]
    with pytest.raises(ValueError, match="logits: nothing but -inf"):
        generate(model, PROMPTS[0], beams=2, suppress_tokens=range(V))


# ---- what is held --------------------------------------------------------------------------------


def test_beams_begin_as_one_sequence_and_are_never_more_than_beams() -> None:
    oracle = RecomputeRunner(mini("gpt2"))
    knobs = {"beams": 6, "beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 5}
    generate(oracle, PROMPTS[0], **knobs)
    assert oracle.calls[0] == [(0, 9)]
    assert oracle.calls[1:] == [[(9 + i, 1)] * 6 for i in range(4)]
    assert not oracle.alive


def test_beams_share_the_pages_of_what_they_have_in_common() -> None:
    page, new = 4, 20
    runner = Runner(mini("llama"), max_tokens=64, page_size=page, sequences=4)
    prompt, most = prompts_of(42)[0], 0
    forward = runner.forward

    def watched(*args: Any, **more: Any) -> Tensor:
        nonlocal most
        logits = forward(*args, **more)
        most = max(most, runner.cache.pages_in_use)
        return logits

    runner.forward = watched  # type: ignore[method-assign]
    generate(runner, prompt, beams=4, n=4, max_new_tokens=new)
    whole = math.ceil((len(prompt) + new) / page)
    tail = whole - len(prompt) // page
    assert whole <= most <= len(prompt) // page + 4 * tail
    assert runner.cache.pages_in_use == 0
