"""Logits from a cache are those of the model without one, whatever else is in the cache and in the call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numerics
import pytest
import torch
from conftest import at_threads
from generation_cases import large
from hf_cases import build, small_models, tokens
from torch import Tensor

import pyfuse
from pyfuse.backends import cpu
from pyfuse.generation.runner import CacheFull, Runner
from pyfuse.models import _memory, stock
from pyfuse.models.cache import PagedCache
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.rows import Rows
from pyfuse.models.transformer import Config, Transformer

SIZES: dict[str, Any] = {"vocabulary": 31, "width": 24, "layers": 2, "heads": 4, "hidden": 40}
LLAMA: dict[str, Any] = {
    "position": "rope", "norm": "rms", "activation": "silu", "gated": True, "kv_heads": 2, "tied": False,
    "attention_bias": False, "hidden_bias": False,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "gpt2": Config(**SIZES, max_positions=128),
    "llama": Config(**SIZES, **LLAMA, head_dim=10),
    "scaled": Config(**SIZES, **LLAMA | {"kv_heads": 1}, rope_scaling=SCALED),
    "mistral": Config(**SIZES, **LLAMA, window=7),
    "sinusoidal": Config(**SIZES, position="sinusoidal", norm_first=False, embedding_norm=True),
    "bart": Config(
        **SIZES, encoder_layers=1, norm_first=False, embedding_norm=True, activation="gelu", head_bias=True
    ),
    "t5": Config(
        **SIZES, encoder_layers=2, position="relative", buckets=8, max_distance=16, attention_scale=1.0, norm="rms",
        activation="relu", attention_bias=False, hidden_bias=False, head_scale=0.2,
    ),
}  # fmt: skip
PAIRS = ["bart", "t5"]
__all__ = ["small_models"]  # one thread: products are small
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SOURCE, LENGTH = [3, 1, 4, 1, 5, 9, 2], 61
TEXT = [int(i) for i in torch.randint(31, (LENGTH,), generator=torch.Generator().manual_seed(5))]


def made(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return large(CONFIGS[name]).to(dtype)


@pytest.fixture(autouse=True, params=[None, False], ids=["chosen", "modules"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with the compiled step where it can run, and with the model's modules."""
    monkeypatch.setitem(DEFAULTS, "kernel", request.param)


DEFAULTS: dict[str, Any] = {"max_tokens": 80, "sequences": 4, "page_size": 4, "chunk": 16}


def runner_of(model: Transformer, **options: Any) -> Runner:
    return Runner(model, **DEFAULTS | options)


def begin(runner: Runner, prompt: list[int], source: list[int] = SOURCE) -> Any:
    memory = None if runner.model.encoder is None else runner.encode(source)
    return runner.begin(prompt, memory)


def started(runner: Runner, prompt: list[int]) -> tuple[Any, Tensor]:
    """A slot with this prompt, and the logits after it."""
    slot = begin(runner, prompt)
    return slot, runner.forward([(slot, prompt[slot.length :])])[0]


def in_parts(runner: Runner, text: list[int], sizes: list[int]) -> Tensor:
    """Logits of all tokens, which come in parts of these sizes."""
    slot, found, at = begin(runner, text[: sizes[0]]), [], 0
    for size in sizes:
        found.append(runner.forward([(slot, text[at : at + size])], every=True))
        at += size
    assert slot.tokens == text and slot.length == at
    return torch.cat(found)


def uncached(model: Transformer, text: list[int]) -> Tensor:
    with torch.no_grad():
        memory = {} if model.encoder is None else {"memory": model.encode(torch.tensor([SOURCE]))}
        y: Tensor = model(torch.tensor([text]), **memory)[0]
    return y if y.dtype == torch.float64 else y.float()


def on_torch(model: Transformer, dtype: torch.dtype) -> Transformer:
    other = Transformer(model.config, stock).eval()
    other.load_state_dict(model.state_dict())
    return other.to(dtype)


# ---- the same logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_without_a_cache(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype)
    exact = uncached(copy.deepcopy(model).double(), TEXT)
    eager = exact if dtype == torch.float64 else uncached(on_torch(model, dtype), TEXT)
    for sizes in ([1] * LENGTH, [LENGTH], [33, 1, 1, 5, 21], [7, 3, 17, 1, 16, 1, 15, 1]):
        actual = in_parts(runner_of(model), TEXT, sizes)
        numerics.check(actual, exact, eager, f"{name} in parts of {sizes}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bart", "t5"])
def test_logits_are_those_of_hugging_face(name: str) -> None:
    theirs = build(name)
    runner = Runner(from_pretrained(theirs), page_size=8, sequences=2, max_tokens=64)
    ids = tokens(1, 40)
    arguments, memory = {"input_ids": ids}, None
    if name in PAIRS:
        arguments |= {"decoder_input_ids": ids, "input_ids": tokens(1, 9, seed=2)}
        memory = runner.encode(arguments["input_ids"][0].tolist())
    slot, text = runner.begin(ids[0, :21].tolist(), memory), ids[0].tolist()
    found = [runner.forward([(slot, text[:21])], every=True)]
    found += [runner.forward([(slot, [token])]) for token in text[21:]]
    with torch.no_grad():
        eager = theirs(**arguments).logits[0]
        exact = copy.deepcopy(theirs).double()(**arguments).logits[0]
    numerics.check(torch.cat(found), exact, eager, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_last_logits_are_asked_for(name: str) -> None:
    runner = runner_of(made(name))
    every = in_parts(runner, TEXT, [40, 1, 3, 17])
    slot, logits = started(runner_of(runner.model), TEXT[:40])
    numerics.assert_bitwise_equal(logits, every[39], name)
    assert slot.length == 40 and logits.dtype == torch.float32
    assert runner.forward([]).shape == (0, 31)


def test_sequences_may_be_longer_than_what_rope_was_made_for() -> None:
    config = Config(**SIZES, **LLAMA, max_positions=16)
    model = Transformer(config).eval()
    longer = Transformer(Config(**vars(config) | {"max_positions": 80})).eval()
    longer.load_state_dict(model.state_dict())
    actual = in_parts(runner_of(model), TEXT, [10, 1, 50])
    numerics.assert_bitwise_equal(actual, in_parts(runner_of(longer), TEXT, [10, 1, 50]), "rope")


# ---- no sequence depends on the others -----------------------------------------------------------


def steps_of(runner: Runner, texts: list[list[int]], counts: list[int], at_once: bool) -> list[Tensor]:  # fmt: skip
    """Logits [T, V] of the last tokens of each text, counts[i] of text i in a step; all texts in one call, or not."""
    prompts = [len(text) - 3 * count for text, count in zip(texts, counts, strict=True)]
    slots = [begin(runner, t[:n], SOURCE[n % 5 :]) for t, n in zip(texts, prompts, strict=True)]
    work = [(s, t[s.length : n]) for s, t, n in zip(slots, texts, prompts, strict=True)]
    found: list[list[Tensor]] = [[] for _ in texts]

    def run(work: list[tuple[Any, list[int]]], every: bool) -> None:
        calls = [work] if at_once else [[each] for each in work]
        y = torch.cat([runner.forward(call, every) for call in calls])
        for rows, part in zip(found, y.split([len(t) if every else 1 for _, t in work]), strict=True):  # fmt: skip
            rows.append(part)

    run(work, False)
    for _ in range(3):
        run(
            [(s, t[s.length : s.length + c]) for s, t, c in zip(slots, texts, counts, strict=True)],
            True,
        )
    for slot in slots:
        runner.end(slot)
    return [torch.cat(rows) for rows in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bits_of_a_sequence_are_its_own(name: str, dtype: torch.dtype) -> None:
    """Long and short ones, that go on by one token or several, alone and together."""
    model = made(name, dtype)
    texts = [TEXT[:n][::-1] for n in (61, 5, 17, 40, 33, 8)]
    for counts in ([1] * 6, [1, 1, 4, 2, 1, 2]):
        together, alone = (
            steps_of(runner_of(model, sequences=6), texts, counts, at_once)
            for at_once in (True, False)
        )
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            numerics.assert_bitwise_equal(a, b, f"{name}, sequence {i}")


def test_the_bits_of_a_sequence_are_its_own_on_every_isa() -> None:
    before = cpu.isa()
    try:
        for isa in cpu.available_isas():
            cpu.select_isa(isa)
            for dtype in (torch.float32, torch.bfloat16):
                test_the_bits_of_a_sequence_are_its_own("llama", dtype)
    finally:
        cpu.select_isa(before)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_the_number_of_threads_does_not_matter(name: str) -> None:
    first: list[Tensor] = []
    for _ in at_threads(1, 2, 3):
        found = steps_of(runner_of(made(name)), [TEXT, TEXT[:30][::-1]], [1, 2], True)
        for a, b in zip(first, found, strict=False):
            numerics.assert_bitwise_equal(a, b, name)
        first = first or found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bart"])
def test_a_common_beginning_is_computed_once(name: str, dtype: torch.dtype) -> None:
    """And what comes after it has the bits that it would have had alone."""
    model = made(name, dtype)
    prompts = [TEXT[:57], [*TEXT[:40], 1, 2, 3], TEXT[:57], [*TEXT[:44], 7], TEXT[:8]]
    alone = [started(runner_of(model), prompt)[1] for prompt in prompts]
    memory = None if model.encoder is None else runner_of(model).encode(SOURCE)
    for at_once in (True, False):
        runner = runner_of(model, sequences=5)
        slots = []
        if at_once:
            slots = [runner.begin(prompt, memory) for prompt in prompts]
            found = runner.forward(list(zip(slots, prompts, strict=True)))
        else:
            rows = []
            for prompt in prompts:
                slots.append(runner.begin(prompt, memory))
                rows.append(runner.forward([(slots[-1], prompt[slots[-1].length :])]))
            found = torch.cat(rows)
        assert runner.computed == 57 + 3 + 1 + 1 + 4
        for actual, expected in zip(found, alone, strict=True):
            numerics.assert_bitwise_equal(actual, expected, name)
        assert [slot.tokens for slot in slots] == prompts
        for slot in slots:
            runner.end(slot)
        assert runner.cache.pages_in_use == 0 and runner.cache.pages_kept > 0
        slot = runner.begin(prompts[0], memory)
        assert slot.length == 56 and runner.cache.pages_kept < 57 // 4 + 3


def test_a_later_part_is_computed_as_if_nobody_knew_it() -> None:
    model, found = made("gpt2"), []
    for others in (False, True):
        runner = runner_of(model)
        slot, _ = started(runner, TEXT[:8])
        if others:
            started(runner, TEXT)
        found.append(runner.forward([(slot, TEXT[8:50])]))
    numerics.assert_bitwise_equal(*found, "later part")


def test_every_logit_is_computed_when_asked_for() -> None:
    runner = runner_of(made("gpt2"))
    started(runner, TEXT)
    slot = runner.begin(TEXT[:1])
    assert runner.forward([(slot, TEXT[:50])], every=True).shape == (50, 31)
    other = runner.begin(TEXT[:50])
    assert other.length == 48


@pytest.mark.parametrize("name", CONFIGS)
def test_forks_and_rewound_sequences_go_on_as_new_ones(name: str) -> None:
    model = made(name)
    runner, plain = runner_of(model), runner_of(model)
    slot, _ = started(runner, TEXT[:30])
    forks = [runner.fork(slot) for _ in range(2)]
    runner.forward([(forks[0], [1]), (forks[1], [2]), (slot, [3])])
    runner.forward([(forks[0], [4, 5]), (slot, [6])])
    runner.rewind(forks[0], 31)
    runner.rewind(slot, 31)
    actual = runner.forward([(forks[0], [7]), (slot, [7]), (forks[1], [7])])
    for i, token in enumerate((1, 3, 2)):
        other = begin(plain, TEXT[:30])
        plain.forward([(other, TEXT[other.length : 30])])
        plain.forward([(other, [token])])
        expected = plain.forward([(other, [7])])
        numerics.assert_bitwise_equal(actual[i : i + 1], expected, f"{name}, {token}")
        plain.end(other)
    for each in (slot, *forks):
        runner.end(each)
    assert runner.cache.pages_in_use == 0


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["model", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_what_memory_held_before_does_not_matter(name: str, cache: str) -> None:
    model, found = made(name), []
    for value in (float("nan"), 1e4):
        runner = runner_of(model, cache=cache)
        for tensor in runner.cache._tensors():
            tensor.fill_(value if tensor.is_floating_point() else 99)
        found.append(in_parts(runner, TEXT, [20, 1, 9, 31]))
    assert found[0].isfinite().all()
    numerics.assert_bitwise_equal(*found, name)


def test_a_window_takes_no_more_memory_the_longer_a_sequence_is() -> None:
    runner = Runner(made("mistral"), max_tokens=1000, page_size=4, chunk=16)
    assert runner.cache.pages.total == -(-(6 + 16 + 4) // 4)
    slot, _ = started(runner, TEXT)
    for step in range(100):
        runner.forward([(slot, [step % 31])])
        assert runner.cache.pages_in_use <= 3
    runner.end(slot)
    assert runner.cache.pages_in_use == 0


def test_forks_of_a_window_go_on_together() -> None:
    runner = Runner(made("mistral"), max_tokens=1000, sequences=3, page_size=4, chunk=16)
    slot, _ = started(runner, TEXT)
    slots = [slot, runner.fork(slot), runner.fork(slot)]
    for step in range(40):
        runner.forward([(s, [(step + i) % 31]) for i, s in enumerate(slots)])
        assert runner.cache.pages_in_use <= 9
    runner.forward([(s, TEXT[:20]) for s in slots])


def test_beams_take_little_more_memory_than_one() -> None:
    runner = runner_of(made("gpt2"), sequences=2)
    slot, _ = started(runner, TEXT)
    beams = [slot, *(runner.fork(slot) for _ in range(3))]
    assert runner.cache.pages_in_use == 16
    for step in range(5):
        runner.forward([(beam, [step + i]) for i, beam in enumerate(beams)])
    assert runner.cache.pages_in_use == 15 + 4 * 2


def test_a_full_cache_appends_nothing() -> None:
    runner = runner_of(made("gpt2"), max_tokens=40, sequences=1)
    slot, _ = started(runner, TEXT[:30])
    other = runner.begin([1])
    with pytest.raises(CacheFull, match="room for 10 more tokens of these 2 sequences, but 13 are"):
        runner.forward([(slot, [1, 2, 3]), (other, TEXT[:10])])
    assert (slot.length, other.length) == (30, 0)
    with pytest.raises(CacheFull, match="of 30 tokens has room for 10 more, but 11 are wanted"):
        runner.forward([(slot, [1] * 11)])
    runner.forward([(slot, [1] * 10)])
    with pytest.raises(CacheFull, match="room for 0 more"):
        runner.forward([(other, [1])])
    runner.end(slot)
    runner.forward([(other, [1])])


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "available_bytes", lambda device: 10**6)
    model = made("llama")
    with pytest.raises(MemoryError, match=r"80000000 pages .* but 1000000 are available on cpu"):
        Runner(model, max_tokens=80, page_size=1, sequences=10**6)


def test_the_memory_of_an_encoder_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made("bart"), []
    stock_keys = model.memory_keys
    monkeypatch.setattr(model, "memory_keys", lambda m: calls.append(m.shape) or stock_keys(m))
    runner = runner_of(model)
    memory = runner.encode(SOURCE)
    assert memory.shape == (1, 7, 24)
    slots = [runner.begin([1], memory), runner.begin([2], memory)]
    slots.append(runner.fork(slots[0]))
    assert len(calls) == 1 and all(slot.memory is slots[0].memory for slot in slots)
    padded = torch.cat((memory[0], torch.full((3, 24), torch.nan)))
    same = runner.begin([1], padded, memory_length=7)
    assert calls == [(1, 7, 24)] * 2
    y = runner.forward([(slots[0], [1]), (same, [1])])
    numerics.assert_bitwise_equal(y[0], y[1], "padded")
    other = runner.begin(TEXT[:9], runner.encode([5]))
    runner.forward([(other, TEXT[:9])])
    assert (
        runner.begin(TEXT[:9], memory).length == 0
    )  # the text is the same, but what it looks at is not


def test_progress_is_told() -> None:
    runner, told = runner_of(made("gpt2")), []
    slot, other = runner.begin(TEXT[:40]), runner.begin([3, 3])
    runner.forward(
        [(slot, TEXT[:40]), (other, [3, 3])],
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(16, 42), (32, 42), (40, 42), (42, 42)]


# ---- int8 ----------------------------------------------------------------------------------------


def test_int8_is_attention_of_rounded_keys_and_values() -> None:
    """Of what the cache says that it holds, for prompts and tokens after them, alone and in a batch."""
    cache = PagedCache(1, 2, 5, 30, page_size=4, quantized=True, window=11)
    slots = [cache.new([1]), cache.new([2])]
    slots[1].prompt = 19
    for counts in ([19, 19], [3, 3], [1, 2], [1, 1]):
        n = sum(counts)
        q, k, v = torch.randn(1, 4, n, 5), torch.randn(1, 2, n, 5), torch.randn(1, 2, n, 5)
        rows = Rows(cache, slots, counts)
        o, at = rows.attend(0, q, k, v, 11, 0.3), 0
        for slot, count in zip(slots, counts, strict=True):
            kept = cache.gather(0, slot, slot.length + count)
            new = [x[0, :, at : at + count] for x in (k, v)]
            for a, b in zip(kept, new, strict=True):
                assert ((a[0, :, -count:] - b).abs() <= b.abs().amax(-1, True) / 253).all()
                assert not torch.equal(a[0, :, -count:], b)
            arguments = [q[:, :, at : at + count], *kept]
            exact, eager = (
                pyfuse.attention(
                    *(t.to(d) for t in arguments),
                    causal=True,
                    window=11,
                    scale=0.3,
                    backend="eager",
                )
                for d in (torch.float64, torch.float32)
            )
            numerics.check(o[:, :, at : at + count], exact, eager, f"{counts}")
            at += count
            cache.commit(slot, [slot.length] * count)


@pytest.mark.parametrize("name", CONFIGS)
def test_int8_changes_logits_little(name: str) -> None:
    model = made(name)
    exact = uncached(model, TEXT)
    runner = runner_of(model, cache="int8")
    assert runner.cache.k.dtype == torch.int8
    error = (in_parts(runner, TEXT, [33, 1, 1, 5, 21]) - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.02
    a, b = steps_of(runner, [TEXT, TEXT[:30]], [1, 2], True), steps_of(runner, [TEXT], [1], True)
    numerics.assert_bitwise_equal(a[0], b[0], name)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda r: r.begin([]), "prompt: empty"),
        (lambda r: r.begin([1, 31]), "prompt: unknown id 31, the model has 0 … 30"),
        (lambda r: r.begin([-1]), "prompt: unknown id -1"),
        (lambda r: r.begin([1] * 81), "prompt: 81 tokens, but 80 are allowed"),
        (lambda r: r.begin([1], torch.zeros(1, 3, 24)), "memory: needed with an encoder"),
        (lambda r: r.encode([1]), "encode: the model has no encoder"),
        (lambda r: r.forward([(r.begin([1]), [])]), "work: a slot without tokens"),
        (lambda r: r.forward([(r.begin([1]), [99])]), "work: unknown id 99"),
        (lambda r: r.forward([(r.begin([1]), [1])] * 2), "slot: comes twice"),
        (lambda r: r.rewind(r.begin([1]), 1), "length: got 1, the sequence has 0"),
    ],
)
def test_errors_of_calls(call: Callable[[Runner], Any], text: str) -> None:
    runner = runner_of(made("gpt2"))
    with pytest.raises(ValueError, match=text):
        call(runner)
    assert runner.computed == 0


def test_errors_of_a_slot_that_has_ended() -> None:
    runner = runner_of(made("gpt2"))
    slot, _ = started(runner, TEXT[:5])
    runner.end(slot)
    for call in (runner.end, runner.fork, lambda s: runner.forward([(s, [1])])):
        with pytest.raises(ValueError, match="slot: the sequence has ended"):
            call(slot)


def test_errors_of_a_memory() -> None:
    runner = runner_of(made("bart"))
    with pytest.raises(ValueError, match="memory: needed with an encoder"):
        runner.begin([1])
    with pytest.raises(ValueError, match="ids: empty"):
        runner.encode([])
    with pytest.raises(ValueError, match="ids: unknown id 31"):
        runner.encode([31])
    for shape in ((2, 3, 24), (1, 3, 20), (24,)):
        with pytest.raises(ValueError, match=r"memory: expected \[S, 24\] or \[1, S, 24\], got"):
            runner.begin([1], torch.zeros(shape))
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"memory_length: got {length}, the memory has 3"):
            runner.begin([1], torch.zeros(3, 24), memory_length=length)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"sequences": 0}, "sequences: expected a positive number, got 0"),
        ({"chunk": 0}, "chunk: expected a positive number"),
        ({"page_size": 0}, "page_size: expected a positive number"),
        ({"max_tokens": 0}, "max_tokens: expected a positive number"),
        ({"max_tokens": 129}, "max_tokens: got 129, the model has 128 positions"),
        ({"cache": "int4"}, "cache: got 'int4', needs 'model' or 'int8'"),
    ],
)
def test_errors_of_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        runner_of(made("gpt2"), **options)
    assert Runner(made("gpt2")).max_tokens == 128


def test_errors_of_models() -> None:
    with pytest.raises(ValueError, match=r"computes by torch's functions \(stock\)"):
        Runner(on_torch(made("gpt2"), torch.float32))
    with pytest.raises(ValueError, match="needs a causal one with the head 'lm', got causal=False"):
        Runner(Transformer(Config(**SIZES, causal=False)).eval())
    with pytest.raises(ValueError, match="head=None"):
        Runner(Transformer(Config(**SIZES, head=None)).eval())
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    model = Transformer(Config(**SIZES, **LLAMA, rope_scaling=dynamic, max_positions=64)).eval()
    with pytest.raises(ValueError, match="max_tokens: got 65, the model has 64 positions"):
        Runner(model, max_tokens=65)
    runner = Runner(model)
    model.train()
    with pytest.raises(ValueError, match="model: is in training mode"):
        runner.forward([(runner.begin([1]), [1])])
