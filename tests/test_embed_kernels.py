"""The embedding kernels against the eager formula: values, gradients, dropout, bad ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target, at_threads
from numerics import assert_bitwise_equal, check
from torch import Tensor

import pyfuse
from pyfuse import dispatch
from pyfuse.backends import cpu_module, eager_position
from pyfuse.philox import dropout_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 3, 63, 65, 111, 197]
V, P, S = 50, 40, 3  # rows of the tables
SEED = torch.tensor([2**35 + 11, 5])

Options = dict[str, Any]


def options(d: int, shape: tuple[int, ...], *, dtype: torch.dtype, **chosen: Any) -> Options:
    """The options of a checked call: position, segment, norm say what takes part."""
    position, segment = chosen.pop("position", "none"), chosen.pop("segment", False)
    norm = chosen.pop("norm", "none")
    given: Options = {"dropout_seed": SEED if "dropout_p" in chosen else None, **chosen}
    length = shape[-1]
    if position.startswith("sinusoidal"):
        given["sinusoidal"] = True
    elif position != "none":
        given["position_weight"] = torch.randn(P, d).to(dtype)
    given["positions"] = {
        "at": torch.arange(length).flip(0) % P,
        "each": torch.randint(0, P, shape),
        "each_int32": torch.randint(0, P, shape, dtype=torch.int32),
        "sinusoidal_at": torch.arange(length) + 1000,
        "sinusoidal_far": torch.arange(length) * 10**7 - 5,
    }.get(position)
    if segment:
        given |= {
            "segment_weight": torch.randn(S, d).to(dtype),
            "segment_ids": torch.randint(0, S, shape),
        }
    if norm != "none":
        given["norm_weight"] = torch.randn(d).to(torch.float32 if norm == "f32" else dtype)
    if norm in ("bias", "f32"):
        given["norm_bias"] = torch.randn(d).to(given["norm_weight"].dtype)
    return given


CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "scaled": {"scale": 3.3},
    "learned": {"position": "learned"},
    "learned_at": {"position": "at", "segment": True},
    "each": {"position": "each", "norm": "plain"},
    "each_int32": {"position": "each_int32", "dropout_p": 0.5},
    "bert": {"position": "learned", "segment": True, "norm": "bias", "dropout_p": 0.1},
    "f32_norm": {"position": "learned", "norm": "f32", "eps": 1e-3},
    "segment": {"segment": True, "norm": "plain", "dropout_p": 0.3, "scale": 0.5},
    "vaswani": {"position": "sinusoidal", "scale": 8.0, "dropout_p": 0.1},
    "sinusoidal_at": {"position": "sinusoidal_at", "norm": "bias"},
    "sinusoidal_far": {"position": "sinusoidal_far", "segment": True},
    "dropout": {"dropout_p": 0.999999999},
}


def implementation(backend: str) -> dispatch.Impl:
    impl: dispatch.Impl = dispatch.load(backend).OPS["embed"]
    return impl


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_call(
    target: Target, token_ids: Tensor, weight: Tensor, given: Options, name: str
) -> Tensor:
    impl = implementation(target.backend)
    assert impl.why_not(token_ids, weight, **given) is None
    actual: Tensor = impl.fn(token_ids, weight, **given)
    eager = eager_position.embed(token_ids, weight, **given)
    wide = {key: double(x) for key, x in given.items()}
    exact = eager_position.embed(token_ids, weight.double(), **wide)
    check(actual, exact, eager, name)
    return actual


def leaves_of(weight: Tensor, given: Options) -> dict[str, Tensor]:
    tables = {key: x for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {"weight": weight, **tables}


def eager_gradients(
    dy: Tensor, token_ids: Tensor, weight: Tensor, given: Options
) -> dict[str, Tensor]:
    leaves = {k: x.detach().requires_grad_() for k, x in leaves_of(weight, given).items()}
    y = eager_position.embed(token_ids, **{**given, **leaves})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def kernel_gradients(
    target: Target,
    dy: Tensor,
    token_ids: Tensor,
    weight: Tensor,
    given: Options,
    needs: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    gradient = implementation(target.backend).gradient
    assert gradient is not None
    needs = frozenset(leaves_of(weight, given)) if needs is None else needs
    assert gradient.why_not(needs, token_ids, weight, **given) is None
    _, saved = gradient.forward(token_ids, weight, **given)
    found = gradient.backward((dy,), (token_ids, weight), given, saved, needs)
    assert set(found) == needs
    return found


Call = tuple[Tensor, Tensor, Tensor, Options]  # dy, token_ids, weight, options


def check_gradients(target: Target, calls: list[Call], name: str) -> None:
    """The rule over the gradients of all these calls together: a mean of three numbers is none."""
    found: dict[str, list[list[Tensor]]] = {}
    for dy, token_ids, weight, given in calls:
        actual = kernel_gradients(target, dy, token_ids, weight, given)
        eager = eager_gradients(dy, token_ids, weight, given)
        wide = {key: double(x) for key, x in given.items()}
        exact = eager_gradients(dy.double(), token_ids, weight.double(), wide)
        for key, dx in actual.items():
            assert dx.shape == eager[key].shape
            three = [t.flatten() for t in (dx, exact[key], eager[key])]
            found.setdefault(key, []).append(three)
    for key, results in found.items():
        together = [torch.cat(parts) for parts in zip(*results, strict=True)]
        check(*together, f"{name}: {key}", "gradient")


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
@pytest.mark.parametrize("case", CASES)
def test_gradient(case: str, dtype: torch.dtype, target: Target) -> None:
    shape = (3, 7)
    # Where three columns happen to be nearly equal, a norm blows every rounding error up, the truth's
    # too: float64 has no wider one.
    smallest = (63 if dtype == torch.float64 else 3) if "norm" in CASES[case] else 1
    for d in SIZES[SIZES.index(smallest) :]:
        calls = []
        for _ in range(12 if d < 10 else 1):
            weight, token_ids = torch.randn(V, d).to(dtype), torch.randint(0, V, shape)
            given = options(d, shape, dtype=dtype, **CASES[case])
            calls.append((torch.randn(*shape, d).to(dtype), token_ids, weight, given))
        check_gradients(target, calls, f"D = {d}")


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


def test_rows_that_occur_often(target: Target) -> None:
    """Padding takes most of a batch, and segments are two: such rows are shared out by columns."""
    for d in (5, 197, 300):
        shape = (40, 65)
        token_ids = torch.where(torch.rand(shape) < 0.6, 7, torch.randint(0, V, shape))
        weight, dy = torch.randn(V, d), torch.randn(*shape, d)
        for chosen in ({}, {**CASES["bert"], "position": "each"}):
            given = options(d, shape, dtype=torch.float32, **chosen)
            check_gradients(target, [(dy, token_ids, weight, given)], f"D = {d}")


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


@pytest.mark.parametrize("needs", [{"weight"}, {"norm_bias"}, {"norm_weight", "segment_weight"}])
def test_gradients_of_what_is_needed(needs: set[str], target: Target) -> None:
    token_ids, weight, dy = torch.randint(0, V, (2, 9)), torch.randn(V, 33), torch.randn(2, 9, 33)
    given = options(33, (2, 9), dtype=torch.float32, **CASES["bert"])
    everything = kernel_gradients(target, dy, token_ids, weight, given)
    some = kernel_gradients(target, dy, token_ids, weight, given, frozenset(needs))
    for name, dx in some.items():
        assert_bitwise_equal(dx, everything[name], name)


# ---- dropout: the same mask on every ISA --------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 1 - 2**-40])
def test_dropout_is_that_of_philox(p: float, dtype: torch.dtype, target: Target) -> None:
    """Elements of ones show the mask and the factor, in every bit."""
    for d in [*range(1, 70), 127, 128, 129, 192, 197, 300]:
        weight = torch.ones(1, d, dtype=dtype)
        token_ids = torch.zeros(3, 5, dtype=torch.long)
        wide = torch.promote_types(dtype, torch.float32)
        for seed in (SEED, -SEED, torch.zeros(2, dtype=torch.int64)):
            y = implementation(target.backend).fn(token_ids, weight, dropout_p=p, dropout_seed=seed)
            kept = dropout_mask(seed, (1, 1, 15, d), p).view(3, 5, d)
            factor = torch.tensor(1 / (1 - p), dtype=wide).to(dtype)
            assert torch.equal(y, torch.where(kept, factor, 0.0)), d


# ---- sparse gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["token", "scaled", "bert"])
def test_sparse_gradient(case: str, dtype: torch.dtype, target: Target) -> None:
    token_ids, weight = torch.randint(0, V, (3, 7)), torch.randn(V, 33).to(dtype)
    dy = torch.randn(3, 7, 33).to(dtype)
    given = options(33, (3, 7), dtype=dtype, **CASES[case], sparse=True)
    actual = kernel_gradients(target, dy, token_ids, weight, given)["weight"]
    eager = eager_gradients(dy, token_ids, weight, given)["weight"]
    assert actual.is_sparse and not actual.is_coalesced() and actual.dtype == dtype
    assert torch.equal(actual._indices(), eager._indices())
    wide = {key: double(x) for key, x in given.items()}
    exact = eager_gradients(dy.double(), token_ids, weight.double(), wide)["weight"]
    check(actual._values(), exact._values(), eager._values(), "values", "gradient")


def test_sparse_gradient_reaches_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.randn(V, 4))
    before, token_ids = weight.detach().clone(), torch.tensor([3, 9, 3])
    pyfuse.embed(token_ids, weight, sparse=True).sum().backward()
    assert weight.grad is not None and weight.grad.is_sparse
    torch.optim.SGD([weight], lr=1.0).step()
    moved = torch.zeros(V, 4).index_add(0, token_ids, torch.ones(3, 4))
    torch.testing.assert_close(weight.detach(), before - moved)


# ---- choice and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["token_ids", "positions", "segment_ids"])
def test_id_outside_its_table(name: str, bad: int, target: Target) -> None:
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
        entry.embed_backward(tables, 1, 8, 0, 0, 1.0, norm, None, 0, 1, p, 8, dsum, dnorm)

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
