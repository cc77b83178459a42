"""Greedy decoding and sampling: tokens, text, ends, log-probabilities, streams, and what is given back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from generation_cases import (  # noqa: F401 (one_thread is a fixture)
    CONTEXT,
    RecomputeRunner,
    V,
    mini,
    one_thread,
    prompts_of,
)

from pyfuse.generation import Options, Piece, Result, generate, stream
from pyfuse.generation.loop import Chooser
from pyfuse.generation.runner import CacheFull, Runner
from pyfuse.generation.sequence import Row
from pyfuse.models.transformer import Transformer

PROMPTS = prompts_of(9, 1, 4, 33)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 1.3, "top_p": 0.9, "n": 3, "seed": (5, 6, 7, 8)},
    "beams": {"beams": 4, "n": 2},
    "diverse": {"beams": 4, "beam_groups": 2, "diversity_penalty": 0.7, "n": 3},
}
SAMPLING: dict[str, Any] = {"temperature": 1.5, "n": 2}
MODELS = ("gpt2", "llama", "encoder-decoder", "t5")


def start_of(model: Transformer) -> dict[str, Any]:
    return {"decoder_start": (1, 7)} if model.config.encoder_layers else {}


def tokens_of(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


def plain_greedy(model: Transformer, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_takes_the_likeliest_token(name: str) -> None:
    model = mini(name)
    results = generate(model, PROMPTS, max_new_tokens=17)
    assert tokens_of(results) == [plain_greedy(model, prompt, 17) for prompt in PROMPTS]
    assert [r.prompt for r in results] == [0, 1, 2, 3]
    assert all(r.finish_reason == "length" and r.text is None for r in results)
    assert all(r.score is None and r.logprobs is None for r in results)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(name: str, way: str) -> None:
    model = mini(name)
    oracle = RecomputeRunner(model)
    knobs = {"max_new_tokens": 14, **WAYS[way], **start_of(model)}
    free = tokens_of(generate(oracle, PROMPTS, **knobs))
    knobs["stop_tokens"] = {free[0][4], free[-1][9]}
    expected = generate(oracle, PROMPTS, **knobs)
    results = generate(Runner(model, sequences=16), PROMPTS, **knobs)
    assert tokens_of(results) == tokens_of(expected)
    assert [r.finish_reason for r in results] == [r.finish_reason for r in expected]
    assert "stop_token" in {r.finish_reason for r in results}
    assert not oracle.alive


@pytest.mark.parametrize("name", MODELS)
def test_a_text_does_not_depend_on_the_batch(name: str) -> None:
    model = mini(name)
    knobs = {"max_new_tokens": 12, **SAMPLING, **start_of(model)}
    seeds = (11, 2**40, 0, 2**64 - 1)
    alone = [generate(model, p, seed=s, **knobs) for p, s in zip(PROMPTS, seeds, strict=True)]
    together = generate(model, PROMPTS, seed=seeds, **knobs)
    assert tokens_of(together) == [t for results in alone for t in tokens_of(results)]
    backwards = generate(model, PROMPTS[::-1], seed=seeds[::-1], **knobs)
    assert tokens_of(backwards) == [t for results in alone[::-1] for t in tokens_of(results)]
    narrow = Runner(model, sequences=2)  # no room for all: some wait
    assert tokens_of(generate(narrow, PROMPTS, seed=seeds, **knobs)) == tokens_of(together)


def test_a_text_does_not_depend_on_the_number_of_threads() -> None:
    model, texts = mini("llama"), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = generate(model, PROMPTS, max_new_tokens=12, top_p=0.8, **SAMPLING)
        texts.append(tokens_of(results))
    assert texts[0] == texts[1] == texts[2]


def test_seeds() -> None:
    model, prompt = mini("gpt2"), PROMPTS[0]
    knobs: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5}
    three = tokens_of(generate(model, prompt, n=3, seed=4, **knobs))
    assert len({tuple(t) for t in three}) == 3
    assert tokens_of(generate(model, prompt, n=1, seed=4, **knobs)) == three[:1]
    assert tokens_of(generate(model, [prompt, prompt], seed=4, **knobs)) == [three[0]] * 2
    other = tokens_of(generate(model, [prompt, prompt], seed=(4, 5), **knobs))
    assert other[0] == three[0] != other[1]


@pytest.mark.parametrize("name", MODELS)
def test_top_k_of_one_is_greedy(name: str) -> None:
    model = mini(name)
    knobs = {"max_new_tokens": 12, **start_of(model)}
    greedy = generate(model, PROMPTS, **knobs)
    assert generate(model, PROMPTS, temperature=5.0, top_k=1, seed=9, **knobs) == greedy
    assert generate(model, PROMPTS, temperature=0.0, **knobs) == greedy


def test_the_prompt_of_several_sequences_is_computed_once() -> None:
    model, new = mini("llama"), 6
    runner = Runner(model, sequences=8)
    generate(runner, PROMPTS[3], n=5, temperature=1.0, max_new_tokens=new)
    assert runner.computed == len(PROMPTS[3]) + 5 * (new - 1)
    oracle = RecomputeRunner(model)
    generate(oracle, PROMPTS[0], n=2, temperature=1.0, max_new_tokens=3)
    assert oracle.calls == [[(0, 9)], [(9, 1), (9, 1)], [(10, 1), (10, 1)]]


def test_prompts_wait_for_room_and_join_when_there_is_some() -> None:
    model = mini("gpt2")
    oracle = RecomputeRunner(model, sequences=2)  # its pages are as long as the context
    ends = [plain_greedy(model, p, 9)[i] for p, i in zip(PROMPTS, (2, 8, 5, 3), strict=True)]
    results = generate(oracle, PROMPTS, max_new_tokens=9, stop_tokens=ends)
    assert results == generate(model, PROMPTS, max_new_tokens=9, stop_tokens=ends)
    assert max(len(call) for call in oracle.calls) == 2 and not oracle.alive
    assert any({(0, 4), (0, 33)} & set(call) and len(call) == 2 for call in oracle.calls[1:])


def test_models_in_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = mini("llama").to(dtype)
        assert tokens_of(generate(model, PROMPTS[0], max_new_tokens=5)) == [
            plain_greedy(model, PROMPTS[0], 5)
        ]


def test_rows_of_several_options_choose_together() -> None:
    """As an engine has them."""
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [Options(), Options(temperature=1.0, logprobs=1), Options(suppress_tokens=range(90))]
    rows = [
        Row(i, 0, PROMPTS[i], options=kinds[kind], stop_tokens=frozenset(), limit=60, seed=(3, 0))
        for i, kind in enumerate((1, 0, 2, 1))
    ]
    tokens, logprobs = Chooser(rows)(logits)
    for i, row in enumerate(rows):
        assert Chooser([row])(logits[i : i + 1]) == ([tokens[i]], [logprobs[i]])
    assert tokens[1] == logits[1].argmax() and tokens[2] >= 90
    assert [p is None for p in logprobs] == [False, True, True, False]


# ---- prompts -------------------------------------------------------------------------------------


def test_ways_to_write_prompts() -> None:
    model, prompt = mini("gpt2"), PROMPTS[0]
    expected = generate(model, [prompt], max_new_tokens=3)
    tensor = torch.tensor(prompt)
    for same in (prompt, tuple(prompt), tensor, tensor[None], [tensor]):
        assert generate(model, same, max_new_tokens=3) == expected
    assert generate(model, []) == []
    assert generate(model, torch.tensor([prompt, prompt]), max_new_tokens=3)[1].prompt == 1


def test_the_context_ends_a_text() -> None:
    model = mini("gpt2")
    lengths = (CONTEXT - 1, CONTEXT - 5, 3)
    results = generate(model, prompts_of(*lengths), max_new_tokens=20)
    assert [len(r.tokens) for r in results] == [1, 5, 20]
    assert all(r.finish_reason == "length" for r in results)
    short = Runner(model, max_tokens=40, sequences=2)
    assert len(generate(short, PROMPTS[3], max_new_tokens=20)[0].tokens) == 7
    forced = generate(model, prompts_of(*lengths), max_new_tokens=20, forced_tokens={-1: 7, 3: 9})
    assert [r.tokens[-1] for r in forced] == [7, 7, 7]
    assert [9 in r.tokens[3:4] for r in forced] == [False, True, True]
    beams = generate(model, prompts_of(*lengths), max_new_tokens=20, beams=2)
    assert [len(r.tokens) for r in beams] == [1, 5, 20]


def test_relative_positions_have_no_end() -> None:
    model = mini("t5")
    prompt = prompts_of(CONTEXT + 9)[0]
    results = generate(model, prompt, decoder_start=1, max_new_tokens=CONTEXT + 5)
    assert len(results[0].tokens) == CONTEXT + 5


@pytest.mark.parametrize(
    ("prompts", "knobs", "message"),
    [
        ([[]], {}, r"prompts\[0\]: empty"),
        ([[3], []], {}, r"prompts\[1\]: empty"),
        ([[3, V]], {}, rf"prompts\[0\]: got token {V}, the vocabulary has {V}"),
        ([[-1]], {}, r"prompts\[0\]: got token -1"),
        (
            [[3] * CONTEXT],
            {},
            rf"prompts\[0\]: {CONTEXT} tokens with none left .* context is {CONTEXT}",
        ),
        ("text", {}, "prompts: a text needs a tokenizer"),
        ([[3], "text"], {}, r"prompts\[1\]: a text needs a tokenizer"),
        ([[3]], {"stop": ("x",)}, "stop: .* tokenizer"),
        ([[3]], {"stop_tokens": (V,)}, "stop_tokens: got token"),
        ([[3]], {"seed": (1, 2)}, "seed: "),
        ([[3]], {"n": 2}, "n: got 2"),
        ([[3]], {"beams": 2, "temperature": 1.0}, "temperature"),
        ([[3]], {"beams": 2, "callback": print}, "callback: .* beams"),
        ([[3]], {"decoder_start": 3}, "decoder_start"),
    ],
)
def test_bad_requests(prompts: Any, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(mini("gpt2"), prompts, **knobs)


def test_bad_requests_of_an_encoder_and_its_decoder() -> None:
    model = mini("encoder-decoder")
    for knobs, message in (
        ({}, "decoder_start: needed"),
        ({"decoder_start": ()}, "decoder_start"),
        ({"decoder_start": V}, f"decoder_start: got token {V}"),
        ({"decoder_start": [1] * CONTEXT}, "decoder_start: .* context"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, [[3]], **knobs)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .* context"):
        generate(model, [[3] * (CONTEXT + 1)], decoder_start=1)


def test_prompts_of_another_type() -> None:
    for prompts in ([3.0], [[True]], [None], torch.tensor([1.0]), 7, [[3.0]], [torch.tensor(3)]):
        with pytest.raises(TypeError, match="prompts"):
            generate(mini("gpt2"), prompts)
    with pytest.raises(TypeError, match="model: got Linear"):
        generate(torch.nn.Linear(2, 2), [[3]])  # type: ignore[arg-type]


def test_a_runner_without_room_for_a_prompt() -> None:
    runner = Runner(mini("gpt2"), max_tokens=32, sequences=2, page_size=8)
    with pytest.raises(CacheFull, match=r"prompts\[0\]: 3 sequences of up to 31 tokens need"):
        generate(runner, [[3], [4] * 8], n=3, temperature=1.0, max_new_tokens=30)
    assert runner.cache.pages_in_use == 0


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_nan(way: str) -> None:
    model = mini("gpt2")
    with torch.no_grad():
        model.decoder.norm.bias[0] = math.nan
    runner = Runner(model, sequences=16)
    with pytest.raises(ValueError, match=r"logits: NaN"):
        generate(runner, PROMPTS, max_new_tokens=3, **WAYS[way])
    assert runner.cache.pages_in_use == 0


# ---- ends, log-probabilities ---------------------------------------------------------------------


def test_stop_tokens_end_a_text_and_are_not_in_it() -> None:
    model = mini("gpt2")
    free = tokens_of(generate(model, PROMPTS, max_new_tokens=12))
    stop = free[0][4]
    results = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=(stop,))
    for tokens, result in zip(free, results, strict=True):
        if stop in tokens:
            assert result.finish_reason == "stop_token"
            assert result.tokens == tokens[: tokens.index(stop)]
        else:
            assert result.finish_reason == "length" and result.tokens == tokens


@pytest.mark.parametrize("way", [*WAYS, "processed"])
def test_logprobs_are_the_models_own(way: str) -> None:
    """Whatever was done to the logits before a token was chosen."""
    model = mini("llama")
    knobs = WAYS.get(way, {"temperature": 0.3, "repetition_penalty": 2.0, "suppress_tokens": (9,)})
    results = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=range(5, V, 20), logprobs=3, **knobs)  # fmt: skip
    assert "stop_token" in {result.finish_reason for result in results}
    for result in results:
        prompt = PROMPTS[result.prompt]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + result.tokens])).double()[0, len(prompt) - 1 :]
        assert result.logprobs is not None and len(result.logprobs) == len(result.tokens)
        assert [each.token for each in result.logprobs] == result.tokens
        for expected, got in zip(logits.log_softmax(-1), result.logprobs, strict=False):
            best = expected.topk(3)
            assert [i for i, _ in got.top] == best.indices.tolist()
            numbers = torch.tensor([got.logprob, *(x for _, x in got.top)], dtype=torch.float64)
            assert (numbers - torch.cat([expected[[got.token]], best.values])).abs().max() < 1e-5
    chosen = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=range(5, V, 20), logprobs=0, **knobs)  # fmt: skip
    assert tokens_of(chosen) == tokens_of(results) and chosen[0].logprobs
    assert all(p.top == () for result in chosen for p in result.logprobs or ())


# ---- text ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> Any:
    from text_cases import byte_level

    from pyfuse.generation.text import Tokenizer

    return Tokenizer(byte_level())


@pytest.fixture
def speaker(tokenizer: Any) -> Transformer:
    return mini("gpt2", vocabulary=len(tokenizer.library))


def readable(tokenizer: Any) -> dict[str, Any]:
    """Options with which texts are letters, of a token each."""
    others = [i for i in range(len(tokenizer.library)) if not tokenizer.decode([i]).isalpha()]
    return {
        "tokenizer": tokenizer,
        "max_new_tokens": 12,
        "stop_tokens": (),
        "suppress_tokens": others,
    }


def test_text_and_the_tokenizers_end_tokens(tokenizer: Any, speaker: Transformer) -> None:
    prompts = ["The sky", "t"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    free = generate(speaker, ids, max_new_tokens=10)
    named = generate(speaker, prompts, tokenizer=tokenizer, max_new_tokens=10, stop_tokens=())
    assert tokens_of(named) == tokens_of(free)
    assert [r.text for r in named] == [tokenizer.decode(r.tokens) for r in free]
    tokenizer.end_tokens = (free[0].tokens[6],)
    ended = generate(speaker, prompts, tokenizer=tokenizer, max_new_tokens=10)[0]
    assert ended.finish_reason == "stop_token"
    assert ended.tokens == free[0].tokens[: free[0].tokens.index(free[0].tokens[6])]
    assert ended.text == tokenizer.decode(ended.tokens)


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings(way: str, tokenizer: Any, speaker: Transformer) -> None:
    prompts = ["The sky", "t", "a", "what is it"]
    knobs = readable(tokenizer) | WAYS[way]
    if "beams" in knobs:
        knobs["length_penalty"] = 0.0  # the first to end are the best
    free = generate(speaker, prompts, **knobs)
    text = free[0].text
    assert text is not None
    stop = text[5:8]
    results = generate(speaker, prompts, stop=("never so", stop), **knobs)
    stopped = [r for r in results if r.finish_reason == "stop_string"]
    assert stopped
    for r in stopped:
        whole = tokenizer.decode(r.tokens)
        assert stop in whole and r.text == whole[: whole.index(stop)]
        assert stop not in tokenizer.decode(r.tokens[:-1])
    assert all(stop not in (r.text or "") for r in results)
    if way in ("greedy", "sampling"):
        for r, before in zip(results, free, strict=True):
            assert before.tokens[: len(r.tokens)] == r.tokens
            assert (r.finish_reason == "stop_string") == (stop in (before.text or ""))


@pytest.mark.parametrize("way", ["greedy", "sampling"])
def test_pieces_make_up_the_results(way: str, tokenizer: Any, speaker: Transformer) -> None:
    prompts = ["The sky", "t", "a", "what is it"]
    knobs = readable(tokenizer) | {"logprobs": 1} | WAYS[way]
    first = generate(speaker, prompts, **knobs)
    assert first[1].text is not None
    knobs |= {"stop": (first[1].text[3:6],), "stop_tokens": (first[0].tokens[7],)}
    results = generate(speaker, prompts, **knobs)
    assert {r.finish_reason for r in results} >= {"stop_string", "stop_token"}
    heard: list[Piece] = []
    assert generate(speaker, prompts, callback=heard.append, **knobs) == results
    pieces = list(stream(speaker, prompts, **knobs))
    assert pieces == heard
    n = knobs.get("n", 1)
    for at, result in enumerate(results):
        mine = [p for p in pieces if (p.prompt, p.index) == (at // n, at % n)]
        assert [p.token for p in mine if p.token is not None] == result.tokens
        assert [p.logprob for p in mine if p.token is not None] == result.logprobs
        assert "".join(p.text or "" for p in mine) == result.text
        assert mine[-1].result == result and mine[-1].finish_reason == result.finish_reason
        assert all(p.result is None and p.finish_reason is None for p in mine[:-1])
        assert (mine[-1].token is None) == (result.finish_reason == "stop_token")


def test_a_stream_without_a_tokenizer() -> None:
    model = mini("llama")
    pieces = list(stream(model, PROMPTS[0], max_new_tokens=4))
    assert [p.token for p in pieces] == plain_greedy(model, PROMPTS[0], 4)
    assert [p.text for p in pieces] == [None] * 4 and pieces[-1].finish_reason == "length"
    with pytest.raises(ValueError, match="empty"):
        stream(model, [[]])  # before the first piece
    with pytest.raises(ValueError, match=r"beams: .* stream"):
        stream(model, PROMPTS, beams=2)


# ---- what is given back --------------------------------------------------------------------------


def test_nothing_is_held_after_an_interrupt() -> None:
    runner = Runner(mini("llama"), sequences=16)

    def interrupt(piece: Piece) -> None:
        if piece.prompt == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(runner, PROMPTS, callback=interrupt, **SAMPLING)
    assert runner.cache.pages_in_use == 0
    pieces = stream(runner, PROMPTS, **SAMPLING)
    next(pieces)
    assert runner.cache.pages_in_use > 0
    del pieces
    assert runner.cache.pages_in_use == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", [0, 1, 5])
def test_nothing_is_held_after_an_error(call: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    oracle = RecomputeRunner(mini("gpt2"))
    forward = oracle.forward

    def fails(work: Any) -> torch.Tensor:
        if len(oracle.calls) == call:
            raise RuntimeError("no more")
        return forward(work)

    monkeypatch.setattr(oracle, "forward", fails)
    with pytest.raises(RuntimeError, match="no more"):
        generate(oracle, PROMPTS, **WAYS[way])
    assert not oracle.alive and len(oracle.calls) == call


def test_all_pages_come_back() -> None:
    runner = Runner(mini("gpt2"), sequences=16, page_size=4)
    for knobs in WAYS.values():
        generate(runner, PROMPTS, max_new_tokens=9, stop_tokens=range(0, V, 9), **knobs)
        assert runner.cache.pages_in_use == 0
