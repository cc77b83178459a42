"""The CUDA kernels' machine code against the table of what it may cost."""

from __future__ import annotations

import pytest
from cuda_code import ROOT, kernels_of
from ptxemu.budgets import Budget, load_budgets

from pyfuse.backends import cuda_device

pytestmark = pytest.mark.skipif(cuda_device._cuda is None, reason=cuda_device.NOT_BUILT)

BUDGETS = load_budgets(ROOT / "tests" / "cuda_budgets.json")


@pytest.mark.parametrize("kernel, arch", BUDGETS, ids="-".join)
def test_costs_no_more_than_its_budget(kernel: str, arch: str) -> None:
    unit, _, entry = kernel.partition("/")
    budget: Budget = BUDGETS[kernel, arch]
    assert not budget.faults(kernels_of(unit, arch)[entry])
