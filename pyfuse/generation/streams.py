"""What a request to `GenerationEngine` becomes, piece by piece, on its way from the engine's thread to a reader."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from pyfuse.generation.sequence import Piece, Result

CANCELLED = "cancelled"  # a further finish_reason


class Outlet:
    """The end of a stream that the engine holds. Its reader's end is a `Stream`.

    cancelled: nobody wants more; the engine looks at it before every step.
    """

    def __init__(self, sequences: int) -> None:
        self.sequences, self.cancelled = sequences, False
        self.results: dict[int, Result] = {}
        self._pieces: deque[Piece] = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], Any]] = []

    @property
    def done(self) -> bool:
        """Whether no piece will come any more."""
        return self._error is not None or len(self.results) == self.sequences

    def put(self, piece: Piece) -> None:
        with self._changed:
            self._pieces.append(piece)
            if piece.result is not None:
                self.results[piece.index] = piece.result
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Instead of what has not come yet."""
        with self._changed:
            if not self.done:
                self._error = error
                self._wake()

    def wait(self, timeout: float | None) -> None:
        """For the end. TimeoutError; the error that is the end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds")
            if self._error is not None:
                raise self._error

    def next(self) -> Piece | None:
        """Waits for it; None: there is no further one."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self.done)
            return self._take()

    async def next_async(self) -> Piece | None:
        """The same without holding up the event loop."""
        while True:
            with self._changed:
                if self._pieces or self.done:
                    return self._take()
                ready, loop = asyncio.Event(), asyncio.get_running_loop()
                self._wakers.append(partial(loop.call_soon_threadsafe, ready.set))
            await ready.wait()

    def _take(self) -> Piece | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        for waker in self._wakers:
            try:
                waker()
            except RuntimeError:  # its event loop has been closed, so nobody waits there
                continue
        self._wakers.clear()


class Stream:
    """The pieces of one request as they come: an iterator, and an asynchronous one.

    Any thread may read it, and several: each piece goes to one of them. Unread pieces wait here, n · (max_new_tokens +
    1) of them at most, and hold up nobody. An error of the request, or of the model, is raised after the pieces that
    were there before it.

    A stream that nobody refers to any more is cancelled, and so is one that is left as a context manager.
    """

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def cancel(self) -> None:
        """End it before the engine's next step, with finish_reason "cancelled" and the tokens that are there.

        Too late where it has ended by then. Returns at once; `results` waits until memory has been given back.
        """
        self._outlet.cancelled = True

    @property
    def done(self) -> bool:
        """Whether everything has come; some pieces may not have been read yet."""
        return self._outlet.done

    @property
    def finish_reason(self) -> str | None:
        """As in `Result`, or "cancelled"; None before the end. Of the first of n sequences."""
        first = self._outlet.results.get(0)
        return None if first is None else first.finish_reason

    def result(self, timeout: float | None = None) -> Result:
        """Of the only sequence; see `results`. ValueError: there are several."""
        if self._outlet.sequences > 1:
            raise ValueError(f"result: there are {self._outlet.sequences}, see results()")
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Result]:
        """Of the n sequences, when all have ended. It takes no pieces away from readers.

        TimeoutError: not within so many seconds. And what ended the request: ValueError for logits that are NaN, or
        where options leave no token; an error of the model.
        """
        self._outlet.wait(timeout)
        return [self._outlet.results[i] for i in range(self._outlet.sequences)]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        piece = self._outlet.next()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        piece = await self._outlet.next_async()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
