"""Options: which values, and which of them together, are refused, by their names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from pyfuse.generation import Options


def test_defaults_are_greedy() -> None:
    options = Options()
    assert not options.samples and not options.searches
    assert not Options(temperature=0).samples
    assert Options(temperature=0.5).samples
    assert Options(beams=2).searches


def test_every_field_has_a_text() -> None:
    for f in dataclasses.fields(Options):
        assert f.metadata["text"], f.name


def test_values_become_immutable() -> None:
    bias, words = {3: 1}, [[1, 2], (3,)]
    options = Options(
        logit_bias=bias,
        bad_words=words,  # type: ignore[arg-type]
        stop="end",  # type: ignore[arg-type]
        stop_tokens=range(2),  # type: ignore[arg-type]
        seed=[1, 2],  # type: ignore[arg-type]
        temperature=1,
    )
    bias[3] = 2
    words.append([4])
    assert dict(options.logit_bias) == {3: 1.0}
    assert options.bad_words == ((1, 2), (3,))
    assert options.stop == ("end",) and options.stop_tokens == (0, 1) and options.seed == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.n = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        options.logit_bias[3] = 5.0  # type: ignore[index]
    assert dataclasses.replace(options, n=2).bad_words == options.bad_words


def test_seeds() -> None:
    assert Options(seed=5).seeds_of(3) == (5, 5, 5)
    assert Options(seed=(1, 2)).seeds_of(2) == (1, 2)
    assert Options(seed=(1,)).seeds_of(1) == (1,)
    with pytest.raises(ValueError, match=r"^seed: got .*3 prompts"):
        Options(seed=(1, 2)).seeds_of(3)


OUT_OF_LIMITS: list[tuple[str, Any]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("min_new_tokens", -1),
    ("n", 0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e-9),
    ("top_k", 0),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("typical_p", 0.0),
    ("typical_p", 2),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("presence_penalty", math.inf),
    ("frequency_penalty", math.nan),
    ("no_repeat_ngram", -1),
    ("bad_words", [[]]),
    ("bad_words", [[-1]]),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {-1: 0.0}),
    ("suppress_tokens", [-2]),
    ("forced_tokens", {0: -1}),
    ("beams", 0),
    ("beam_groups", 0),
    ("diversity_penalty", -1.0),
    ("early_stopping", "always"),
    ("early_stopping", 1),
    ("stop", [""]),
    ("stop_tokens", [-1]),
    ("seed", -1),
    ("seed", 1 << 64),
    ("seed", (0, -1)),
    ("logprobs", -1),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_LIMITS)
def test_out_of_limits(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        Options(**{name: value})


WRONG_TYPES: list[tuple[str, Any]] = [
    ("max_new_tokens", 1.0),
    ("max_new_tokens", None),
    ("max_new_tokens", True),
    ("temperature", "hot"),
    ("top_k", 5.0),
    ("top_p", "0.9"),
    ("repetition_penalty", None),
    ("bad_words", "word"),
    ("bad_words", ["word"]),
    ("bad_words", [3]),
    ("bad_words", [[1.0]]),
    ("logit_bias", [(1, 2.0)]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {1: "a"}),
    ("suppress_tokens", "a"),
    ("suppress_tokens", 3),
    ("forced_tokens", [3]),
    ("forced_tokens", {"0": 3}),
    ("forced_tokens", {0: "a"}),
    ("stop", 3),
    ("stop", [3]),
    ("stop_tokens", 3),
    ("stop_tokens", ["a"]),
    ("seed", "a"),
    ("seed", 1.5),
    ("seed", [True]),
    ("logprobs", True),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: got "):
        Options(**{name: value})


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": 0.7, "beams": 4}),
    ("top_k", {"top_k": 5}),
    ("top_k", {"top_k": 5, "temperature": 0.0}),
    ("top_p", {"top_p": 0.9}),
    ("min_p", {"min_p": 0.1}),
    ("typical_p", {"typical_p": 0.9, "beams": 2}),
    ("n", {"n": 2}),
    ("n", {"n": 2, "temperature": 0}),
    ("n", {"n": 5, "beams": 4}),
    ("beam_groups", {"beams": 4, "beam_groups": 3, "diversity_penalty": 1.0}),
    ("beam_groups", {"beams": 2, "beam_groups": 4, "diversity_penalty": 1.0}),
    ("beam_groups", {"beam_groups": 2}),
    ("diversity_penalty", {"diversity_penalty": 1.0}),
    ("diversity_penalty", {"beams": 4, "diversity_penalty": 1.0}),
    ("diversity_penalty", {"beams": 4, "beam_groups": 2}),
    ("length_penalty", {"length_penalty": 0.8}),
    ("length_penalty", {"length_penalty": 0.8, "temperature": 1.0}),
    ("early_stopping", {"early_stopping": True}),
    ("early_stopping", {"early_stopping": "never"}),
    ("min_new_tokens", {"min_new_tokens": 5, "max_new_tokens": 4}),
    ("forced_tokens", {"forced_tokens": {4: 1}, "max_new_tokens": 4}),
    ("forced_tokens", {"forced_tokens": {-2: 1}}),
    ("forced_tokens", {"forced_tokens": {0: 1}, "suppress_tokens": [1]}),
    ("forced_tokens", {"forced_tokens": {-1: 1, 3: 2}, "max_new_tokens": 4}),
]


@pytest.mark.parametrize(("name", "knobs"), CONTRADICTIONS)
def test_contradictions(name: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        Options(**knobs)


ALLOWED: list[dict[str, Any]] = [
    {"temperature": 1, "top_k": 1, "top_p": 1, "min_p": 0, "typical_p": 1, "n": 3},
    {"beams": 6, "beam_groups": 3, "diversity_penalty": 0.5, "n": 6, "length_penalty": -1.0},
    {"beams": 2, "early_stopping": "never", "temperature": 0.0},
    {"forced_tokens": {-1: 2, 3: 2}, "max_new_tokens": 4, "min_new_tokens": 4},
    {"logit_bias": {1: -math.inf}, "presence_penalty": -2, "repetition_penalty": 0.5},
    {"seed": (1 << 64) - 1, "logprobs": 0, "stop_tokens": ()},
]


@pytest.mark.parametrize("knobs", ALLOWED)
def test_allowed(knobs: dict[str, Any]) -> None:
    Options(**knobs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {7: 1.0}),
        ("bad_words", [[1, 2], [3, 7]]),
        ("forced_tokens", {0: 8}),
        ("suppress_tokens", [0, 7]),
        ("stop_tokens", [9]),
        ("logprobs", 8),
    ],
)
def test_vocabulary(name: str, value: Any) -> None:
    options = Options(**{name: value})
    options.check_vocabulary(10)
    with pytest.raises(ValueError, match=rf"^{name}: got .*vocabulary has 7"):
        options.check_vocabulary(7)
