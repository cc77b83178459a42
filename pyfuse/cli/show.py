"""Tables and progress bars: by rich where it is installed, as plain text elsewhere."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from pyfuse.models.zoo import Report

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "rich":
        raise
    HAVE_RICH = False
else:
    HAVE_RICH = True


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    file: TextIO | None = None,
) -> None:
    """Print rows under a title. right: the columns that hold numbers."""
    out = sys.stdout if file is None else file
    if HAVE_RICH:
        _rich_table(title, columns, rows, right, out)
    else:
        print(plain_table(title, columns, rows, right), file=out)


def plain_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> str:
    """The table as aligned text."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [title]
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = zip(columns, row, widths, strict=True)
        line = [cell.rjust(w) if name in right else cell.ljust(w) for name, cell, w in cells]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def _rich_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str],
    out: TextIO,
) -> None:
    grid = Table(title=title, title_justify="left")
    for name in columns:
        grid.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
    console = Console(file=out)
    if not console.is_terminal:  # a file or a pipe has no width to fold to
        console = Console(file=out, width=1000)
    console.print(grid)


_STAGES = {
    "wait": "waiting for another pyfuse",
    "download": "download",
    "unpack": "unpack",
    "convert": "convert",
}


@contextmanager
def progress(name: str) -> Iterator[Report]:
    """A report for zoo.fetch() that draws one bar for each stage, on stderr."""
    if not HAVE_RICH:
        yield _plain_report(name)
        return
    described = TextColumn("{task.description}")
    percent = TextColumn("{task.percentage:>3.0f}%")
    columns = (described, BarColumn(), percent, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{name}: {_STAGES[stage]}", total=total or None)
            if total:
                bars.update(tasks[stage], completed=done)

        yield report


def _plain_report(name: str) -> Report:
    said: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in said:
            said.add(stage)
            print(f"{name}: {_STAGES[stage]} ...", file=sys.stderr, flush=True)

    return report
