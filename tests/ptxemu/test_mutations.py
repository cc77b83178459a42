"""Seeded bugs must be caught: by what the emulator reports, by the numbers, or by what memory access costs."""

from __future__ import annotations

from typing import Any

import pytest

from ptxemu import mutants_cuda, mutants_sm90, mutants_triton, nvcc_run
from ptxemu.mutation_kernels import KERNELS
from ptxemu.mutations import Mutant, outcome

MUTANTS = mutants_cuda.MUTANTS + mutants_sm90.MUTANTS + mutants_triton.MUTANTS


def case(seeded: Mutant | None, kernel: str) -> Any:
    """A parameter; where its kernel is Triton's, with that mark."""
    name = f"{kernel}: {seeded.name if seeded else 'as it is'}".replace(" ", "-")
    marks = [pytest.mark.triton] if kernel.startswith("triton") else []
    return pytest.param(seeded, kernel, id=name, marks=marks)


def outcome_or_skip(kernel: str, seeded: Mutant | None) -> set[str]:
    if kernel.startswith("triton"):
        pytest.importorskip("triton")
    try:
        return outcome(KERNELS[kernel], seeded)
    except nvcc_run.NvccNotFound as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(("seeded", "kernel"), [case(None, name) for name in KERNELS])
def test_kernel_without_a_bug_is_clean(seeded: None, kernel: str) -> None:
    assert outcome_or_skip(kernel, seeded) == set()


@pytest.mark.parametrize(("seeded", "kernel"), [case(m, m.kernel) for m in MUTANTS])
def test_mutant(seeded: Mutant, kernel: str) -> None:
    """Caught as the table says; what the table says nobody can see must not have become visible."""
    wrong = outcome_or_skip(kernel, seeded)
    if seeded.expected:
        assert wrong & seeded.expected, f"{wrong or 'nothing'} instead of {set(seeded.expected)}"
    else:
        assert not wrong, f"it is seen now: {wrong}; {seeded.why}"


def test_all_but_a_few_are_caught() -> None:
    """At most one in 25 is missed, each for a reason."""
    assert len({(m.kernel, m.name) for m in MUTANTS}) == len(MUTANTS)
    missed = [m for m in MUTANTS if not m.expected]
    assert all(m.why for m in missed)
    assert len(missed) <= len(MUTANTS) / 25
