"""Seeded bugs must be caught: by what the emulator reports, by the numbers, or by what memory access costs."""

from __future__ import annotations

import pytest
from ptxemu import mutants_cuda, mutants_sm90, mutants_triton, nvcc_run
from ptxemu.mutations import KERNELS, Kernel, Mutant, outcome

MUTANTS = mutants_cuda.MUTANTS + mutants_sm90.MUTANTS + mutants_triton.MUTANTS


def outcome_or_skip(kernel: Kernel, seeded: Mutant | None) -> set[str]:
    try:
        return outcome(kernel, seeded)
    except nvcc_run.NvccNotFound as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_without_a_bug_is_clean(name: str) -> None:
    assert outcome_or_skip(KERNELS[name], None) == set()


@pytest.mark.parametrize("seeded", MUTANTS, ids=lambda m: f"{m.kernel}: {m.name}".replace(" ", "-"))
def test_mutant(seeded: Mutant) -> None:
    """Caught as the table says; what the table says nobody can see must not have become visible."""
    wrong = outcome_or_skip(KERNELS[seeded.kernel], seeded)
    if seeded.expected:
        assert wrong & seeded.expected, f"{wrong or 'nothing'} instead of {set(seeded.expected)}"
    else:
        assert not wrong, f"it is seen now: {wrong}; {seeded.why}"


def test_table_is_as_good_as_claimed() -> None:
    assert len({(m.kernel, m.name) for m in MUTANTS}) == len(MUTANTS)
    missed = [m for m in MUTANTS if not m.expected]
    assert all(m.why for m in missed)
    assert len(missed) <= len(MUTANTS) / 25
