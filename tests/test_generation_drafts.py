"""Where drafts come from (`pyfuse.generation.drafts`), and how long they are (`pyfuse.generation.pace`)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from generation_cases import (  # noqa: F401 (one_thread is a fixture)
    SMALL,
    one_thread,
    repeating,
    repeating_prompts,
)

from pyfuse.generation import Options, generate
from pyfuse.generation.drafts import DraftModel, Lookup, Suffixes
from pyfuse.generation.pace import ALLOWANCE, MOST, SHARE, Costs, Pace, best_length
from pyfuse.generation.runner import Runner
from pyfuse.generation.sequence import Row


def _row(tokens: list[int], **more: Any) -> Row:
    return Row(0, 0, tokens, options=Options(), stop_tokens=frozenset(), limit=50, **more)


# ---- what was said before ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_suffixes_are_the_longest(size: int) -> None:
    draw = random.Random(size)
    for _ in range(30):
        known, tokens = Suffixes(), list[int]()
        for _ in range(40):
            tokens.append(draw.randrange(size))
            known.append(tokens[-1])
            n = len(tokens)
            ends = {
                length: [
                    e for e in range(length, n) if tokens[e - length : e] == tokens[n - length :]
                ]
                for length in range(n)
            }
            longest = max(length for length, at in ends.items() if at or not length)
            assert known.length == longest
            assert known.end in ends[longest] or not longest


def test_what_follows_a_match() -> None:
    known = Suffixes([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert (known.length, known.end) == (2, 3)
    assert known.follow(3) == [4, 5, 6]
    assert known.follow(8) == [4, 5, 6, 9, 2, 3, 4, 5]  # beyond the end it goes on like that
    circle = Suffixes([7, 1, 2, 1, 2])
    assert circle.follow(5) == [1, 2, 1, 2, 1]
    latest = Suffixes([1, 2, 3, 1, 2, 4, 1, 2])
    assert latest.follow(1) == [4]


def test_a_long_text_is_followed_in_linear_time() -> None:
    """By the number of states: two for a token at most."""
    for tokens in ([5] * 5000, [*range(2500), *range(2500)], random.Random(0).choices(range(3), k=5000)):  # fmt: skip
        known = Suffixes(tokens)
        assert len(known._links) <= 2 * 5000


def test_one_token_is_no_match() -> None:
    row = _row([3, 4, 5, 3])
    lookup = Lookup()
    assert lookup.kind(row) is None
    row.tokens.append(4)
    assert lookup.kind(row) == 1 and lookup.draft({row: 2}) == {row: [5, 3]}
    lookup.forget(row)
    lookup.forget(row)


def test_what_the_encoder_reads_is_looked_up_too() -> None:
    lookup, row = Lookup([[9, 8, 7, 6]]), _row([1, 9, 8])
    assert lookup.kind(row) == 1
    assert lookup.draft({row: 5}) == {row: [7, 6]}  # up to its end


def test_a_draft_model_goes_back_to_what_is_right() -> None:
    model = repeating("gpt2")
    runner = Runner(model)
    drafter, row = DraftModel(runner), _row(repeating_prompts(9)[0])
    expected = generate(model, row.tokens, max_new_tokens=12)[0].tokens
    assert drafter.kind(row) == 0
    assert drafter.draft({row: 5}) == {row: expected[:5]}
    assert runner.computed == 9 + 4
    other = (expected[2] + 1) % SMALL
    row.tokens += [*expected[:2], other]
    wrong = generate(model, row.tokens, max_new_tokens=3)[0].tokens
    assert drafter.draft({row: 3}) == {row: wrong}
    assert runner.computed == 9 + 4 + 1 + 2  # the token that was another, and two drafted ones
    drafter.forget(row)
    assert runner.cache.pages_in_use == 0


# ---- how much ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.05, 0.15, 0.4, 1.0])
def test_the_best_length(rate: float, cost: float) -> None:
    gains = [sum(rate**i for i in range(k + 1)) / (1 + cost * k) for k in range(MOST + 1)]
    k = best_length(rate, cost, MOST)
    assert gains[k] == pytest.approx(max(gains), rel=0.031) and (k > 0) == (max(gains) > 1.03)
    assert k == 0 or gains[k] == pytest.approx(max(gains))
    assert best_length(rate, cost, 0) == 0


def test_drafts_become_longer_while_they_are_right() -> None:
    pace, lengths = Pace(), []
    for _ in range(20):
        lengths.append(pace.length(1, 0.15, MOST))
        pace.learn(1, lengths[-1], lengths[-1], 0.15)
    assert lengths == sorted(lengths) and lengths[0] < 4 and lengths[-1] == MOST
    assert pace.length(1, 0.15, 3) == 3


@pytest.mark.parametrize("cost", [0.02, 0.15, 0.5, 2.0])
@pytest.mark.parametrize("kinds", [(0,), (1, 2), (1, 2, 3, 4)])
def test_what_wrong_drafts_cost(kinds: tuple[int, ...], cost: float) -> None:
    pace, proposed, late = Pace(), 0, 0
    for step in range(1, 1001):
        length = pace.length(kinds[step % len(kinds)], cost, MOST)
        pace.learn(kinds[step % len(kinds)], length, 0, cost)
        proposed += length
        late += length * (step > 500)
        assert proposed * cost <= ALLOWANCE + SHARE * step
    assert late <= 10  # a trial now and then


def test_drafts_come_back_when_they_are_right_again() -> None:
    pace = Pace()
    for _ in range(200):
        pace.learn(1, pace.length(1, 0.15, MOST), 0, 0.15)
    lengths = []
    for _ in range(120):
        lengths.append(pace.length(1, 0.15, MOST))
        pace.learn(1, lengths[-1], lengths[-1], 0.15)
    assert lengths[-1] == MOST


def test_costs_are_measured() -> None:
    costs = Costs(0.15)
    assert costs.of(1) == 0.15
    assert costs.of(8) == pytest.approx(0.15 * 8 / (1 + 0.15 * 7))
    costs.learn(1, 4, 9.0)  # nothing to compare it with yet
    assert costs.of(1) == 0.15
    for _ in range(20):
        costs.learn(1, 0, 2.0)
        costs.learn(1, 5, 2.0 * (1 + 5 * 0.4))
    costs.learn(1, 1, 1000.0)  # something else kept the machine busy
    assert costs.of(1) == pytest.approx(0.4)
    assert costs.of(2) == pytest.approx(0.3 / 1.15)
    costs.learn(2, 0, 1.0)
    for _ in range(20):
        costs.learn(2, 6, 0.9)
    assert costs.of(2) == 0.0
