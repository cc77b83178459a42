"""Labelled texts from CSV files: read by pandas, checked, and shared out between learning and examination.

What is wrong with a table is said with the rows as a spreadsheet counts them: the header is row 1. Blank lines do not
count.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyfuse.training.text import utf8

_NAMED = 5  # rows and names in a message


class Table(NamedTuple):
    """Text i has label i, by its name. sha256: of the files."""

    texts: list[str]
    labels: list[str]
    sha256: str


class Part(NamedTuple):
    """Texts, and the index of each one's label."""

    texts: list[str]
    targets: list[int]


def read(files: Sequence[Path], text: str, label: str, what: str) -> Table:
    """All rows of CSV files that have a column `text` and a column `label`; others are not read.

    Spaces around a text or a label are taken off, nothing else: a text may be "NA", a label 1.

    what: the option that the files are of. FileNotFoundError: no such file. ValueError: not UTF-8, not CSV, no rows,
    no such column, a row without a text or without a label.
    """
    digest, texts, labels = hashlib.sha256(), [], []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{what}: there is no file {file}")
        content = utf8(file, what)
        digest.update(len(content).to_bytes(8, "little") + content.encode())
        frame = _frame(content, file, what)
        texts += _column(frame, text, file, what)
        labels += _column(frame, label, file, what)
    return Table(texts, labels, digest.hexdigest())


def _frame(content: str, file: Path, what: str) -> Any:
    import pandas
    from pandas.errors import EmptyDataError, ParserError

    # Fields are strings as they stand: neither is "NA" missing, nor "01" the number 1.
    try:
        frame = pandas.read_csv(
            io.StringIO(content.removeprefix("\ufeff")), dtype=str, keep_default_na=False
        )
    except EmptyDataError as error:
        raise ValueError(f"{what}: {file} is empty") from error
    except ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise ValueError(f"{what}: {file} is no CSV file ({reason})") from error
    if not isinstance(frame.index, pandas.RangeIndex):
        raise ValueError(
            f"{what}: {file} has more fields in a row than columns in its header; "
            "a text with commas stands in quotes"
        )
    if frame.empty:
        raise ValueError(f"{what}: {file} has a header, but no rows")
    return frame.fillna("")  # of rows that end early


def _column(frame: Any, name: str, file: Path, what: str) -> list[str]:
    if name not in frame.columns:
        raise ValueError(
            f"{what}: {file} has no column {name!r}; its columns are {', '.join(frame.columns)}"
        )
    values: list[str] = [value.strip() for value in frame[name]]
    rows = [i + 2 for i, value in enumerate(values) if not value]
    if rows:
        raise ValueError(
            f"{what}: {file} has {len(rows)} of {len(values)} rows without a {name} (row {_few(rows)}); "
            "fill them in, or take them out"
        )
    return values


def classes(labels: Iterable[str]) -> list[str]:
    """The different labels in order: by number if all are numbers, else by name. ValueError: fewer than two."""
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"--data: a classifier needs two labels, all texts have {names[0]!r}")
    if all(n.removeprefix("-").isdecimal() for n in names):
        names.sort(key=int)
    return names


def split(table: Table, names: Sequence[str], share: float, seed: int) -> tuple[Part, Part]:
    """(to learn from, held out): of each label the same share, at random by the seed, of one text at least.

    ValueError: a label with one text, which cannot be on both sides.
    """
    counts = Counter(table.labels)
    alone = [name for name in names if counts[name] == 1]
    if alone:
        raise ValueError(
            f"--data: one text only has the label {_few(map(repr, alone))}: it cannot be learnt and examined; "
            "add texts, take it out, or give --test"
        )
    rows: dict[str, list[int]] = {name: [] for name in names}
    for i, label in enumerate(table.labels):
        rows[label].append(i)
    generator = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for own in rows.values():
        count = min(max(1, round(len(own) * share)), len(own) - 1)
        order = torch.randperm(len(own), generator=generator).tolist()
        held.update(own[i] for i in order[:count])
    kept = [i for i in range(len(table.texts)) if i not in held]
    return _part(table, kept, names), _part(table, sorted(held), names)


def both(table: Table, test: Table, names: Sequence[str]) -> tuple[Part, Part]:
    """(to learn from, held out): all of either table. ValueError: a label in the second one only."""
    unknown = {label: i + 2 for i, label in reversed(list(enumerate(test.labels)))}
    for name in names:
        unknown.pop(name, None)
    if unknown:
        label, row = min(unknown.items(), key=lambda item: item[1])
        raise ValueError(
            f"--test: the label {label!r} (row {row}) is in no row of --data, which has {_few(names)}: "
            "it cannot be learnt"
        )
    learnt, held = (_part(t, range(len(t.texts)), names) for t in (table, test))
    return learnt, held


def _part(table: Table, rows: Iterable[int], names: Sequence[str]) -> Part:
    index, rows = {name: i for i, name in enumerate(names)}, list(rows)
    return Part([table.texts[i] for i in rows], [index[table.labels[i]] for i in rows])


def _few(things: Iterable[object]) -> str:
    found = [str(thing) for thing in things]
    return ", ".join(found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
