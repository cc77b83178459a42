"""Random calls of attention, forward and backward, held to eager in float64: what the designed cases of
test_attention.py, which cover pairs of options, leave to chance. The same calls in every run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numerics
import pytest
import torch
from cases import Case, Inputs, build
from conftest import Target
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from pyfuse import attention, varlen_attention

INF = float("inf")
MASKS = ["none", "bool", "rows", "padding", "float", "bias", "inf", "float32"]

# Small ones, where edges meet, and some around the ends of tiles and vectors.
ROWS = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 63, 64, 65, 96, 130]))
HEAD_SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 65, 80]))
BAND = st.integers(-1, 70)

CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 2), (3, 1), (5, 5)]),
    sizes=st.tuples(ROWS, ROWS),
    head_sizes=st.tuples(HEAD_SIZES, HEAD_SIZES),
    dtype=st.sampled_from(["f32", "bf16", "f16", "f64"]),
    layout=st.sampled_from(["BMHD", "BHMD", "MBHD", "slice"]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 70), st.tuples(BAND, BAND)),
    mask=st.sampled_from(MASKS),
    seqlens=st.sampled_from(["none", "any", "zero"]),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    alibi=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([None, 0.0, -0.3, 1.0]),
)
PACKED = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=6)

# Hundreds of calls that each compile several kernels: not for an emulated GPU, but for a real one.
pytestmark = pytest.mark.emulated(sm_80=0, sm_90=0, sm_89=0, sm_120=0)


def seeded(count: int) -> settings:
    unneeded = [HealthCheck.function_scoped_fixture]  # the target is the same for all examples
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=count,
        suppress_health_check=unneeded,
    )


@seeded(300)
@given(case=CASES)
def test_dense(target: Target, case: Case) -> None:
    check(attention, target.backend, lambda: build(case))


@seeded(120)
@given(case=CASES, lengths=PACKED, beyond=st.integers(0, 2))
def test_packed(target: Target, case: Case, lengths: list[tuple[int, int]], beyond: int) -> None:
    check(varlen_attention, target.backend, lambda: packed(case, lengths, beyond))


def packed(case: Case, lengths: list[tuple[int, int]], beyond: int) -> Inputs:
    """The case with all of its queries and keys in sequences of these lengths; rows `beyond` in none."""
    bounds = torch.tensor([(0, 0), *lengths]).cumsum(0).T
    m, n = (int(end) + beyond for end in bounds[:, -1])
    inputs = build(replace(case, batch=1, sizes=(m, n), mask="none", seqlens="none"))
    q, k, v = (x[0].transpose(0, 1) for x in inputs.tensors)
    of_bounds = {"cu_seqlens_q": bounds[0].contiguous(), "cu_seqlens_k": bounds[1].contiguous()}
    return Inputs((q, k, v), inputs.options | of_bounds)


def check(function: Callable[..., Any], backend: str, make: Callable[[], Inputs]) -> None:
    try:
        actual = everything(function, backend, make())
    except NotImplementedError:
        reject()
    exact = everything(function, "eager", make().double())
    eager = everything(function, "eager", make())
    for name, value in actual.items():
        kind: numerics.Kind = "gradient" if name.startswith("d") else "output"
        numerics.check(value, exact[name], eager[name], name, kind, random=True)


def everything(function: Callable[..., Any], backend: str, inputs: Inputs) -> dict[str, Tensor]:
    """o, lse and the gradient of every floating-point argument; dropout is seeded alike each time."""
    leaves = inputs.differentiable()
    torch.manual_seed(1)
    o, lse = function(*inputs.tensors, **inputs.options, return_lse=True, backend=backend)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(o.dtype)
    loss = (o * upstream).sum() + lse.masked_fill(lse == -INF, 0.0).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "lse": lse} | {f"d{n}": x for n, x in zip(leaves, grads, strict=True)}
