"""What a run leaves to look at: a table of all steps (CSV), and a picture of it (PNG)."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

from pyfuse.training.errors import disk_errors
from pyfuse.training.loop import Figures
from pyfuse.training.state import write_file

TRAIN, EVAL = "train", "eval"
PICTURE_SECONDS = 60.0  # between two drawings


def columns(figures: tuple[str, ...]) -> tuple[str, ...]:
    """Of the table; figures: those of an evaluation."""
    of_steps = ("lr", "gradient_norm", "tokens_per_second", "seconds")
    return ("step", "kind", "tokens", *figures, *of_steps)


class Log:
    """The table, a Listener: a row for each step and each evaluation, written at once; numbers in full precision."""

    def __init__(self, path: Path, figures: tuple[str, ...], from_step: int | None = None) -> None:
        """figures: of an evaluation, "loss" among them. from_step: go on after that step, rows beyond it are of steps
        that will come again; None: a new table."""
        self.path, self.columns = path, columns(figures)
        rows = [] if from_step is None else read_log(path, from_step)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, text.getvalue().encode())

    def stepped(self, step: int, figures: Figures) -> None:
        self._row(step, TRAIN, figures)

    def evaluated(self, step: int, figures: Figures) -> None:
        self._row(step, EVAL, figures)

    def _row(self, step: int, kind: str, figures: Figures) -> None:
        row = {"step": step, "kind": kind, **{n: repr(v) for n, v in figures.items()}}
        with (
            disk_errors(self.path.parent),
            self.path.open("a", encoding="utf-8", newline="") as file,
        ):
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


def read_log(path: Path, up_to: int | None = None) -> list[dict[str, str]]:
    """The rows up to a step. The last row of a killed run may be cut off: it is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if up_to is None or int(row["step"]) <= up_to]


class Picture:
    """The curves of a table, drawn now and then, since it takes as long as many small steps."""

    def __init__(self, log: Path, image: Path, uniform: float, drawn: tuple[str, ...] = ()) -> None:
        """uniform: the loss of knowing nothing. drawn: figures of evaluations that are drawn beside the loss."""
        self.log, self.image, self.uniform, self.drawn = log, image, uniform, drawn
        self.last = time.monotonic()

    def draw_if_due(self, at_once: bool) -> None:
        if at_once or time.monotonic() - self.last >= PICTURE_SECONDS:
            draw(self.log, self.image, self.uniform, self.drawn)
            self.last = time.monotonic()


def draw(log: Path, image: Path, uniform: float, drawn: tuple[str, ...] = ()) -> None:
    """Loss, the other figures of evaluations, norm of the gradient and learning rate over the steps."""
    # Without pyplot nothing of it is global, and no window is opened.
    from matplotlib.figure import Figure

    rows = read_log(log)
    others = len(drawn) + 2
    figure = Figure(figsize=(8, 4.8 + 1.6 * others))
    top, *below = figure.subplots(1 + others, 1, sharex=True, height_ratios=(3, *[1] * others))
    top.plot(*_points(rows, TRAIN, "loss"), linewidth=0.8, label="learnt from")
    top.plot(*_points(rows, EVAL, "loss"), marker=".", label="held out")
    top.axhline(uniform, color="grey", linestyle=":", label="uniform")
    top.set_ylabel("loss (nats)")
    top.legend()
    for axes, name in zip(below, drawn, strict=False):
        axes.plot(*_points(rows, EVAL, name), marker=".", color="C1")
        axes.set_ylabel(name.replace("_", " "))
    *_, norms, rates = below
    norms.plot(*_points(rows, TRAIN, "gradient_norm"), linewidth=0.8)
    norms.set_ylabel("gradient norm")
    rates.plot(*_points(rows, TRAIN, "lr"))
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    write_file(image, data.getvalue())


def _points(rows: list[dict[str, str]], kind: str, column: str) -> tuple[list[Any], list[Any]]:
    chosen = [row for row in rows if row["kind"] == kind]
    return [int(row["step"]) for row in chosen], [float(row[column]) for row in chosen]
