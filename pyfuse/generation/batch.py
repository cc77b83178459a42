"""Requests that run together: sequences join and leave at every step. No threads: `pyfuse.generation.engine` has those.

What a step computes (Yu et al., "Orca: a distributed serving system for transformer-based generative models", OSDI
2022; prompts in chunks beside running sequences: Agrawal et al., arXiv:2308.16369):

    the next token of every sequence that runs,  and  of prompts that have not been read yet one chunk at most
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyfuse.generation.loop import Chooser, Loop
from pyfuse.generation.options import Options
from pyfuse.generation.request import Request
from pyfuse.generation.runner import Runner
from pyfuse.generation.sampling import Logprob
from pyfuse.generation.sequence import Piece, Row
from pyfuse.generation.streams import CANCELLED, Outlet

# What a request's own tokens, options and text can raise; anything else is the model's, and ends all of them.
ERRORS = (ValueError, TypeError, LookupError, ArithmeticError)
Event = tuple[Outlet, Piece | BaseException]


class Job:
    """A request of one prompt. rows: its sequences that have not ended; the first alone until its prompt is read."""

    def __init__(self, request: Request) -> None:
        self.request, self.outlet = request, Outlet(request.rows)
        self.pages = request._pages(0)
        self.piece = Loop(request, streams=True).piece
        self.rows: list[Row] = []
        self.reading = True

    @property
    def sequences(self) -> int:
        return self.request.rows if self.reading else len(self.rows)

    @property
    def source(self) -> list[int]:
        """What an encoder reads before."""
        return [] if self.request.sources is None else self.request.sources[0]

    def row(self, index: int) -> Row:
        return self.request.row(0, index, with_text=True)


class Batch:
    """Jobs that have a place, and their sequences.

    room: pages that they may hold together, sequences: how many of these. What a job may come to hold at its longest is
    set aside for it from the beginning, so the cache is never too full to go on.
    events: what has become of which job, for whoever takes them; memory has been given back by then.
    """

    def __init__(self, runner: Runner, room: int, sequences: int) -> None:
        self.runner, self.room, self.sequences = runner, room, sequences
        self.jobs: list[Job] = []
        self.events: list[Event] = []
        self._rows: list[Row] = []  # of those that have been read
        self._owner: dict[Row, Job] = {}
        self._choose = Chooser([])

    @property
    def running(self) -> int:
        """Sequences."""
        return sum(job.sequences for job in self.jobs)

    def fits(self, job: Job) -> bool:
        pages = sum(other.pages for other in self.jobs) + job.pages
        return pages <= self.room and self.running + job.request.rows <= self.sequences

    def add(self, job: Job) -> None:
        """It fits, and is read in one of the next steps, or it is cancelled."""
        self.jobs.append(job)

    def abandon(self) -> list[Job]:
        """Give everything back. Returns the jobs that had a place."""
        jobs = self.jobs.copy()
        for job in jobs:
            self._forget(job)
        return jobs

    @torch.inference_mode()
    def step(self) -> None:
        """See above. Errors: the model's."""
        for job in [job for job in self.jobs if job.outlet.cancelled]:
            self._cancel(job)
        parts = self._next_parts()
        self._rows = self._alive()
        work = [(row.slot, row.tokens[row.slot.length :]) for row in self._rows]
        work += [(row.slot, part) for row, part in parts]
        if not work:
            return
        logits = self.runner.forward(work).float()
        if parts:
            logits = self._begin_texts([row for row, _ in parts], logits)
        self._go_on(logits)

    # ---- prompts ---------------------------------------------------------------------------------

    def _next_parts(self) -> list[tuple[Row, list[int]]]:
        """Of prompts, in the order of their coming: a chunk of the first one, and others that still fit into it."""
        parts: list[tuple[Row, list[int]]] = []
        left = self.runner.chunk
        for job in [job for job in self.jobs if job.reading]:
            if not job.rows:
                if (
                    parts and len(job.source) >= left
                ):  # late, when more of it may be known by others
                    break
                left -= len(job.source)
                if not self._start(job):
                    continue
            row = job.rows[0]
            part = row.tokens[row.slot.length :][: self.runner.chunk]
            if parts and len(part) > left:
                break
            left -= len(part)
            parts.append((row, part))
        return parts

    def _start(self, job: Job) -> bool:
        """Its first row gets a slot. False: an error has ended it."""
        try:
            row = job.row(0)
            memory = self.runner.encode(job.source) if job.source else None
            row.slot = self.runner.begin(row.tokens, memory)
        except ERRORS as error:
            self._fail(job, error)
            return False
        self._keep(job, row)
        return True

    def _begin_texts(self, read: list[Row], logits: Tensor) -> Tensor:
        """Rows whose prompt is complete run from now on, with the other sequences of it. Logits of all that do."""
        rows = self._rows.copy()
        at = list(range(len(rows)))
        for i, first in enumerate(read, len(rows)):
            if first.slot.length < len(first.tokens):
                continue
            job = self._owner[first]
            job.reading = False
            for index in range(1, job.request.rows):
                row = job.row(index)
                row.slot = self.runner.fork(first.slot)
                self._keep(job, row)
            rows += job.rows
            at += [i] * len(job.rows)
        if len(rows) > len(self._rows):
            self._rows = rows
        return logits[at]

    def _keep(self, job: Job, row: Row) -> None:
        """Rows whose options choose alike have the same ones, and are chosen for in one call."""
        mine = _of_choice(row.options)
        row.options = next((r.options for r in self._owner if r.options == mine), mine)
        job.rows.append(row)
        self._owner[row] = job

    # ---- texts -----------------------------------------------------------------------------------

    def _go_on(self, logits: Tensor) -> None:
        """Every row by its next token. logits [R, V]"""
        rows = self._rows
        if self._choose.rows is not rows:
            self._choose = Chooser(rows)
        try:
            chosen = list(zip(rows, *self._choose(logits), strict=True))
        except ValueError:
            chosen = self._choose_apart(logits)
        for row, token, logprob in chosen:
            job = self._owner.get(row)
            if job is None:  # an error of another of its sequences has ended it
                continue
            try:
                ended = row.accept(token, logprob)
                piece = job.piece(row, None if token in row.stop_tokens else token)
            except ERRORS as error:
                self._fail(job, error)
                continue
            if ended:
                self._release(job, row)
            self.events.append((job.outlet, piece))
        self._rows = self._alive()

    def _choose_apart(self, logits: Tensor) -> list[tuple[Row, int, Logprob | None]]:
        """Job by job, since one of them has logits that nothing can be chosen by."""
        chosen: list[tuple[Row, int, Logprob | None]] = []
        for job in [job for job in self.jobs if not job.reading]:
            at = [i for i, row in enumerate(self._rows) if self._owner.get(row) is job]
            try:
                chosen += zip(job.rows, *Chooser(job.rows)(logits[at]), strict=True)
            except ValueError as error:
                self._fail(job, error)
        return chosen

    # ---- ends ------------------------------------------------------------------------------------

    def _alive(self) -> list[Row]:
        """Of the rows that run; the same list where none has ended."""
        alive = [row for row in self._rows if row in self._owner]
        return alive if len(alive) < len(self._rows) else self._rows

    def _release(self, job: Job, row: Row) -> None:
        job.rows.remove(row)
        del self._owner[row]
        self.runner.end(row.slot)
        if not job.rows:
            self.jobs.remove(job)

    def _cancel(self, job: Job) -> None:
        rows = job.rows
        try:
            if job.reading:
                rows = [job.row(i) for i in range(job.request.rows)]
            self.events += [(job.outlet, _last_piece(job, row)) for row in rows]
        except ERRORS as error:
            self._fail(job, error)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """All of it, wherever it stands."""
        if not job.rows and job in self.jobs:
            self.jobs.remove(job)
        for row in job.rows.copy():
            self._release(job, row)

    def _fail(self, job: Job, error: BaseException) -> None:
        self._forget(job)
        self.events.append((job.outlet, error))


def _last_piece(job: Job, row: Row) -> Piece:
    """Of one that is cancelled."""
    if row.text is not None:
        row.text.end()
    row.finish_reason = CANCELLED
    return job.piece(row, None)


def _of_choice(options: Options) -> Options:
    """What of them chooses tokens: of equal ones this is equal."""
    most = options.max_new_tokens if options.forced_tokens else max(1, options.min_new_tokens)
    return replace(options, seed=0, n=1, stop=(), stop_tokens=None, max_new_tokens=most)
