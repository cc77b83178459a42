"""decode_attention(k_new=, v_new=): what is written into the cache, and what cannot be."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numerics
import pytest
import torch
from cases import DTYPES
from conftest import Target
from decode_cases import NAN, Case, build

import pyfuse

pytestmark = pytest.mark.emulated(sm_80=3, sm_90=24, sm_89=24, sm_120=24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("page_size", [None, 1, 7, 64])
def test_append_is_copy_then_attend(
    target: Target, dtype: str, window: int | None, page_size: int | None
) -> None:
    for m in (1, 5):
        case = Case(dtype, m=m, page_size=page_size, window=window, lengths=(300, m, 257, 66))
        there, given = build(case), build(replace(case, append=True, layout="BNHD"))
        expected, actual = there.run(target.backend), given.run(target.backend)
        for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
            numerics.assert_bitwise_equal(x, y, name)
        for x, y in zip(given.caches(), there.caches(), strict=True):
            numerics.assert_bitwise_equal(x, y, "the cache afterwards")


def test_a_cache_that_is_appended_to_again_and_again(target: Target) -> None:
    """Token by token from nothing, as generation does it, is causal attention of all at once."""
    q, k, v = (torch.randn(2, heads, 70, 16) for heads in (4, 2, 2))
    k_cache, v_cache = torch.full((12, 2, 8, 16), NAN), torch.full((12, 2, 8, 16), NAN)
    table = torch.tensor([[3, 1, 4, 0, 5, 2, 6, 7, 8], [9, 10, 11, 0, 0, 0, 0, 0, 0]])
    steps = []
    for i in range(70):
        now = slice(i, i + 1)
        # The second sequence stops at 24 keys: it has three pages.
        lengths = torch.tensor([i + 1, min(i + 1, 24)])
        last = [now, slice(int(lengths[1]) - 1, int(lengths[1]))]
        new = [torch.stack([x[b, :, last[b]] for b in (0, 1)]) for x in (q, k, v)]
        steps.append(
            pyfuse.decode_attention(
                new[0], k_cache, v_cache, seqlens_k=lengths, block_table=table,
                k_new=new[1], v_new=new[2], backend=target.backend,
            )
        )  # fmt: skip
    expected = pyfuse.attention(q, k, v, causal=True, backend="eager")
    torch.testing.assert_close(torch.cat(steps, 2)[0], expected[0])
    torch.testing.assert_close(torch.cat(steps, 2)[1, :, :24], expected[1, :, :24])


def test_explain_writes_nothing(target: Target) -> None:
    call = build(Case(append=True, lengths=(5, 9)))
    before = [x.clone() for x in call.caches()]
    pyfuse.explain("decode_attention", **call.tensors, **call.options, backend=target.backend)
    for x, y in zip(call.caches(), before, strict=True):
        numerics.assert_bitwise_equal(x, y, "the cache")


def appending(**change: Any) -> dict[str, Any]:
    """A good call of two sequences that appends three tokens; then changed."""
    good = {
        "q": torch.randn(2, 4, 3, 8),
        "k_cache": torch.randn(2, 2, 7, 8),
        "v_cache": torch.randn(2, 2, 7, 6),
        "k_new": torch.randn(2, 2, 3, 8),
        "v_new": torch.randn(2, 2, 3, 6),
        "seqlens_k": torch.tensor([3, 7]),
    }
    return good | change


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no v_new": ({"v_new": None}, ValueError, "v_new: got None, but k_new is given"),
    "no k_new": ({"k_new": None}, ValueError, "k_new: got None, but v_new is given"),
    "rows": ({"k_new": torch.zeros(2, 2, 2, 8)}, ValueError, "k_new: M is 2, but q has M = 3"),
    "heads": ({"v_new": torch.zeros(2, 4, 3, 6)}, ValueError, "v_new: Hk is 4, but k_cache has"),
    "size": ({"v_new": torch.zeros(2, 2, 3, 8)}, ValueError, "v_new: Dv is 8, but v_cache has"),
    "rank": ({"k_new": torch.zeros(2, 2, 8)}, ValueError, "k_new: expected 4 dimensions"),
    "list": ({"k_new": [1.0]}, TypeError, "k_new: expected a torch.Tensor, got list"),
    "dtype": (
        {"k_new": torch.zeros(2, 2, 3, 8, dtype=torch.bfloat16)},
        TypeError,
        "k_new: dtype torch.bfloat16, but q has torch.float32",
    ),
    "stride": (
        {"v_new": torch.zeros(2, 2, 6, 3).transpose(2, 3)},
        ValueError,
        "v_new: stride 3 in the last dimension",
    ),
    "too short": (
        {"seqlens_k": torch.tensor([2, 7])},
        ValueError,
        "seqlens_k: a sequence has 2 keys, needs 3 or more, the 3 of k_new included",
    ),
    "expanded": (
        {"v_cache": torch.zeros(2, 1, 7, 6).expand(2, 2, 7, 6)},
        ValueError,
        "v_cache: strides (42, 0, 6, 1) share memory between elements",
    ),
    "gradient of the cache": (
        {"k_cache": torch.zeros(2, 2, 7, 8, requires_grad=True)},
        ValueError,
        "k_cache: requires grad, but appending",
    ),
    "gradient of what is new": (
        {"v_new": torch.zeros(2, 2, 3, 6, requires_grad=True)},
        ValueError,
        "v_new: requires grad, but appending",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_appended(backend: str, name: str) -> None:
    change, error, message = WRONG[name]
    call = appending(**change)
    before = call["k_cache"].detach().clone()
    with pytest.raises(error, match=re.escape(message)):
        pyfuse.decode_attention(**call, backend=backend)
    assert torch.equal(call["k_cache"], before), "written to before it was refused"
    assert pyfuse.decode_attention(**appending(), backend=backend).shape == (2, 4, 3, 6)


def test_gradients_beside_an_append() -> None:
    """q has one; a graph that needs what was overwritten notices it."""
    call = appending(q=torch.randn(2, 4, 3, 8, requires_grad=True))
    pyfuse.decode_attention(**call).sum().backward()
    assert call["q"].grad.isfinite().all() and call["q"].grad.any()
    weight = torch.ones(8, requires_grad=True)
    call = appending()
    loss = (call["k_cache"] * weight).sum()
    pyfuse.decode_attention(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    call = appending(k_cache=torch.zeros(2, 2, 7, 8, requires_grad=True))
    with torch.no_grad():
        pyfuse.decode_attention(**call)
    assert torch.equal(call["k_cache"][:, :, :3][0], call["k_new"][0])


def test_appending_compiles_as_one_graph() -> None:
    compiled = torch.compile(pyfuse.decode_attention, fullgraph=True, backend="aot_eager")
    call, other = appending(), appending()
    for name in call:
        other[name] = call[name].clone()
    torch.testing.assert_close(compiled(**call), pyfuse.decode_attention(**other))
    assert torch.equal(call["k_cache"], other["k_cache"])
    assert torch.equal(call["v_cache"], other["v_cache"])
