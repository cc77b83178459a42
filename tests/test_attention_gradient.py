"""The backward of attention beyond what test_attention.py covers: many chunks of keys, packed sequences, one
answer for every thread count, broadcast masks, what hidden keys hold."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import torch
from cases import WITHOUT_EFFECT
from conftest import Target, at_threads
from torch import Tensor

from pyfuse import attention, varlen_attention

INF = float("inf")


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def gradients(
    leaves: dict[str, Tensor], backend: str, upstream: Tensor, wide: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Those of every leaf: q, k, v and options by name; dropout seeded alike each time."""
    points = {n: (x.double() if wide else x).detach().requires_grad_() for n, x in leaves.items()}
    q, k, v = (points[n] for n in "qkv")
    given = {n: x for n, x in points.items() if n not in "qkv"} | options
    cu_seqlens = given.pop("cu_seqlens", None)
    torch.manual_seed(1)
    if cu_seqlens is None:
        o, lse = attention(q, k, v, return_lse=True, backend=backend, **given)
    else:
        o, lse = varlen_attention(q, k, v, *cu_seqlens, return_lse=True, backend=backend, **given)
    loss = (o * upstream.to(o.dtype)).sum() + lse.masked_fill(lse == -INF, 0.0).sum()
    return dict(zip(points, torch.autograd.grad(loss, list(points.values())), strict=True))


def check(leaves: dict[str, Tensor], backend: str, upstream: Tensor, **options: Any) -> None:
    actual = gradients(leaves, backend, upstream, **options)
    exact = gradients(leaves, "eager", upstream, wide=True, **options)
    eager = gradients(leaves, "eager", upstream, **options)
    for name, grad in actual.items():
        numerics.check(grad, exact[name], eager[name], f"d{name}", "gradient")


# Batch, Hq, Hk, M, N: one head in many chunks, a group, more heads than one chunk each, few keys.
LONG = [(1, 1, 1, 300, 1500), (1, 6, 2, 150, 900), (20, 4, 2, 65, 300), (2, 3, 3, 700, 64)]


def within_reach(sizes: tuple[int, ...], target: Target) -> tuple[int, ...]:
    """For the emulator, which takes a second for so many products as the CPU's kernels make in a millisecond: fewer
    heads, still in groups, and still several tiles of each."""
    if target.arch is None or torch.cuda.is_available():
        return sizes
    batch, hq, hk, m, n = sizes
    hk_left = 1 if m * n > 20000 else min(hk, 2)
    return min(batch, 2), hq // hk * hk_left, hk_left, min(m, 300), min(n, 700)


@pytest.mark.backends("cuda", "triton")
@pytest.mark.parametrize("d", [64, 128, 256])
def test_long_sums_do_not_drift(target: Target, d: int) -> None:
    """Tensor cores cut off: each step of a sum in float32 would take it a little nearer to zero."""
    q, k, v = (made(1, 1, rows, d) for rows in (32, 1024, 1024))
    exact, eager, actual = (
        attention(*(t.to(dtype) for t in (q, k, v)), backend=backend)
        for backend, dtype in (
            ("eager", torch.float64),
            ("eager", torch.float32),
            (target.backend, torch.float32),
        )
    )
    numerics.check(actual, exact, eager, "o")
    check({"q": q, "k": k, "v": v}, target.backend, made(1, 1, 32, d))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 50)}], ids=str)
@pytest.mark.parametrize("sizes", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles(
    target: Target, sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    batch, hq, hk, m, n = within_reach(sizes, target)
    leaves = {
        "q": made(batch, hq, m, 64, dtype=dtype),
        "k": made(batch, hk, n, 64, dtype=dtype),
        "v": made(batch, hk, n, 32, dtype=dtype),
    }
    check(leaves, target.backend, made(batch, hq, m, 32), **options)


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window-sinks": {"window": 16, "sinks": torch.linspace(-1, 1, 4)},
    "dropout": {"dropout_p": 0.2},
    "softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_sequences(target: Target, name: str, dtype: torch.dtype) -> None:
    """Sequences without queries, without keys or without either, and rows that belong to none."""
    bounds = (torch.tensor([0, 5, 5, 135, 135, 196]), torch.tensor([0, 7, 11, 11, 11, 211]))
    leaves = {
        "q": made(199, 4, 40, dtype=dtype),
        "k": made(213, 2, 40, dtype=dtype),
        "v": made(213, 2, 33, dtype=dtype),
    }
    options: dict[str, Any] = {}
    for key, value in PACKED[name].items():
        if isinstance(value, Tensor):
            leaves[key] = value.to(torch.promote_types(dtype, torch.float32))
        else:
            options[key] = value
    check(leaves, target.backend, made(199, 4, 33), cu_seqlens=bounds, **options)


STEADY: dict[str, dict[str, Any]] = {
    "causal-dropout": {"causal": True, "dropout_p": 0.1},
    "window-softcap": {"window": (100, 50), "softcap": 3.0},
}


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("sizes", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_thread_count_and_run(
    target: Target, sizes: tuple[int, ...], name: str, dtype: torch.dtype
) -> None:
    batch, hq, hk, m, n = within_reach(sizes, target)
    leaves = {
        "q": made(batch, hq, m, 40, dtype=dtype),
        "k": made(batch, hk, n, 40, dtype=dtype),
        "v": made(batch, hk, n, 40, dtype=dtype),
        "mask": made(1, hq, m, n, dtype=dtype),
        "sinks": made(hq),
        "alibi_slopes": made(hq).abs(),
    }
    upstream = made(batch, hq, m, 40)
    expected: dict[str, Tensor] = {}
    counts = (
        (1, 2, 2, 4) if target.backend == "cpu" else (1, 1)
    )  # on a GPU: other orders of programs
    for threads in at_threads(*counts):
        actual = gradients(leaves, target.backend, upstream, **STEADY[name])
        expected = expected or actual
        for leaf, grad in actual.items():
            numerics.assert_bitwise_equal(grad, expected[leaf], f"d{leaf}, {threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_and_heads_do_not_meet(target: Target, dtype: torch.dtype) -> None:
    """Permuted batch and permuted key heads (with their groups) permute the gradients, to the bit."""
    leaves = {
        "q": made(3, 4, 65, 40, dtype=dtype),
        "k": made(3, 2, 111, 40, dtype=dtype),
        "v": made(3, 2, 111, 33, dtype=dtype),
        "mask": made(3, 4, 65, 111, dtype=dtype),
    }
    upstream = made(3, 4, 65, 33)
    sequences, groups, heads = (
        torch.tensor([2, 0, 1]),
        torch.tensor([1, 0]),
        torch.tensor([2, 3, 0, 1]),
    )
    order = {"q": heads, "k": groups, "v": groups, "mask": heads}
    expected = gradients(leaves, target.backend, upstream)
    permuted = {name: x[sequences][:, order[name]] for name, x in leaves.items()}
    actual = gradients(permuted, target.backend, upstream[sequences][:, heads])
    for name, grad in actual.items():
        of_order = expected[name][sequences][:, order[name]]
        numerics.assert_bitwise_equal(grad, of_order, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options_without_effect(target: Target, dtype: torch.dtype) -> None:
    leaves = {
        "q": made(2, 4, 65, 64, dtype=dtype),
        "k": made(2, 2, 111, 64, dtype=dtype),
        "v": made(2, 2, 111, 64, dtype=dtype),
    }
    upstream = made(2, 4, 65, 64)
    expected = gradients(leaves, target.backend, upstream)
    for options in WITHOUT_EFFECT:
        actual = gradients(leaves, target.backend, upstream, **options)
        for name, grad in actual.items():
            atol = 8 * torch.finfo(dtype).eps * expected[name].abs().max().item()
            torch.testing.assert_close(
                grad, expected[name], rtol=0.0, atol=atol, msg=lambda m, o=options: f"{o}: {m}"
            )


@pytest.mark.parametrize(
    "shape",
    [(1,), (70,), (33, 1), (2, 1, 33, 70), (1, 4, 1, 70), (2, 4, 33, 1), (2, 1, 1, 70)],
    ids=str,
)
def test_the_gradient_of_a_broadcast_mask_is_the_sum(
    target: Target, shape: tuple[int, ...]
) -> None:
    leaves = {"q": made(2, 4, 33, 24), "k": made(2, 2, 70, 24), "v": made(2, 2, 70, 24)}
    small = made(*shape)
    whole = small.expand(2, 4, 33, 70).contiguous()
    upstream = made(2, 4, 33, 24)
    of_small = gradients(leaves | {"mask": small}, target.backend, upstream)["mask"]
    of_whole = gradients(leaves | {"mask": whole}, target.backend, upstream)["mask"].double()
    lead = of_whole.ndim - len(shape)
    kept = [i for i in range(4) if i >= lead and shape[i - lead] != 1]
    summed = of_whole.sum([i for i in range(4) if i not in kept], keepdim=True)
    torch.testing.assert_close(of_small.double(), summed.reshape(shape), rtol=1e-5, atol=1e-4)


# Whatever else a call has, the keys 7, 60 and from 100 on are hidden by a mask, or those from 100 on
# by the lengths.
HIDING: dict[str, dict[str, Any]] = {
    "mask": {},
    "mask-causal": {"causal": True},
    "mask-window-dropout": {"window": (3, 0), "dropout_p": 0.2},
    "mask-softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25])},
    "lengths": {"seqlens_k": torch.tensor([100, 100])},
    "lengths-causal": {"seqlens_k": torch.tensor([100, 100]), "causal": True},
}


@pytest.mark.parametrize("bad", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hidden_keys_change_nothing(
    target: Target, name: str, dtype: torch.dtype, bad: float
) -> None:
    """Padding that holds NaN gets no gradient, and those of the others stay as they were."""
    leaves = {
        "q": made(2, 2, 90, 24, dtype=dtype),
        "k": made(2, 2, 130, 24, dtype=dtype),
        "v": made(2, 2, 130, 24, dtype=dtype),
    }
    upstream = made(2, 2, 90, 24)
    seen = torch.arange(130) < 100
    options = dict(HIDING[name])
    if name.startswith("mask"):
        seen[[7, 60]] = False
        options["mask"] = seen
    expected = gradients(leaves, target.backend, upstream, **options)
    poisoned = {n: x.clone() for n, x in leaves.items()}
    poisoned["k"][:, :, ~seen], poisoned["v"][:, :, ~seen] = bad, bad
    actual = gradients(poisoned, target.backend, upstream, **options)
    eps = torch.finfo(dtype).eps
    for n, grad in actual.items():
        atol = 8 * eps * expected[n].abs().max().item()
        torch.testing.assert_close(grad, expected[n], rtol=0.0, atol=atol)
        assert n == "q" or not grad[:, :, ~seen].any()


def test_a_nan_stays_with_the_queries_that_see_it(target: Target) -> None:
    leaves = {"q": made(1, 1, 90, 24), "k": made(1, 1, 90, 24), "v": made(1, 1, 90, 24)}
    leaves["k"][0, 0, 60, 3] = float("nan")
    d_q = gradients(leaves, target.backend, made(1, 1, 90, 24), causal=True)["q"][0, 0]
    assert d_q[:60].isfinite().all() and d_q[60:].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(target: Target, sizes: tuple[int, int]) -> None:
    m, n = sizes
    leaves = {"q": made(2, 2, m, 8), "k": made(2, 2, n, 8), "v": made(2, 2, n, 8)}
    for name, grad in gradients(leaves, target.backend, made(2, 2, m, 8)).items():
        assert grad.shape == leaves[name].shape and not grad.any()


def test_only_what_is_wanted(target: Target) -> None:
    """A bias alone, as of a frozen model with trained positions; upstream gradients that are expanded."""
    q, k, v = made(1, 2, 9, 8), made(1, 2, 9, 8), made(1, 2, 9, 8)
    found = []
    for backend in (target.backend, "eager"):
        bias = torch.zeros(9, 9, requires_grad=True)
        attention(q, k, v, mask=bias, backend=backend).sum().backward()
        assert bias.grad is not None
        found.append(bias.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "varlen"])
def test_derivatives_in_float64(target: Target, kind: str) -> None:
    """gradcheck by the kernels, gradgradcheck through the formula."""
    shape = (11, 2, 5) if kind == "varlen" else (1, 2, 5, 5)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 4, 11])

    def function(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor, bias: Tensor | None = None
    ) -> Any:
        options = {"sinks": sinks, "alibi_slopes": slopes, "softcap": 3.0, "causal": True}
        torch.manual_seed(3)
        if kind == "varlen":
            return varlen_attention(
                q, k, v, bounds, bounds, dropout_p=0.3, return_lse=True, **options
            )
        return attention(q, k, v, mask=bias, dropout_p=0.3, return_lse=True, **options)

    point = (q, k, v, sinks, slopes, *([] if kind == "varlen" else [bias]))
    torch.autograd.gradcheck(function, point)
    torch.autograd.gradgradcheck(function, point)


def test_dropout_drops_what_eager_drops(target: Target) -> None:
    """With v the identity, o holds the weights, so that zeros show the mask; bit by bit the same."""
    q, k = made(2, 2, 70, 16), made(2, 2, 130, 16)
    v = torch.eye(130).expand(2, 2, 130, 130)
    dropped = []
    for backend in (target.backend, "eager"):
        torch.manual_seed(5)
        dropped.append(attention(q, k, v, dropout_p=0.4, backend=backend) == 0)
    assert torch.equal(dropped[0], dropped[1])
    assert 0.38 < dropped[0].double().mean() < 0.42


def test_no_sequences(target: Target) -> None:
    """Rows that belong to none of no sequences: zeros, and zero gradients."""
    leaves = {"q": made(3, 2, 8), "k": made(4, 2, 8), "v": made(4, 2, 8)}
    bounds = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for grad in gradients(leaves, target.backend, made(3, 2, 8), cu_seqlens=bounds).values():
        assert not grad.any()
