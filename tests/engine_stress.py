"""Many requests from many threads to one engine, some of them cancelled: nothing lost, doubled, mixed up or kept.

    python tests/engine_stress.py [rounds]       # 0: a race that has to be found

runs it over and over, for a pyfuse._C that was compiled with -fsanitize=thread, under
LD_PRELOAD=libtsan.so.2 TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66". libgomp knows nothing of the
sanitizer, so torch has one thread here; the threads that meet are the engine's and those of its users, who run the same
model themselves.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from generation_cases import V, mini

from pyfuse.generation import GenerationEngine, Piece, Result, generate
from pyfuse.generation.engine import Stream
from pyfuse.generation.runner import Runner

THREADS, REQUESTS = 4, 64
SIZES: dict[str, Any] = {"page_size": 4, "chunk": 8}


class Letters:
    """Stands for a tokenizer, quicker than a real one: token 7 is "ah"."""

    end_tokens = (2,)
    start_tokens = ()
    bytes = frozenset[int]()

    def encode(self, text: str) -> list[int]:
        return [(ord(a) - 97) * 10 + ord(b) - 97 for a, b in zip(text[::2], text[1::2], strict=True)]  # fmt: skip

    def decode(self, tokens: Any) -> str:
        return "".join(chr(97 + token // 10) + chr(97 + token % 10) for token in tokens)

    def detokenizer(self, after: Any = ()) -> Any:
        from pyfuse.generation.text import Detokenizer

        return Detokenizer(self, after)  # type: ignore[arg-type]


LETTERS: Any = Letters()


@dataclass
class Case:
    """cancel: by its reader, after so many pieces; None: never. reads: whether anybody takes the pieces."""

    prompt: list[int]
    knobs: dict[str, Any]
    cancel: int | None
    reads: bool


def case(draw: random.Random, beginnings: list[list[int]]) -> Case:
    """Some prompts have a beginning in common, so that they share pages."""
    begin = draw.choice(beginnings)[: draw.randrange(16)]
    prompt = begin + [draw.randrange(3, V) for _ in range(draw.randrange(1, 24))]
    knobs: dict[str, Any] = {"max_new_tokens": draw.randrange(1, 20)}
    if draw.random() < 0.5:
        knobs |= {
            "temperature": draw.choice([0.7, 1.5]),
            "seed": draw.randrange(100),
            "n": draw.choice([1, 1, 2, 3]),
        }
        knobs |= draw.choice([{}, {"top_p": 0.9}, {"top_k": 20}])
    if draw.random() < 0.3:
        knobs["stop"] = (draw.choice("abcd") + draw.choice("abcdefgh"),)
    if draw.random() < 0.3:
        knobs["stop_tokens"] = tuple(draw.sample(range(V), 8))
    if draw.random() < 0.2:
        knobs |= {"repetition_penalty": 1.3, "logprobs": 2}
    cancel = draw.randrange(0, 12) if draw.random() < 0.3 else None
    return Case(prompt, knobs, cancel, draw.random() < 0.8)


def check(case: Case, pieces: list[Piece], found: list[Result], expected: list[Result]) -> None:
    """Pieces make up the results, and these are the expected ones, or, cancelled, their beginnings."""
    if case.reads:
        for i, result in enumerate(found):
            mine = [p for p in pieces if p.index == i]
            assert [p.token for p in mine if p.token is not None] == result.tokens
            assert "".join(p.text or "" for p in mine) == result.text
            assert [p.result for p in mine] == [None] * (len(mine) - 1) + [result]
    for one, whole in zip(found, expected, strict=True):
        if one.finish_reason != "cancelled":
            assert one == whole, f"got {one}, alone {whole}"
            continue
        assert case.cancel is not None, "nobody has cancelled it"
        n = len(one.tokens)
        assert one.tokens == whole.tokens[:n]
        assert one.logprobs is None or one.logprobs == (whole.logprobs or [])[:n]
        if whole.finish_reason != "stop_string":
            assert (whole.text or "").startswith(one.text or "")


def read(stream: Stream, case: Case, delay: float) -> tuple[list[Piece], list[Result]]:
    """As its user, who cancels it after some pieces, or after some time."""
    pieces: list[Piece] = []
    if not case.reads:
        if case.cancel is not None:
            time.sleep(delay * case.cancel)
            stream.cancel()
        return pieces, stream.results(60)
    if case.cancel == 0:
        stream.cancel()
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == case.cancel:
            stream.cancel()
    return pieces, stream.results(60)


def storm(seed: int, name: str = "llama") -> dict[str, int]:
    """How many sequences ended how. AssertionError: something is wrong."""
    draw = random.Random(seed)
    model = mini(name)
    beginnings = [[draw.randrange(3, V) for _ in range(16)] for _ in range(3)]
    cases = [case(draw, beginnings) for _ in range(REQUESTS)]
    expected: list[list[Result]] = [[] for _ in cases]
    runner = Runner(model, sequences=4, **SIZES)
    found: list[Any] = [None] * len(cases)
    with GenerationEngine(runner, tokenizer=LETTERS, max_sequences=6, max_waiting=8) as engine:

        def use(thread: int) -> None:
            mine = range(thread, len(cases), THREADS)
            alone = Runner(model, sequences=4, **SIZES)  # of the same weights, at the same time
            for at in range(0, len(mine), 4):  # four at a time, so that requests wait
                some = mine[at : at + 4]
                streams = [
                    engine.submit(cases[i].prompt, priority=i % 2, **cases[i].knobs) for i in some
                ]
                for i, stream in zip(some, streams, strict=True):
                    one = cases[i]
                    try:
                        expected[i] = generate(alone, [one.prompt], tokenizer=LETTERS, **one.knobs)
                        found[i] = read(stream, cases[i], 1e-3)
                    except BaseException as error:  # is told below, by the test's own thread
                        found[i] = error

        threads = [threading.Thread(target=use, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0), stats
    reasons: dict[str, int] = {}
    for one, got, whole in zip(cases, found, expected, strict=True):
        if isinstance(got, BaseException):
            raise got
        check(one, *got, whole)
        for result in got[1]:
            reasons[result.finish_reason] = reasons.get(result.finish_reason, 0) + 1
    assert stats.tokens == sum(len(r.tokens) for _, results in found for r in results)
    assert runner.cache.pages_in_use == 0 and not any(runner.cache.pages._holders)
    return reasons


def race() -> None:
    """Two threads append to the same place of one cache: without a report of it the sanitizer is not at work."""
    runner = Runner(mini("llama"), **SIZES)
    slot = runner.begin([5, 6, 7])
    runner.forward([(slot, [5, 6, 7])])

    def append() -> None:
        for _ in range(300):
            runner.step.forward_rows([3], [slot], [1], False)

    threads = [threading.Thread(target=append) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    if rounds == 0:
        race()
    for seed in range(rounds):
        for name in ("llama", "gpt2"):
            print(seed, name, storm(seed, name), flush=True)
