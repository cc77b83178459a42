"""One model for many: requests from any threads run together, and each gets its tokens as they come.

with GenerationEngine(model, tokenizer=tokenizer, max_sequences=8) as engine:
    first, second = engine.submit("The sky is"), engine.submit("Once", temperature=0.8, n=3)
    for piece in first:
        print(piece.text, end="", flush=True)
    results = second.results()
"""

from __future__ import annotations

import atexit
import heapq
import threading
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakSet

from pyfuse.generation.batch import Batch, Job
from pyfuse.generation.options import Options
from pyfuse.generation.request import Prompt, make_request
from pyfuse.generation.runner import Runner
from pyfuse.generation.streams import Stream
from pyfuse.generation.text import Tokenizer
from pyfuse.models.pages import Pages
from pyfuse.models.transformer import Transformer

__all__ = ["EngineClosed", "EngineFull", "GenerationEngine", "Stats", "Stream"]

_open: WeakSet[GenerationEngine] = WeakSet()


class EngineFull(RuntimeError):
    """As many requests wait as may."""


class EngineClosed(RuntimeError):
    """The engine takes no requests any more: it has been closed, or the model has failed."""


@dataclass(frozen=True)
class Stats:
    """running: sequences. waiting: requests. tokens: made since the start. pages_in_use: of the cache."""

    running: int
    waiting: int
    tokens: int
    tokens_per_second: float
    pages_in_use: int


class GenerationEngine:
    """Continuous batching: sequences join and leave a running batch at every token. Safe to use from any thread.

    model: a Transformer, or a Runner, which nobody else may use until the engine is closed. of_runner: arguments of
      the Runner that is made of a Transformer (max_tokens, page_size, chunk, ...), by default with room for
      max_sequences of max_tokens.
    max_sequences: that run at once. Those of a request's n begin together. Room in the cache for all that a request may
      come to (prompt and max_new_tokens, n times) is set aside when it begins, so none fails half-way for want of it.
    max_waiting: requests that may wait for that. Larger priorities go first, of equals who came first; nobody
      overtakes one who needs more room.

    A thread of the engine's own computes. Each of its steps makes a token of every running sequence and reads one chunk
    of new prompts at most (Runner's `chunk`), so a long prompt delays the others by a chunk's time, not by its own.
    A request gets the tokens that `generate` with the same runner gives it alone, whatever runs beside it. A model's
    error ends all requests and closes the engine; a request's own error ends that request.

    Close it, or use it as a context manager, which waits for all requests, or cancels them if there is an error. At the
    interpreter's exit engines that are still open cancel what they have.

    ValueError: a size that is not positive, or arguments of a Runner with a Runner; errors of `Runner`.
    """

    def __init__(
        self, model: Transformer | Runner, *, tokenizer: Tokenizer | None = None, max_sequences: int = 8,
        max_waiting: int = 64, **of_runner: Any,
    ) -> None:  # fmt: skip
        for name, value in (("max_sequences", max_sequences), ("max_waiting", max_waiting)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if isinstance(model, Runner) and of_runner:
            raise ValueError(f"{next(iter(of_runner))}: the Runner that was given has its own")
        if not isinstance(model, (Transformer, Runner)):
            raise TypeError(f"model: got {type(model).__name__}, needs a Transformer or a Runner")
        if isinstance(model, Transformer):
            model = Runner(model, **{"sequences": max_sequences, **of_runner})
        self.runner = model
        self.tokenizer, self.max_sequences, self.max_waiting = tokenizer, max_sequences, max_waiting
        if tokenizer is not None:
            tokenizer.encode(
                ""
            )  # the first call settles transformers' tokenizers; they are safe in threads after it
        self._asked = _without_sequences(self.runner)
        self._batch = Batch(self.runner, self.runner.cache.pages.room, max_sequences)
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[tuple[int, int, Job]] = []  # a heap: -priority, number
        self._numbers = count()
        self._closing = self._cancelling = False
        self._error: BaseException | None = None
        self._tokens, self._began = 0, time.monotonic()
        self._stats = self._count()
        self._thread = threading.Thread(target=self._run, name="pyfuse-engine", daemon=True)
        self._thread.start()
        _open.add(self)

    def submit(
        self, prompt: Prompt, *, options: Options | None = None, priority: int = 0, timeout: float | None = None,
        decoder_start: int | Sequence[int] | None = None, **knobs: Any,
    ) -> Stream:  # fmt: skip
        """Ask for what follows a prompt: a text, or ids [T]. options, knobs, decoder_start: as for `generate`.

        While max_waiting requests wait, so does this call: for `timeout` seconds at most, 0: not at all.

        ValueError: as `generate`; beams; more sequences than max_sequences. CacheFull: it would not fit, even alone.
        EngineFull: after the timeout. EngineClosed.
        """
        request = make_request(self._asked, [prompt], self.tokenizer, options, decoder_start, knobs)  # fmt: skip
        if request.options.searches:
            raise ValueError(
                f"beams: got {request.options.beams}; beam search has no tokens before its end, use generate()"
            )
        if request.rows > self.max_sequences:
            raise ValueError(f"n: got {request.rows}, the engine has max_sequences={self.max_sequences}")  # fmt: skip
        job = Job(request)
        with self._changed:
            if not self._changed.wait_for(self._has_place, timeout):
                raise EngineFull(f"{self.max_waiting} requests wait (max_waiting), timeout={timeout}")  # fmt: skip
            if self._closing:
                raise EngineClosed("the engine is closed") from self._error
            heapq.heappush(self._waiting, (-priority, next(self._numbers), job))
            self._changed.notify_all()
        return Stream(job.outlet)

    def stats(self) -> Stats:
        """As of the end of the latest step."""
        with self._changed:
            running, pages = self._stats
            speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
            return Stats(running, len(self._waiting), self._tokens, speed, pages)

    def close(self, *, cancel: bool = False) -> None:
        """Take no further requests, and wait until those that are there have ended, or cancel them."""
        with self._changed:
            self._closing = True
            self._cancelling |= cancel
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> GenerationEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(cancel=kind is not None)

    # ---- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._admit():
                self._batch.step()
                self._deliver()
        except BaseException as error:  # every stream raises it
            self._fail(error)

    def _admit(self) -> bool:
        """Requests get a place, in order, as long as there is room. Waits for the first; False: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batch.jobs or self._closing)
            if self._cancelling:
                for job in [*self._batch.jobs, *(job for *_, job in self._waiting)]:
                    job.outlet.cancelled = True
            dropped = [job for *_, job in self._waiting if job.outlet.cancelled]
            before = len(self._waiting)
            if dropped:
                self._waiting = [entry for entry in self._waiting if entry[2] not in dropped]
                heapq.heapify(self._waiting)
            while self._waiting and self._batch.fits(self._waiting[0][2]):
                self._batch.add(heapq.heappop(self._waiting)[2])
            for job in dropped:  # the step ends these before all else
                self._batch.add(job)
            if len(self._waiting) < before:
                self._changed.notify_all()  # there are places to wait at
            return bool(self._batch.jobs)

    def _deliver(self) -> None:
        """What is told of a request that has ended is told after its memory is free, and the numbers say so."""
        events, self._batch.events = self._batch.events, []
        with self._changed:
            self._stats = self._count()
            self._tokens += sum(getattr(what, "token", None) is not None for _, what in events)
        for outlet, what in events:
            if isinstance(what, BaseException):
                outlet.fail(what)
            else:
                outlet.put(what)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._closing, self._error = True, error
            jobs = [job for *_, job in self._waiting]
            self._waiting = []
            self._changed.notify_all()
        jobs += self._batch.abandon()
        self._deliver()
        for job in jobs:
            job.outlet.fail(error)

    def _has_place(self) -> bool:
        return self._closing or len(self._waiting) < self.max_waiting

    def _count(self) -> tuple[int, int]:
        return self._batch.running, self.runner.cache.pages_in_use


def _without_sequences(runner: Runner) -> Runner:
    """The runner as if its cache had none but those of now: what requests are checked against, while others run."""
    view = copy(runner)
    view.cache = copy(runner.cache)
    view.cache.pages = Pages(runner.cache.pages.room)
    return view


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes: a thread that computes would come back to one that is no more."""
    for engine in list(_open):
        engine.close(cancel=True)
