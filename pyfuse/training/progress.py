"""What a run says while it goes on, on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from pyfuse.training.loop import Figures, Listener

QUIET_SECONDS = 10.0  # between two lines about steps


class Lines:
    """A Listener that prints. steps: of the whole run."""

    def __init__(self, steps: int, out: TextIO) -> None:
        self.steps, self.out = steps, out
        self.spoke = -QUIET_SECONDS

    def stepped(self, step: int, figures: Figures) -> None:
        now = time.monotonic()
        if now - self.spoke >= QUIET_SECONDS or step == self.steps:
            self.spoke = now
            left = (self.steps - step) * figures["tokens"] / step / figures["tokens_per_second"]
            self.say(f"step {step} of {self.steps}: {_described(figures)}, {_minutes(left)} left")

    def evaluated(self, step: int, figures: Figures) -> None:
        self.say(f"step {step} of {self.steps}: {_evaluation(figures)}")

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)


@contextmanager
def progress(steps: int, done: int, out: TextIO | None = None) -> Iterator[Listener]:
    """A bar by rich where there is a terminal (and rich), else lines. done: steps of an earlier process."""
    out = sys.stderr if out is None else out
    if not out.isatty():
        yield Lines(steps, out)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        yield Lines(steps, out)
        return
    described, left = (
        TextColumn("{task.description}", markup=False),
        Remaining(elapsed_when_finished=True),
    )
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), left, described)
    with Progress(*columns, console=Console(file=out)) as bar:
        task = bar.add_task("", total=steps, completed=done)

        class Bar:
            def stepped(self, step: int, figures: Figures) -> None:
                bar.update(task, completed=step, description=_described(figures))

            def evaluated(self, step: int, figures: Figures) -> None:
                bar.console.print(f"step {step}: {_evaluation(figures)}", highlight=False)

        yield Bar()


def _described(figures: Figures) -> str:
    return f"loss {figures['loss']:.4f}, {figures['tokens_per_second']:,.0f} tok/s"


def _evaluation(figures: Figures) -> str:
    named = (f"{n} {v:.4g}" for n, v in figures.items() if n not in ("tokens", "seconds"))
    return f"held-out {', '.join(named)}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
