"""The embedding kernels: values against the eager formula, dropout, bad ids, threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target, at_threads
from embed_cases import (
    CASES,
    DTYPES,
    SEED,
    SIZES,
    Options,
    S,
    V,
    check_call,
    check_gradients,
    implementation,
    kernel_gradients,
    options,
)
from numerics import assert_bitwise_equal

import pyfuse
from pyfuse.backends import cpu_module
from pyfuse.philox import dropout_mask

pytestmark = pytest.mark.emulated(sm_80=5, sm_90=32, sm_89=64, sm_120=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str, dtype: torch.dtype, target: Target) -> None:
    for d in SIZES:
        weight, shape = torch.randn(V, d).to(dtype), (3, 7)
        token_ids = torch.randint(0, V, shape)
        given = options(d, shape, dtype=dtype, **CASES[case])
        y = check_call(target, token_ids, weight, given, f"D = {d}")
        y_too, _ = implementation(target.backend).gradient.forward(token_ids, weight, **given)
        assert_bitwise_equal(y_too, y, "forward that saves")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_one_column(dtype: torch.dtype, target: Target) -> None:
    """It is 0 whatever the tables hold (the eager formula's own rounding makes more of it)."""
    weight, token_ids = torch.randn(V, 1).to(dtype), torch.randint(0, V, (3, 7))
    given = options(1, (3, 7), dtype=dtype, **CASES["f32_norm"])
    y = implementation(target.backend).fn(token_ids, weight, **given)
    assert torch.equal(y, given["norm_bias"].to(dtype).expand(3, 7, 1))
    found = kernel_gradients(target, torch.ones(3, 7, 1, dtype=dtype), token_ids, weight, given)
    assert found.pop("norm_bias").item() == 21
    assert all((dx == 0).all() for dx in found.values())


@pytest.mark.parametrize("shape", [(1,), (5,), (197,), (2, 3, 4), (0,), (3, 0), (0, 3)])
def test_shapes_of_ids(shape: tuple[int, ...], target: Target) -> None:
    token_ids = torch.randint(0, V, shape, dtype=torch.int32)
    dy, weight = torch.randn(*shape, 12), torch.randn(V, 12)
    length = {**CASES["bert"], "position": "each"}
    for chosen in ({}, length, CASES["vaswani"]):
        given = options(12, shape, dtype=torch.float32, **chosen)
        check_call(target, token_ids, weight, given, str(shape))
        check_gradients(target, [(dy, token_ids, weight, given)], str(shape))


def test_tables_without_columns_or_rows(target: Target) -> None:
    ids, embed = torch.zeros(3, dtype=torch.long), implementation(target.backend).fn
    assert embed(ids, torch.zeros(4, 0)).shape == (3, 0)
    assert embed(ids[:0], torch.zeros(0, 4)).shape == (0, 4)
    if target.backend != "cpu":
        assert embed(ids, torch.zeros(0, 4)).isnan().all()
    else:
        with pytest.raises(IndexError, match="weight has 0 rows"):
            embed(ids, torch.zeros(0, 4))
    for weight, some in ((torch.zeros(4, 0), ids), (torch.zeros(0, 4), ids[:0])):
        dy = torch.zeros(len(some), weight.shape[1])
        assert kernel_gradients(target, dy, some, weight, {})["weight"].shape == weight.shape


def test_strides(target: Target) -> None:
    """Tables that are columns of wider ones, ids and gradients in any memory."""
    wide = torch.full((V, 30), float("nan"))
    wide[:, 4:25] = torch.randn(V, 21)
    token_ids = torch.randint(0, V, (7, 6)).T[::2]
    chosen = {"position": "learned", "segment": True, "norm": "bias"}
    given = options(21, (3, 7), dtype=torch.float32, **chosen)
    given["segment_ids"] = torch.randint(0, S, (1, 7)).expand(3, 7)
    given["position_weight"] = given["position_weight"][::2]
    given["norm_weight"] = torch.randn(42)[::2]
    check_call(target, token_ids, wide[:, 4:25], given, "strides")
    for dy in (
        torch.ones(()).expand(3, 7, 21),
        torch.randn(7, 21).expand(3, 7, 21),
        torch.randn(21, 7, 3).permute(2, 1, 0),
        torch.randn(3, 7, 42)[..., 1::2],
        torch.randn(3, 14, 21)[:, ::2],
    ):
        for call in (given, {}):
            check_gradients(target, [(dy, token_ids, wide[:, 4:25], call)], f"{dy.stride()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["token", "bert", "vaswani"])
def test_threads_change_no_bit(case: str, dtype: torch.dtype, target: Target) -> None:
    shape, d = (21, 111), 197
    token_ids = torch.randint(0, 1000, shape) % 700
    token_ids[:, 40:] = 3
    weight, dy = torch.randn(1000, d).to(dtype), torch.randn(*shape, d).to(dtype)
    chosen = {**CASES[case], "position": "each"} if case == "bert" else CASES[case]
    given = options(d, shape, dtype=dtype, **chosen)
    results = []
    for _ in at_threads(1, 2, 4):
        y = implementation(target.backend).fn(token_ids, weight, **given)
        results.append({"y": y, **kernel_gradients(target, dy, token_ids, weight, given)})
    for result in results[1:]:
        for name, t in result.items():
            assert_bitwise_equal(t, results[0][name], name)


# ---- dropout: the same mask on every ISA --------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 1 - 2**-40])
def test_dropout_is_that_of_philox(p: float, dtype: torch.dtype, target: Target) -> None:
    """Elements of ones show the mask and the factor, in every bit."""
    every = [*range(1, 70), 127, 128, 129, 192, 197, 300]
    for d in [1, 3, 64, 197] if target.backend != "cpu" else every:  # each compiled apart
        weight = torch.ones(1, d, dtype=dtype)
        token_ids = torch.zeros(3, 5, dtype=torch.long)
        wide = torch.promote_types(dtype, torch.float32)
        for seed in (SEED, -SEED, torch.zeros(2, dtype=torch.int64)):
            y = implementation(target.backend).fn(token_ids, weight, dropout_p=p, dropout_seed=seed)
            kept = dropout_mask(seed, (1, 1, 15, d), p).view(3, 5, d)
            factor = torch.tensor(1 / (1 - p), dtype=wide).to(dtype)
            assert torch.equal(y, torch.where(kept, factor, 0.0)), d


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["token", "bert"])
def test_what_is_dropped_does_not_matter(
    case: str, dtype: torch.dtype, bad: float, target: Target
) -> None:
    """NaN times 0 is NaN: dropout selects, forward and backward."""
    for d in (3, 65, 111):
        token_ids, weight = torch.randint(0, V, (3, 7)), torch.randn(V, d).to(dtype)
        given = options(d, (3, 7), dtype=dtype, **CASES[case])
        given |= {"dropout_p": 0.5, "dropout_seed": SEED}
        kept = dropout_mask(SEED, (1, 1, 21, d), 0.5).view(3, 7, d)
        dy = torch.randn(3, 7, d).to(dtype)
        expected = kernel_gradients(target, dy.where(kept, 0.0), token_ids, weight, given)
        found = kernel_gradients(target, dy.where(kept, bad), token_ids, weight, given)
        for name, dx in found.items():
            assert_bitwise_equal(dx, expected[name], f"D = {d}: {name}")
        weight[::2] = bad
        y = implementation(target.backend).fn(token_ids, weight, **given)
        assert (y[~kept] == 0).all() and not y[kept].isfinite().all()


# ---- choice and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["token_ids", "positions", "segment_ids"])
def test_id_outside_its_table(name: str, bad: int, target: Target) -> None:
    if target.backend != "cpu":
        pytest.skip("to raise, the host would have to wait for the GPU: see test_cuda_position.py")
    table = torch.randn(V, 8)
    good = torch.arange(6).view(2, 3)
    wrong = good.clone()
    wrong[1, 1] = bad
    given: Options = {"position_weight": table, "segment_weight": table}
    given |= {"token_ids": good, "positions": good, "segment_ids": good, name: wrong}
    with pytest.raises(IndexError, match=f"{name}: index out of range: got {bad}, .* {V} rows"):
        pyfuse.embed(weight=table, **given, backend=target.backend)
    embed = implementation(target.backend)
    checked = {key: x for key, x in given.items() if key != "token_ids"}
    with pytest.raises(IndexError, match=name):
        embed.gradient.backward(
            (torch.zeros(2, 3, 8),),
            (given["token_ids"], table),
            {**checked, "dropout_p": 0.5, "dropout_seed": SEED},
            (None,),
            frozenset({"weight"}),
        )


def test_column_tables_are_refused_with_a_reason(target: Target) -> None:
    ids, table = torch.arange(5), torch.randn(8, V).T
    for name, call in {
        "weight": lambda backend: pyfuse.embed(ids, table, backend=backend),
        "position_weight": lambda backend: pyfuse.embed(
            ids, table.contiguous(), position_weight=table, backend=backend
        ),
    }.items():
        expected = call("eager")
        with pytest.raises(NotImplementedError, match=f"{name} has stride {V} in its last"):
            call(target.backend)
        torch.testing.assert_close(call(None), expected)


def refusals() -> list[tuple[str, Callable[[], Any]]]:
    entry, p = cpu_module.module(), torch.zeros(64).data_ptr()
    table = (p, 8, 2, p, 1)
    tables = (table, None, None)

    def embed(tables: Any = tables, norm: Any = None, dropout: Any = None, y: int = p) -> None:
        entry.embed(tables, 1, 8, 0, 0, 1.0, norm, dropout, 0, 1, y)

    def backward(norm: Any, dsum: int, dnorm: int) -> None:
        entry.embed_gradient(tables, 1, 8, 0, 0, 1.0, norm, None, 0, 1, p, 8, dsum, dnorm)

    return [
        ("y: null data pointer", lambda: embed(y=0)),
        ("weight: null", lambda: embed(((0, 8, 2, p, 1), None, None))),
        ("ids: null", lambda: embed(((p, 8, 2, 0, 1), None, None))),
        ("segment_weight: null", lambda: embed((table, None, (0, 8, 2, p, 1)))),
        ("weight: None", lambda: embed((None, None, None))),
        ("norm_weight: null", lambda: embed(norm=(0, 0, 1e-5))),
        ("dropout_seed: null", lambda: embed(dropout=(0, 0.5))),
        ("0 <= p < 1", lambda: embed(dropout=(p, 1.0))),
        ("statistics: null", lambda: backward((p, p, 1e-5), p, p)),
        ("dsum is all there is", lambda: backward(None, 0, p)),
        ("rows: null", lambda: entry.row_sums(0, 8, 1, 8, p, 1, p, 2, 0, 0, 1.0, 1)),
        ("y: null", lambda: entry.row_sums(p, 8, 1, 8, p, 1, 0, 2, 0, 0, 1.0, 1)),
        ("y's dtype", lambda: entry.row_sums(p, 8, 1, 8, p, 1, p, 2, 1, 0, 1.0, 1)),
    ]  # fmt: skip


def test_kernel_entries_refuse_what_would_crash(target: Target) -> None:
    if target.backend != "cpu":
        pytest.skip("the CPU kernels' entries")
    for message, call in refusals():
        with pytest.raises(ValueError, match=message):
            call()
