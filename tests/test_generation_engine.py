"""Continuous batching: the same tokens as alone, who joins and leaves when, ends of every kind, many threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_stress import LETTERS, storm
from generation_cases import (  # noqa: F401 (one_thread is a fixture)
    CONTEXT,
    V,
    mini,
    one_thread,
    prompts_of,
)

from pyfuse.generation import (
    EngineClosed,
    EngineFull,
    GenerationEngine,
    Options,
    Piece,
    Result,
    generate,
    stream,
)
from pyfuse.generation.runner import CacheFull, Runner
from pyfuse.generation.streams import Stream
from pyfuse.models.transformer import Transformer

PROMPTS = prompts_of(9, 1, 4, 33, 20, 8)
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "top_p": 0.9, "n": 3, "seed": 5},
    {"temperature": 1.3, "top_p": 0.9, "seed": 6, "logprobs": 2},
    {"repetition_penalty": 1.4, "min_new_tokens": 6, "stop_tokens": range(0, V, 4)},
    {"temperature": 0.8, "typical_p": 0.8, "n": 2, "forced_tokens": {0: 3, -1: 4}},
    {"stop_tokens": range(0, V, 9), "logprobs": 0},
]
WAIT = 30.0  # seconds; for a thread that is not stuck


def runner_of(model: Transformer | str, **sizes: Any) -> Runner:
    model = mini(model) if isinstance(model, str) else model
    return Runner(model, **{"sequences": 8, "page_size": 4, "chunk": 8, **sizes})


def made(name: str) -> Transformer:
    """ "window": a llama that sees the last 9 tokens."""
    if name != "window":
        return mini(name)
    llama = mini("llama")
    model = Transformer(replace(llama.config, window=9)).eval()
    model.load_state_dict(llama.state_dict())
    return model


def start_of(model: Transformer) -> dict[str, Any]:
    return {"decoder_start": (1, 7)} if model.config.encoder_layers else {}


class Gate:
    """The model computes only when it is told to. calls: what it was given, as (tokens there, new tokens)."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self._forward, self._open = runner.forward, threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self.calls: list[list[tuple[int, int]]] = []
        self.free = False
        monkeypatch.setattr(runner, "forward", self._pass)

    def _pass(self, work: Any) -> torch.Tensor:
        self.calls.append([(slot.length, len(tokens)) for slot, tokens in work])
        self._arrived.release()
        assert self.free or self._open.acquire(timeout=WAIT)
        return self._forward(work)

    def wait(self) -> None:
        """Until the next step wants to compute."""
        assert self._arrived.acquire(timeout=WAIT)

    def step(self, steps: int = 1) -> None:
        """Let it compute, and wait until the next step wants to."""
        for _ in range(steps):
            self._open.release()
            self.wait()

    def open(self) -> None:
        self.free = True
        self._open.release()


@pytest.fixture
def gated(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[GenerationEngine, Gate]]]:
    made: list[tuple[GenerationEngine, Gate]] = []

    def make(runner: Runner, **sizes: Any) -> tuple[GenerationEngine, Gate]:
        gate = Gate(runner, monkeypatch)
        made.append((GenerationEngine(runner, **sizes), gate))
        return made[-1]

    yield make
    for engine, gate in made:
        gate.open()
        engine.close(cancel=True)


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(1e-3)


# ---- the same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [3, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "window", "encoder-decoder", "t5"])
def test_each_gets_what_it_gets_alone(name: str, sequences: int) -> None:
    model = made(name)
    start = start_of(model)
    alone = runner_of(model)
    with GenerationEngine(runner_of(model), max_sequences=sequences) as engine:
        streams = [
            engine.submit(prompt, max_new_tokens=8 + i, **start, **way)
            for i, (prompt, way) in enumerate(zip(PROMPTS * 2, (WAYS * 3)[1:], strict=False))
        ]
        found = [stream.results(WAIT) for stream in streams]
        assert engine.runner.cache.pages_in_use == 0
    for i, (prompt, way) in enumerate(zip(PROMPTS * 2, (WAYS * 3)[1:], strict=False)):
        assert found[i] == generate(alone, prompt, max_new_tokens=8 + i, **start, **way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_dtype(dtype: torch.dtype) -> None:
    model = mini("llama").to(dtype)
    with GenerationEngine(model, page_size=4, chunk=8) as engine:
        found = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
        results = [stream.result(WAIT) for stream in found]
    alone = runner_of(model)
    assert results == [generate(alone, prompt, max_new_tokens=12)[0] for prompt in PROMPTS]


def test_pieces_are_those_of_a_stream() -> None:
    model = mini("llama")
    alone = runner_of(model)
    knobs: dict[str, Any] = {"temperature": 1.4, "n": 3, "logprobs": 1, "max_new_tokens": 25}
    knobs |= {"stop": ("ab", "ci", "db"), "tokenizer": LETTERS}
    expected = [list(stream(alone, prompt, **knobs)) for prompt in PROMPTS]
    reasons = {p.finish_reason for pieces in expected for p in pieces}
    assert reasons >= {None, "stop_string", "length"}
    knobs.pop("tokenizer")
    with GenerationEngine(runner_of(model), tokenizer=LETTERS) as engine:
        streams = [engine.submit(prompt, **knobs) for prompt in PROMPTS]
        assert [list(each) for each in streams] == expected
        assert [each.finish_reason for each in streams] == [
            each.results()[0].finish_reason for each in streams
        ]
        assert all(each.done and list(each) == [] for each in streams)  # nothing comes twice
        text, tokens = (engine.submit(p, max_new_tokens=5) for p in ("bbcf", [11, 25]))
        assert text.result(WAIT) == tokens.result(WAIT)
        assert engine.submit(torch.tensor([11, 25]), max_new_tokens=5).result(WAIT) == text.result()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm(seed: int, name: str) -> None:
    reasons = storm(seed + 10, name)
    assert set(reasons) == {"length", "stop_token", "stop_string", "cancelled"}


@pytest.mark.parametrize("chunk", [8, 64])
def test_a_common_beginning_is_computed_once(chunk: int) -> None:
    runner = runner_of("llama", chunk=chunk)
    prompt = PROMPTS[3]
    with GenerationEngine(runner) as engine:
        streams = [engine.submit([*prompt, 3 + i], max_new_tokens=1) for i in range(6)]
        assert len({tuple(each.result(WAIT).tokens) for each in streams}) > 1
    assert runner.computed == len(prompt) + 1 + 5 * 2  # the pages of 32 tokens are there


# ---- steps ---------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_the_others(gated: Any) -> None:
    engine, gate = gated(runner_of("llama", chunk=8, sequences=4))
    first = engine.submit(PROMPTS[5], max_new_tokens=20)
    gate.wait()
    long = engine.submit(PROMPTS[3], max_new_tokens=4)
    short = engine.submit(PROMPTS[2], max_new_tokens=4)
    gate.step(6)
    assert gate.calls[:7] == [
        [(0, 8)],
        [(8, 1), (0, 8)],
        [(9, 1), (8, 8)],
        [(10, 1), (16, 8)],
        [(11, 1), (24, 8)],
        [(12, 1), (32, 1), (0, 4)],  # the end of one prompt leaves room for another
        [(13, 1), (33, 1), (4, 1)],
    ]
    gate.open()
    assert [len(s.result(WAIT).tokens) for s in (first, long, short)] == [20, 4, 4]
    assert all(sum(n for there, n in call if n > 1) <= 8 for call in gate.calls)


def test_sequences_wait_for_room_in_the_cache(gated: Any) -> None:
    runner = runner_of("llama", sequences=1, max_tokens=40)  # ten pages
    engine, gate = gated(runner, max_sequences=8)
    sizes = (
        12,
        12,
        12,
        20,
        1,
    )  # three, three, three, five pages and one; more than 9 are not there
    streams = [engine.submit(PROMPTS[5][:4], max_new_tokens=n - 4) for n in sizes[:4]]
    last = engine.submit([5], max_new_tokens=3)  # does not overtake the one that needs five
    gate.wait()
    until(lambda: engine.stats().waiting == 2)
    gate.step()
    assert engine.stats().running == 3 and engine.stats().waiting == 2
    gate.open()
    assert [len(each.result(WAIT).tokens) for each in streams] == [n - 4 for n in sizes[:4]]
    assert len(last.result(WAIT).tokens) == 3
    with pytest.raises(CacheFull, match="3 sequences of up to 40 tokens need 28 pages"):
        engine.submit(PROMPTS[0][:4], max_new_tokens=60, temperature=1.0, n=3)


def test_those_of_larger_priority_go_first(gated: Any) -> None:
    engine, gate = gated(runner_of("llama"), max_sequences=1)
    ended: list[int] = []
    streams = [engine.submit(PROMPTS[2], max_new_tokens=1)]
    gate.wait()
    streams += [engine.submit(PROMPTS[2], max_new_tokens=1, priority=p) for p in (0, 2, 0, 2, 1)]
    threads = [
        threading.Thread(target=lambda i=i: (streams[i].result(WAIT), ended.append(i)))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for i in range(6):
        gate.step() if i < 5 else gate.open()
        until(lambda i=i: len(ended) == i + 1)  # type: ignore[misc]
    assert ended == [0, 2, 4, 5, 1, 3]


def test_stats(gated: Any) -> None:
    engine, gate = gated(runner_of("llama"), max_sequences=4)
    first = engine.stats()
    assert (first.running, first.waiting, first.tokens, first.pages_in_use) == (0, 0, 0, 0)
    streams = [engine.submit(PROMPTS[2], max_new_tokens=9, temperature=1.0, n=3)]
    gate.wait()
    streams += [engine.submit(PROMPTS[2], max_new_tokens=9, temperature=1.0, n=3)]
    gate.step(3)
    then = engine.stats()
    assert (then.running, then.waiting, then.tokens) == (3, 1, 9)
    assert then.pages_in_use == 4 and then.tokens_per_second > 0  # the prompt's and three more
    gate.open()
    assert [len(each.results(WAIT)) for each in streams] == [3, 3]
    last = engine.stats()
    assert (last.running, last.waiting, last.tokens, last.pages_in_use) == (0, 0, 54, 0)


# ---- back-pressure -------------------------------------------------------------------------------


def test_submit_waits_while_too_many_do(gated: Any) -> None:
    engine, gate = gated(runner_of("llama"), max_sequences=1, max_waiting=2)
    streams = [engine.submit(PROMPTS[0], max_new_tokens=2)]
    gate.wait()
    streams += [engine.submit(PROMPTS[0], max_new_tokens=2) for _ in range(2)]
    for timeout in (0, 0.01):
        with pytest.raises(EngineFull, match="2 requests wait"):
            engine.submit(PROMPTS[0], timeout=timeout)
    more: list[Stream] = []
    thread = threading.Thread(
        target=lambda: more.append(engine.submit(PROMPTS[0], max_new_tokens=2))
    )
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and engine.stats().waiting == 2
    streams[1].cancel()  # its place becomes free, though nothing has ended
    gate.step()
    thread.join(WAIT)
    assert not thread.is_alive()
    gate.open()
    assert [len(each.result(WAIT).tokens) for each in [*streams, *more]] == [2, 0, 2, 2]


def test_who_does_not_read_holds_up_nobody() -> None:
    with GenerationEngine(mini("llama"), max_sequences=2) as engine:
        slow = [engine.submit(PROMPTS[0], max_new_tokens=30) for _ in range(2)]
        assert len(list(engine.submit(PROMPTS[1], max_new_tokens=5))) == 5
        until(lambda: slow[0].done and slow[1].done)
        assert [len(list(each)) for each in slow] == [30, 30]


# ---- cancelling ----------------------------------------------------------------------------------


def test_cancel(gated: Any) -> None:
    runner = runner_of("llama")
    engine, gate = gated(runner, tokenizer=LETTERS, max_sequences=3)
    whole = generate(runner_of(runner.model), PROMPTS[0], tokenizer=LETTERS, max_new_tokens=20)[0]
    runs = engine.submit(PROMPTS[0], max_new_tokens=20)
    gate.wait()
    reads = engine.submit(PROMPTS[3], max_new_tokens=20, temperature=1.0, n=2)
    waits = engine.submit(PROMPTS[4], max_new_tokens=20)
    gate.step(4)
    assert engine.stats().running == 3 and engine.stats().waiting == 1
    for each in (runs, reads, waits):
        each.cancel()
        each.cancel()
    assert not runs.done and runs.finish_reason is None
    gate.open()
    for each in (runs, reads, waits):
        assert {r.finish_reason for r in each.results(WAIT)} == {"cancelled"}
    assert runner.cache.pages_in_use == 0 and runs.finish_reason == "cancelled"
    result, pieces = runs.result(), list(runs)
    assert 2 <= len(result.tokens) <= 5 and result.tokens == whole.tokens[: len(result.tokens)]
    assert [p.token for p in pieces] == [*result.tokens, None] and pieces[-1].result == result
    assert "".join(p.text or "" for p in pieces) == result.text == LETTERS.decode(result.tokens)
    assert waits.results() == [Result(0, [], "", "cancelled")]
    assert [(p.index, p.token, p.text) for p in reads] == [(0, None, ""), (1, None, "")]
    runs.cancel()  # too late
    assert engine.submit(PROMPTS[0], max_new_tokens=20).result(WAIT) == whole


def test_a_stream_that_is_dropped_or_left_is_cancelled(gated: Any) -> None:
    runner = runner_of("llama")
    engine, gate = gated(runner)
    dropped = engine.submit(PROMPTS[0], max_new_tokens=40)
    with engine.submit(PROMPTS[1], max_new_tokens=40) as left:
        gate.wait()
        gate.step(3)
    del dropped
    gate.open()
    assert len(left.result(WAIT).tokens) < 40
    until(lambda: engine.stats().running == 0)
    assert engine.stats().tokens < 40
    assert runner.cache.pages_in_use == 0


# ---- errors --------------------------------------------------------------------------------------


def test_an_error_of_one_request_is_its_own(gated: Any) -> None:
    model = mini("llama")
    assert model.matrix is not None  # the head has its own
    with torch.no_grad():
        model.decoder.embedding.token.weight[5] = torch.nan
    runner = runner_of(model, max_tokens=50)
    engine, gate = gated(runner, max_sequences=8)
    good = [[t + (t == 5) for t in prompt] for prompt in PROMPTS]
    knobs: dict[str, Any] = {"suppress_tokens": (5,), "max_new_tokens": 12}
    expected = [generate(runner_of(model), prompt, **knobs)[0] for prompt in good]
    first = [engine.submit(prompt, **knobs) for prompt in good[:3]]
    no_token = engine.submit(good[0], suppress_tokens=range(V))
    bad = [engine.submit([7, 5, 8], **knobs, temperature=1.0, n=2), engine.submit([5], **knobs)]
    first += [engine.submit(prompt, **knobs) for prompt in good[3:]]
    gate.open()
    assert [each.result(WAIT) for each in first] == expected
    for each in bad:
        for ask in (each.results, lambda each=each: list(each)):
            with pytest.raises(ValueError, match="logits: NaN"):
                ask()
        assert each.done and each.finish_reason is None
    with pytest.raises(ValueError, match="no token is left"):
        no_token.result(WAIT)
    assert runner.cache.pages_in_use == 0 and engine.stats().running == 0


def test_a_tokenizer_that_cannot_write_a_token() -> None:
    class Broken(type(LETTERS)):  # type: ignore[misc]
        def decode(self, tokens: Any) -> str:
            if 5 in tokens:
                raise IndexError("5 is no letter")
            return super().decode(tokens)

    with GenerationEngine(mini("llama"), tokenizer=Broken()) as engine:
        drawn: dict[str, Any] = {"temperature": 1.0, "n": 2, "max_new_tokens": 4}
        streams = [engine.submit([8], forced_tokens={2: token}, **drawn) for token in (5, 6)]
        prompt = engine.submit([5], max_new_tokens=4)
        assert [len(result.tokens) for result in streams[1].results(WAIT)] == [4, 4]
        for each in (streams[0], prompt):
            with pytest.raises(IndexError, match="no letter"):
                each.results(WAIT)
        assert engine.runner.cache.pages_in_use == 0


@pytest.mark.parametrize("error", [RuntimeError("it broke"), ValueError("it broke")], ids=repr)
def test_an_error_of_the_model_is_everybodys(
    error: Exception, monkeypatch: pytest.MonkeyPatch, gated: Any
) -> None:
    runner = runner_of("llama")
    forward, calls = runner.forward, []

    def fails(work: Any) -> torch.Tensor:
        calls.append(work)
        if len(calls) == 4:
            raise error
        return forward(work)

    monkeypatch.setattr(runner, "forward", fails)
    engine, gate = gated(runner, max_sequences=2)
    ends, runs = (engine.submit(PROMPTS[1], max_new_tokens=n) for n in (1, 20))
    waits, gone = (engine.submit(PROMPTS[1], temperature=1.0, n=2) for _ in range(2))
    gate.wait()
    gate.step(2)
    gone.cancel()  # in the step that fails
    gate.open()
    assert gone.results(WAIT)[1].finish_reason == "cancelled"
    assert len(ends.result(WAIT).tokens) == 1
    for each in (runs, waits):
        with pytest.raises(type(error), match="it broke"):
            each.results(WAIT)
    pieces: list[Piece] = []
    with pytest.raises(type(error), match="it broke"):
        pieces.extend(piece for piece in runs)
    assert runner.cache.pages_in_use == 0
    with pytest.raises(EngineClosed) as caught:
        engine.submit(PROMPTS[0])
    assert caught.value.__cause__ is error
    engine.close()


def test_what_submit_refuses() -> None:
    with GenerationEngine(mini("llama"), max_sequences=4, max_tokens=40) as engine:
        for what, message in {
            "beams": {"beams": 3},
            "n: got 5": {"n": 5, "temperature": 1.0, "max_new_tokens": 4},
            "stop: .* tokenizer": {"stop": ("a",)},
            "top_p": {"top_p": 0.5},
            "suppress_tokens: got token 97": {"suppress_tokens": (V,)},
            "decoder_start": {"decoder_start": 3},
        }.items():
            with pytest.raises(ValueError, match=what):
                engine.submit(PROMPTS[0], **message)  # type: ignore[arg-type]
        bad = (([], "empty"), ([3, V], "97"), ([3] * 40, "context is 40"), ("a", "tokenizer"))
        for prompt, what in bad:
            with pytest.raises(ValueError, match=what):
                engine.submit(prompt)
        with pytest.raises(TypeError, match="ints"):
            engine.submit(PROMPTS)  # type: ignore[arg-type]
        options = Options(max_new_tokens=3, temperature=1.0, n=2)
        several = engine.submit(PROMPTS[0], options=options)
        with pytest.raises(ValueError, match=r"results\(\)"):
            several.result()
        assert several.results(WAIT) == generate(engine.runner.model, PROMPTS[0], options=options)


def test_what_the_engine_refuses() -> None:
    runner = runner_of("llama")
    for sizes in ({"max_sequences": 0}, {"max_waiting": 0}, {"page_size": 4}):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            GenerationEngine(runner, **sizes)
    with pytest.raises(TypeError, match="Linear"):
        GenerationEngine(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


# ---- the end -------------------------------------------------------------------------------------


def test_close_waits_or_cancels(gated: Any) -> None:
    engine, gate = gated(runner_of("llama"), max_sequences=1, max_waiting=1)
    streams = [engine.submit(PROMPTS[0], max_new_tokens=5)]
    gate.wait()
    streams.append(engine.submit(PROMPTS[0], max_new_tokens=5))
    refused: list[type] = []

    def asks() -> None:
        with pytest.raises(EngineClosed, match="closed"):
            engine.submit(PROMPTS[0])
        refused.append(EngineClosed)

    threads = [threading.Thread(target=asks), threading.Thread(target=engine.close)]
    threads[0].start()
    threads[0].join(0.05)
    threads[1].start()
    threads[0].join(WAIT)
    assert refused == [EngineClosed] and threads[1].is_alive()
    gate.open()
    threads[1].join(WAIT)
    assert [len(each.result(0).tokens) for each in streams] == [5, 5]
    with pytest.raises(EngineClosed):
        engine.submit(PROMPTS[0])
    engine.close()

    with pytest.raises(KeyError), GenerationEngine(runner_of("llama")) as other:
        left = other.submit(PROMPTS[1], max_new_tokens=CONTEXT - 1)
        raise KeyError
    assert left.done and other.runner.cache.pages_in_use == 0


def test_results_may_take_longer_than_one_waits(gated: Any) -> None:
    engine, gate = gated(runner_of("llama"))
    stream = engine.submit(PROMPTS[0], max_new_tokens=2)
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        stream.results(0.01)
    gate.open()
    assert len(stream.result(WAIT).tokens) == 2


def test_asynchronous_readers() -> None:
    expected = [list(stream(mini("llama"), prompt, max_new_tokens=7)) for prompt in PROMPTS]

    async def read(stream: Stream) -> list[Piece]:
        return [piece async for piece in stream]

    async def all_of_them(engine: GenerationEngine) -> list[list[Piece]]:
        streams = [engine.submit(prompt, max_new_tokens=7) for prompt in PROMPTS]
        late = asyncio.create_task(read(engine.submit(PROMPTS[0], max_new_tokens=50)))
        found = await asyncio.gather(*map(read, streams))
        late.cancel()  # with its loop closed the engine goes on
        return list(found)

    with GenerationEngine(mini("llama"), max_sequences=3) as engine:
        assert asyncio.run(all_of_them(engine)) == expected
        assert engine.submit(PROMPTS[0], max_new_tokens=2).result(WAIT).finish_reason == "length"


def test_the_interpreter_ends_with_an_engine_at_work() -> None:
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from generation_cases import mini\n"
        "from pyfuse.generation import GenerationEngine\n"
        "engine = GenerationEngine(mini('llama'))\n"
        "streams = [engine.submit([7, i], max_new_tokens=60) for i in range(40)]\n"
        "print(next(streams[0]).token)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and done.stdout.strip().isdigit()
