"""decode_attention over caches in one piece and in pages, on every backend, held to eager in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numerics
import pytest
import torch
from cases import DTYPES
from conftest import Target
from decode_cases import APPENDED, CASES, NAN, Call, Case, build
from torch import Tensor

import pyfuse

pytestmark = pytest.mark.emulated(sm_80=3, sm_90=24, sm_89=48, sm_120=48)


@cache
def by_eager(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(in float64, in its own dtype) of o and of lse: the same for every target."""
    return list(zip(build(case).double().run("eager"), build(case).run("eager"), strict=True))


def check_values(target: Target, case: Case) -> Tensor:
    results = build(case).run(target.backend)
    for name, actual, (exact, eager) in zip(("o", "lse"), results, by_eager(case), strict=True):
        numerics.check(actual, exact, eager, name)
    return results[0]


@pytest.mark.parametrize("case", CASES + APPENDED, ids=str)
def test_values(target: Target, case: Case) -> None:
    o = check_values(target, case)
    assert o.transpose(1, 2).is_contiguous()  # in q's memory order


PAGES = (1, 2, 3, 16, 17, 32, 64, 128, 256, 1000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_pages_change_no_bit(target: Target, dtype: str, m: int) -> None:
    case = Case(dtype=dtype, m=m, lengths=(600, 5, 0, 256), head_sizes=(72, 48))
    expected = build(case).run(target.backend)
    for page_size in PAGES if target.backend == "cpu" else PAGES[::3]:
        actual = build(replace(case, page_size=page_size)).run(target.backend)
        for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
            numerics.assert_bitwise_equal(x, y, f"{name}, pages of {page_size}")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_halves_of_the_keys_merge(target: Target, dtype: str) -> None:
    call = build(Case(dtype, lengths=(700, 700), causal=False, sinks=False))
    q, (k, v) = call.tensors["q"], call.caches()
    whole, lse = call.run(target.backend)
    parts = []
    for lo, hi in ((0, 333), (333, 700)):
        lengths = torch.tensor([hi - lo] * 2)
        half = Call({"q": q, "k_cache": k[:, :, lo:hi], "v_cache": v[:, :, lo:hi]}, {})
        parts.append(half.run(target.backend, seqlens_k=lengths, causal=False))
    both = torch.stack([part[1] for part in parts])
    torch.testing.assert_close(both.logsumexp(0), lse)
    weights = (both - lse).exp()[..., None]
    merged = sum(w * part[0].float() for w, part in zip(weights, parts, strict=True))
    ulps = 4 + lse.abs().max().item()  # that lse is rounded makes the weights wrong by its ulp
    atol = ulps * torch.finfo(whole.dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(merged, whole.float(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_does_not_depend_on_its_neighbours(target: Target, dtype: str) -> None:
    """Nor on other sequences and heads: what is sampled must not change with the batch."""
    call = build(Case(dtype, m=5, heads=(6, 2), lengths=(600, 17, 301)))
    expected, _ = call.run(target.backend)
    for b, hk in ((0, 1), (2, 0)):
        one = {name: x[b : b + 1] for name, x in call.tensors.items()}
        one = {name: x[:, hk : hk + 1] for name, x in one.items() if name != "q"} | {
            "q": one["q"][:, 3 * hk + 1 : 3 * hk + 2, -1:]
        }
        lengths = call.options["seqlens_k"][b : b + 1]
        alone, _ = Call(one, {}).run(target.backend, seqlens_k=lengths)
        numerics.assert_bitwise_equal(
            alone, expected[b : b + 1, 3 * hk + 1 : 3 * hk + 2, -1:], f"sequence {b}"
        )


def test_sequences_that_share_pages_and_tables_of_any_strides(target: Target) -> None:
    call = build(Case(page_size=16, lengths=(100, 100, 40), m=2))
    q, lengths, table = call.tensors["q"], call.options["seqlens_k"], call.options["block_table"]
    expected, _ = call.run(target.backend)
    call.options["block_table"] = (
        table[[0, 0, 2]].t().contiguous().t()
    )  # the second reads the first's
    call.options["seqlens_k"] = lengths.repeat_interleave(2)[::2]
    call.tensors["q"] = q[[0, 0, 2]]
    actual, _ = call.run(target.backend)
    numerics.assert_bitwise_equal(actual, expected[[0, 0, 2]], "o")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


STEADY = [
    Case(lengths=(1500, 3, 700), heads=(6, 2)),
    Case("bf16", m=3, lengths=(1500,), heads=(3, 1), page_size=16),
    Case("f16", m=2, lengths=(513, 0, 900), window=300, page_size=7, append=False),
    Case("bf16", lengths=(700, 1, 256), heads=(32, 32), append=True),
]


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", STEADY, ids=str)
def test_same_bits_for_every_thread_count_and_run(target: Target, case: Case) -> None:
    torch.set_num_threads(1)
    expected = build(case).run(target.backend)
    for threads in (1, 2, 4) if target.backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        for _ in range(3):
            actual = build(case).run(target.backend)
            for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
                numerics.assert_bitwise_equal(x, y, f"{name}, {threads} threads")


@pytest.mark.parametrize("page_size", [None, 16])
def test_more_queries_than_one_pass_takes(target: Target, page_size: int | None) -> None:
    for heads, m in (((8, 2), 100), ((96, 1), 3)):
        lengths = (130, 300)
        case = Case(heads=heads, m=m, lengths=lengths, page_size=page_size, window=(90, 0))
        check_values(target, case)


# What is never read -------------------------------------------------------------------------------


def test_pages_before_the_window_may_be_gone(target: Target) -> None:
    case = Case(lengths=(200, 90), page_size=16, window=20, m=2)
    call = build(case)
    expected = call.run(target.backend)
    table = call.options["block_table"]
    for b, length in enumerate(case.lengths):
        gone = (length - 2 - 19) // 16  # whole pages that no query sees
        for entry in table[b, :gone]:
            for pages in call.caches():
                pages[entry] = NAN
        table[b, :gone] = -1
    for x, y in zip(call.run(target.backend), expected, strict=True):
        numerics.assert_bitwise_equal(x, y, "with the pages before the window gone")


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_key_in_the_midst(target: Target, dtype: str, bad: float) -> None:
    """Keys that some queries see and others do not: the others keep every bit."""
    call = build(Case(dtype, m=4, lengths=(300, 70)))
    expected, _ = call.run(target.backend)
    k, v = call.caches()
    for b, last in ((0, 299), (1, 69)):
        k[b, :, last], v[b, :, last] = bad, bad
    actual, _ = call.run(target.backend)
    numerics.assert_bitwise_equal(actual[:, :, :3], expected[:, :, :3], "queries before that key")
    if bad != bad:
        assert actual[:, :, 3].isnan().all()


# Sizes of zero, refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("batch, m, n", [(0, 2, 7), (2, 0, 7), (2, 3, 0), (0, 0, 0)])
def test_sizes_of_zero(target: Target, batch: int, m: int, n: int, paged: bool) -> None:
    for heads in ((4, 2), (0, 0)):
        q = torch.randn(batch, heads[0], m, 8)
        k, v = torch.randn(batch, heads[1], n, 8), torch.randn(batch, heads[1], n, 6)
        options: dict[str, Any] = {"seqlens_k": torch.zeros(batch, dtype=torch.int64)}
        if paged:
            options["block_table"] = torch.zeros((batch, 3), dtype=torch.int32)
        o, lse = pyfuse.decode_attention(
            q, k, v, **options, return_lse=True, backend=target.backend
        )
        assert o.shape == (batch, heads[0], m, 6) and (o == 0).all()
        assert lse.shape == (batch, heads[0], m) and (lse == -float("inf")).all()


def test_an_entry_that_is_no_page(target: Target) -> None:
    if target.backend != "cpu":
        pytest.skip("only where the table can be read without a sync")
    for entry in (-1, 4):
        call = build(Case(page_size=16, lengths=(20, 40), append=True))
        call.options["block_table"][1, 2] = entry
        pages = call.tensors["k_cache"].shape[0]
        entry = pages if entry > 0 else entry
        call.options["block_table"][1, 2] = entry
        with pytest.raises(
            ValueError, match=rf"block_table: entry \[1, 2\] is {entry}, .* {pages}"
        ):
            call.run(target.backend)
