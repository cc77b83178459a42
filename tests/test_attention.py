"""Every backend of attention, and every ISA of the CPU kernels, held to eager in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numerics
import oracle
import pytest
import torch
from cases import ALL, SINGLE, WITHOUT_EFFECT, Case, Inputs, build, laid_out
from conftest import Target
from torch import Tensor

from pyfuse.ops.attention import attention

INF = float("inf")


def call(backend: str, inputs: Inputs, **options: Any) -> Any:
    """attention on that backend, dropout seeded alike each time; a refusal skips the test."""
    torch.manual_seed(1)
    try:
        return attention(*inputs.tensors, **(inputs.options | options), backend=backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal).splitlines()[-1].strip())


def values(backend: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    o, lse = call(backend, inputs, return_lse=True)
    return o, lse


@pytest.mark.parametrize("case", ALL, ids=str)
def test_values(target: Target, case: Case) -> None:
    inputs = build(case)
    o, lse = values(target.backend, inputs)
    exact_o, exact_lse = values("eager", inputs.double())
    eager_o, eager_lse = values("eager", inputs)
    numerics.check(o, exact_o, eager_o, "o")
    numerics.check(lse, exact_lse, eager_lse, "lse")
    assert in_memory_order_of(inputs.tensors[0], o) and in_memory_order_of(
        inputs.tensors[0], eager_o
    )
    alone = call(target.backend, inputs)
    numerics.assert_bitwise_equal(alone, o, "o without lse")


def in_memory_order_of(q: Tensor, o: Tensor) -> bool:
    return (o.transpose(1, 2) if q.stride(1) < q.stride(2) else o).is_contiguous()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients(target: Target, case: Case) -> None:
    upstream = torch.randn(*build(case).tensors[0].shape[:3], case.head_sizes[1])
    actual = gradients(target.backend, build(case), upstream)
    exact = gradients("eager", build(case).double(), upstream)
    eager = gradients("eager", build(case), upstream)
    for name in actual:
        numerics.check(actual[name], exact[name], eager[name], f"d{name}", "gradient")


def gradients(backend: str, inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    leaves = inputs.differentiable()
    o, lse = values(backend, inputs)
    loss = (o * upstream.to(o.dtype)).sum() + lse.masked_fill(lse == -INF, 0.0).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("case", [Case(), *SINGLE], ids=str)
def test_the_default_call_has_gradients(case: Case, dtype: str) -> None:
    """Whatever backend that is, and with the dropout mask of the values."""
    case = replace(case, dtype=dtype, sizes=(17, 21))
    upstream = torch.randn(case.batch, case.heads[0], 17, case.head_sizes[1])
    inputs = build(case)
    leaves = inputs.differentiable()
    torch.manual_seed(1)
    o = attention(*inputs.tensors, **inputs.options)
    actual = torch.autograd.grad((o * upstream.to(o.dtype)).sum(), list(leaves.values()))
    assert o.grad_fn is not None
    exact = gradients_of_o(build(case).double(), upstream)
    eager = gradients_of_o(build(case), upstream)
    for name, grad in zip(leaves, actual, strict=True):
        numerics.check(grad, exact[name], eager[name], f"d{name}", "gradient")


def gradients_of_o(inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    leaves = inputs.differentiable()
    o = call("eager", inputs)
    grads = torch.autograd.grad((o * upstream.to(o.dtype)).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_takes_what_models_need(target: Target, dtype: str) -> None:
    """These must run, so that no kernel passes this file by refusing everything."""
    common = Case(dtype=dtype, sizes=(9, 9))
    for case in (
        common,
        replace(common, causal=True),
        replace(common, mask="padding", sizes=(1, 65)),
        replace(common, mask="bias"),
        replace(common, causal=True, window=4),
    ):
        attention(*build(case).tensors, **build(case).options, backend=target.backend)


# One answer ---------------------------------------------------------------------------------------

STEADY = [
    Case(sizes=(197, 197), causal=True),
    Case(sizes=(1, 2000), batch=1, mask="padding"),
    Case(sizes=(3, 1111), dtype="bf16", heads=(6, 1)),
    Case(sizes=(65, 300), dtype="f16", mask="bias", seqlens="any"),
    Case(sizes=(130, 130), dtype="f64", window=16),
]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", STEADY, ids=str)
def test_same_bits_for_every_thread_count_and_run(target: Target, case: Case) -> None:
    inputs = build(case)
    torch.set_num_threads(1)
    expected = values(target.backend, inputs)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(2):
            o, lse = values(target.backend, inputs)
            numerics.assert_bitwise_equal(o, expected[0], f"o, {threads} threads")
            numerics.assert_bitwise_equal(lse, expected[1], f"lse, {threads} threads")


@pytest.mark.parametrize("case", STEADY, ids=str)
def test_same_bits_for_every_layout(target: Target, case: Case) -> None:
    q, k, v = build(case).tensors
    options = build(case).options
    expected = call(target.backend, Inputs((q, k, v), options))
    # Of rows that do not start at multiples of 16 bytes Hopper's copy engine knows nothing: they take another kernel.
    by_tma = target.backend == "cuda" and target.arch == 90 and q.dtype != torch.float32
    for layout in ("BHMD", "MBHD") if by_tma else ("BHMD", "MBHD", "slice"):
        a, b, c = (laid_out(x, layout) for x in (q, k, v))
        actual = call(target.backend, Inputs((a, b, c), options))
        numerics.assert_bitwise_equal(actual, expected, layout)


@pytest.mark.parametrize("case", [Case(batch=3, dtype=d, mask="float") for d in ("f32", "bf16")])
def test_batch_and_heads_do_not_meet(target: Target, case: Case) -> None:
    """Permuted batch and permuted key heads (with their groups) permute the result, to the bit."""
    q, k, v = build(case).tensors
    mask = build(case).options["mask"]
    order, groups = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    heads = torch.tensor([2, 3, 0, 1])
    expected = call(target.backend, Inputs((q, k, v), {"mask": mask}))[order][:, heads]
    permuted = Inputs((q[order][:, heads], k[order][:, groups], v[order][:, groups]))
    actual = call(target.backend, permuted, mask=mask[order][:, heads])
    numerics.assert_bitwise_equal(actual, expected, "o")


# Keys that are hidden -----------------------------------------------------------------------------

HIDING: dict[str, dict[str, Any]] = {
    "seqlens": {"seqlens_k": torch.tensor([70, 0])},
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "bool-mask": {"mask": torch.rand(65, 111, generator=torch.Generator().manual_seed(2)) > 0.5},
    "padding-mask": {"mask": torch.arange(111) % 7 > 1},
    "inf-mask": {
        "mask": torch.zeros(65, 111).masked_fill(
            torch.arange(111) > torch.arange(65)[:, None], -INF
        )
    },
    "lowest-mask": {
        "mask": torch.zeros(65, 111).masked_fill(
            torch.arange(111) > torch.arange(65)[:, None], torch.finfo(torch.float32).min
        )
    },
}


def visible(options: dict[str, Any], batch: int, m: int, n: int) -> Tensor:
    """[B, 1, M, N], by the rule of the loops."""
    mask = options.get("mask", torch.tensor(True))
    mask = mask if mask.dtype == torch.bool else mask == 0
    lengths = options.get("seqlens_k", torch.full((batch,), n)).tolist()
    band = options.get("window", (None, None))
    causal = options.get("causal", False)
    rows = [
        [
            [oracle.sees(i, j, m, n, causal=causal, band=band, length=length) for j in range(n)]
            for i in range(m)
        ]
        for length in lengths
    ]
    return torch.tensor(rows)[:, None] & mask.expand(m, n)


@pytest.mark.parametrize("bad", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("name", HIDING)
def test_hidden_keys_change_nothing(target: Target, name: str, dtype: str, bad: float) -> None:
    """NaN in a few keys and values: no bit of the queries that do not see them changes."""
    inputs = build(Case(dtype=dtype))
    q, k, v = inputs.tensors
    options = HIDING[name]
    seen = visible(options, 2, 65, 111)
    expected = values(target.backend, Inputs(inputs.tensors, options))
    for keys in (slice(109, 111), slice(60, 61), slice(70, 111)):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, keys], bad_v[:, :, keys] = bad, bad
        o, lse = values(target.backend, Inputs((q, bad_k, bad_v), options))
        sees_bad = seen[..., keys].any(-1).expand(2, 4, 65)
        clean = ~sees_bad
        numerics.assert_bitwise_equal(o[clean], expected[0][clean], f"o, keys {keys}")
        numerics.assert_bitwise_equal(lse[clean], expected[1][clean], f"lse, keys {keys}")
        if bad != bad:
            assert o[sees_bad].isnan().all(), f"NaN in visible keys {keys} does not show"


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_queries_that_see_nothing(target: Target, dtype: str, sinks: bool) -> None:
    inputs = build(Case(dtype=dtype, sizes=(70, 50), causal=True, sinks=sinks))
    inputs.options["seqlens_k"] = torch.tensor([50, 0])
    o, lse = values(target.backend, inputs)
    empty = torch.zeros(2, 4, 70, dtype=torch.bool)
    empty[0, :, :20], empty[1] = True, True
    assert (o[empty] == 0).all() and o[~empty].any()
    expected = inputs.options["sinks"][:, None] if sinks else torch.tensor(-INF)
    torch.testing.assert_close(lse[empty], expected.to(lse.dtype).expand(2, 4, 70)[empty])
    assert lse[~empty].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_the_lowest_numbers_of_a_mask_hide(
    target: Target, dtype: str, softcap: float | None
) -> None:
    """finfo.min, Hugging Face's other way to hide, in some keys and in whole rows: every bit, gradients
    included, is that of -inf, and none is NaN."""
    inputs = build(Case(dtype=dtype))
    keep = torch.rand(65, 111, generator=torch.Generator().manual_seed(4)) > 1 / 3
    keep[[0, 17, 64]] = False
    mask_dtype = torch.float32 if dtype == "f16" else inputs.tensors[0].dtype

    def results(hiding: float) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs.tensors]
        mask = torch.zeros(65, 111, dtype=mask_dtype).masked_fill(~keep, hiding).requires_grad_()
        options = {"mask": mask, "softcap": softcap, "return_lse": True}
        o, lse = call(target.backend, Inputs(leaves, options))
        o.float().square().sum().backward()
        return [o.detach(), lse.detach(), *(x.grad for x in (*leaves, mask) if x.grad is not None)]

    actual, expected = results(torch.finfo(mask_dtype).min), results(-INF)
    names = ("o", "lse", "dq", "dk", "dv", "dmask")
    for name, one, other in zip(names, actual, expected, strict=True):
        numerics.assert_bitwise_equal(one, other, name)
        assert not one.isnan().any(), name


# Identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_options_without_effect(target: Target, dtype: str) -> None:
    inputs = build(Case(dtype=dtype))
    expected = call(target.backend, inputs)
    close = {"rtol": 0.0, "atol": 4 * torch.finfo(expected.dtype).eps}
    exact, eager = call("eager", inputs.double()), call("eager", inputs)
    for options in WITHOUT_EFFECT:
        actual = call(target.backend, inputs, **options)
        numerics.check(actual, exact, eager, str(options))
        if (
            target.backend == "cuda"
        ):  # options are another kernel there, whose sums have another order
            continue
        torch.testing.assert_close(actual, expected, **close, msg=lambda m, o=options: f"{o}: {m}")


def test_window_of_a_number_is_the_last_keys(target: Target) -> None:
    inputs = build(Case(sizes=(40, 60)))
    expected = call(target.backend, inputs, window=(6, 0))
    numerics.assert_bitwise_equal(call(target.backend, inputs, window=7), expected, "window=7")
    both = call(target.backend, inputs, window=(6, None), causal=True)
    numerics.assert_bitwise_equal(both, expected, "causal and left")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parts_of_the_keys_merge(target: Target, dtype: str) -> None:
    """The lse of two parts weighs their outputs to that of the whole."""
    inputs = build(Case(dtype=dtype))
    q, k, v = inputs.tensors
    whole, lse = values(target.backend, inputs)
    parts = [
        values(target.backend, Inputs((q, k[:, :, keys], v[:, :, keys])))
        for keys in (slice(0, 37), slice(37, 111))
    ]
    both = torch.stack([part[1] for part in parts])
    torch.testing.assert_close(both.logsumexp(0), lse)
    weights = (both - lse).exp()[..., None]
    merged = sum(w * part[0].float() for w, part in zip(weights, parts, strict=True))
    exact, eager = (values("eager", given)[0] for given in (inputs.double(), inputs))
    numerics.check(merged.to(whole.dtype), exact, eager, "merged")


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_sizes_of_zero(target: Target, dtype: str, sizes: tuple[int, int, int]) -> None:
    batch, m, n = sizes
    for heads in ((4, 2), (0, 0)):
        case = Case(batch=batch, heads=heads, sizes=(m, n), dtype=dtype, head_sizes=(8, 6))
        o, lse = values(target.backend, build(case))
        assert o.shape == (batch, heads[0], m, 6) and lse.shape == (batch, heads[0], m)
        assert (o == 0).all() and (lse == -INF).all()


def test_inputs_are_left_alone(target: Target) -> None:
    inputs = build(Case(mask="bias", sinks=True, seqlens="any", layout="slice"))
    copies = [x.clone() for x in inputs.tensors]
    mask = inputs.options["mask"].clone()
    call(target.backend, inputs)
    for x, copy in zip(inputs.tensors, copies, strict=True):
        numerics.assert_bitwise_equal(x, copy, "input")
    numerics.assert_bitwise_equal(inputs.options["mask"], mask, "mask")
