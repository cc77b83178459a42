"""Bugs seeded into the samples, and how one finds out whether they are caught.

A mutant is a copy of a sample with one piece of text replaced. It is run through the cases of its kernel; what is wrong
then is a set of words: the kinds of the emulator's findings, "numerics" where a result breaks the accuracy rule,
"conflicts" and "sectors" where shared or global memory is accessed in more steps than the sample needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numerics
import torch

from ptxemu import Report, nvcc_run

FOLDER = nvcc_run.CACHE / "mutants"
# Steps of memory over the fewest possible, of the samples as they are: ragged rows cost a little.
_WAVEFRONTS, _SECTORS = 1.05, 1.25

Wrong = set[str]


@dataclass(frozen=True)
class Mutant:
    """name: what the bug is. kernel: the name of one of KERNELS. expected: words of which at least one must turn up;
    none for a bug that is known to stay unseen, and `why` says why."""

    name: str
    kernel: str
    file: str
    before: str
    after: str
    expected: frozenset[str]
    why: str = ""


def mutant(
    name: str, kernel: str, file: str, before: str, after: str, expected: str, why: str = ""
) -> Mutant:
    """expected: words with spaces between."""
    return Mutant(name, kernel, file, before, after, frozenset(expected.split()), why)


@dataclass(frozen=True)
class Kernel:
    """files: the sample's own; only: edits that leave of it just what the cases run, to be compiled fast."""

    name: str
    files: tuple[str, ...]
    cases: Callable[[Path], Iterator[Wrong]]
    only: Mapping[str, tuple[str, str]]


def outcome(kernel: Kernel, seeded: Mutant | None) -> Wrong:
    """What is wrong in the cases of a kernel, up to the first that shows what was expected."""
    wrong: Wrong = set()
    for case in kernel.cases(_copy(kernel, seeded)):
        wrong |= case
        if seeded is not None and wrong & seeded.expected:
            break
    return wrong


def _copy(kernel: Kernel, seeded: Mutant | None) -> Path:
    """A folder with the kernel's files, edited. One name is one folder, for the caches of the compilers."""
    name = f"{kernel.name} {seeded.name if seeded else 'as it is'}"
    folder = FOLDER / "".join(c if c.isalnum() else "_" for c in name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in kernel.files:
        own = nvcc_run.SAMPLES / file
        text = (own if own.exists() else nvcc_run.LIBRARY / file).read_text()
        if seeded and seeded.file == file:
            text = _replaced(text, seeded.before, seeded.after, f"{seeded.name}: {file}")
        if file in kernel.only:
            text = _replaced(text, *kernel.only[file], file)
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return folder


def _replaced(text: str, before: str, after: str, place: str) -> str:
    if text.count(before) != 1:
        raise ValueError(f"{place} has {text.count(before)} times, needs once:\n{before}")
    return text.replace(before, after)


def judged(report: Report, results: Mapping[str, tuple[torch.Tensor, ...]]) -> Wrong:
    """results: by name the actual, the exact and the eager tensor."""
    wrong = set(report.kinds())
    for name, (actual, exact, eager) in results.items():
        try:
            numerics.check(actual, exact, eager, name)
        except AssertionError:
            wrong.add("numerics")
    count = report.counters
    if count["shared_wavefronts"] > _WAVEFRONTS * count["shared_wavefronts_ideal"]:
        wrong.add("conflicts")
    if count["sectors"] > _SECTORS * count["sectors_ideal"] + 64:
        wrong.add("sectors")
    return wrong
