"""Bugs seeded into the CUDA kernels must be caught: by the emulator, by the numbers, or by what memory access costs."""

from __future__ import annotations

import pytest
from cuda_mutants import mutants, outcome
from ptxemu.mutations import Mutant

from pyfuse.backends import cuda_device

pytestmark = pytest.mark.skipif(cuda_device._cuda is None, reason=cuda_device.NOT_BUILT)


def test_the_kernels_as_they_are_are_clean() -> None:
    assert outcome(None) == set()


@pytest.mark.parametrize("seeded", mutants(), ids=lambda m: m.name.replace(" ", "-"))
def test_a_bug_is_caught(seeded: Mutant) -> None:
    wrong = outcome(seeded)
    assert wrong & seeded.expected, f"{wrong or 'nothing'} instead of {set(seeded.expected)}"
