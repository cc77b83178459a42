"""The oracle itself: eager attention against its definition in Python loops, torch, and calculus."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyfuse.backends import eager_attention as eager
from pyfuse.ops._random import draw_seed
from pyfuse.philox import dropout_mask, philox4x32

B, HQ, HK, M, N, D, DV = 2, 4, 2, 5, 7, 3, 4
SEED, OFFSET = 0x123456789, 77  # only the low 32 bits of each count
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def qkv(
    m: int = M, n: int = N, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(B, HQ, m, D, dtype=dtype),
        torch.randn(B, HK, n, D, dtype=dtype),
        torch.randn(B, HK, n, DV, dtype=dtype),
    )


def band(window: tuple[int, int] | None) -> oracle.Band:
    left, right = window or (-1, -1)
    return (None if left < 0 else left, None if right < 0 else right)


FLOAT_MASK = torch.linspace(-2, 2, M * N, dtype=torch.float64).reshape(M, N)
ROWS_MASK = (torch.arange(M * N).reshape(M, N) % 3 > 0) & (torch.arange(M)[:, None] != 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "window-left": {"window": (2, -1)},
    "window-right": {"window": (-1, 1)},
    "window-both-causal": {"window": (1, 3), "causal": True},
    "window-own-key-only": {"window": (0, 0)},
    "window-huge": {"window": (2**62, 2**62)},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "sink-of-minus-inf": {"sinks": torch.full((HQ,), float("-inf"), dtype=torch.float64)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)},
    "seqlens": {"seqlens_k": torch.tensor([0, 4], dtype=torch.int32)},
    "seqlens-out-of-range": {"seqlens_k": torch.tensor([-3, 99])},
    "seqlens-causal-sinks": {
        "seqlens_k": torch.tensor([0, 4]),
        "causal": True,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
    },
    "bool-mask": {"mask": ROWS_MASK},
    "bool-mask-of-batch": {"mask": torch.arange(B * N).reshape(B, 1, 1, N) % 2 == 0},
    "float-mask": {"mask": FLOAT_MASK},
    "inf-mask": {"mask": FLOAT_MASK.masked_fill(~ROWS_MASK, float("-inf"))},
    "mask-of-heads": {"mask": torch.randn(HQ, 1, N, dtype=torch.float64)},
    "dropout": {"dropout": 0.4},
    "all": {
        "mask": FLOAT_MASK.masked_fill(~ROWS_MASK, float("-inf")),
        "causal": True,
        "window": (3, -1),
        "softcap": 0.8,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64),
        "seqlens_k": torch.tensor([3, 6]),
        "dropout": 0.4,
        "scale": 1.2,
    },
}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same options as the eager formula and as the loops take them."""
    ours = dict(options)
    theirs = {name: x for name, x in options.items() if name != "window"}
    theirs["band"] = band(options.get("window"))
    p = ours.pop("dropout", 0.0)
    if p:
        ours |= {"dropout_p": p, "dropout_seed": torch.tensor([SEED, OFFSET])}
        theirs["dropout"] = (p, SEED % 2**32, OFFSET)
    return ours, theirs


@pytest.mark.parametrize("sizes", [(M, N), (N, M)], ids=["M<N", "M>N"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_definition(name: str, sizes: tuple[int, int]) -> None:
    options = dict(OPTIONS[name])
    mask = options.get("mask")
    if mask is not None and sizes == (N, M):
        options["mask"] = mask.transpose(-1, -2) if mask.shape[-2] > 1 else mask[..., :M]
    q, k, v = qkv(*sizes)
    ours, theirs = split(options)
    o, lse = eager.attention(q, k, v, **ours, return_lse=True)
    expected_o, expected_lse = oracle.attention(q, k, v, **theirs)
    close(o, expected_o)
    close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    mask = torch.randn(B, 1, M, N, dtype=dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for options in ({}, {"mask": mask}, {"mask": mask > 0}, {"scale": 0.2}):
            theirs = {"attn_mask" if name == "mask" else name: x for name, x in options.items()}
            expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs)
            o = eager.attention(q, k, v, **options)
            assert isinstance(o, Tensor) and o.dtype == dtype
            torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_lse_is_float32(dtype: torch.dtype) -> None:
    o, lse = eager.attention(*qkv(dtype=dtype), return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)


def test_output_takes_the_memory_order_of_q() -> None:
    q, k, v = qkv()
    o = eager.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert o.transpose(1, 2).is_contiguous()
    assert eager.attention(q, k, v).is_contiguous()


# Calculus -----------------------------------------------------------------------------------------


def differentiable(options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A function of q, k, v and every floating-point option, and where to differentiate it."""
    ours, _ = split(options)
    mask = ours.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        hidden = mask == float("-inf")  # -inf has no neighbour for a finite difference
        ours["mask"] = mask.masked_fill(hidden, 0.0)
    names = [k for k, x in ours.items() if isinstance(x, Tensor) and x.is_floating_point()]
    names = [k for k in names if ours[k].isfinite().all()]

    def function(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        given = ours | dict(zip(names, extra, strict=True))
        if "mask" in names:
            given["mask"] = given["mask"].masked_fill(hidden, float("-inf"))
        o, lse = eager.attention(q, k, v, **given, return_lse=True)
        return o, lse.masked_fill(lse == float("-inf"), 0.0)

    small = [x[:, :, :3] for x in qkv()] if not mask_like(ours) else list(qkv())
    return function, [x.clone().requires_grad_() for x in (*small, *(ours[k] for k in names))]


def mask_like(options: dict[str, Any]) -> bool:
    return options.get("mask") is not None


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    function, arguments = differentiable(OPTIONS[name])
    assert torch.autograd.gradcheck(
        function, arguments, check_forward_ad=True, fast_mode=True, check_batched_grad=True
    )


@pytest.mark.parametrize("name", ["plain", "sinks", "seqlens-causal-sinks", "inf-mask", "all"])
def test_second_derivatives(name: str) -> None:
    function, arguments = differentiable(OPTIONS[name])
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_gradient_of_a_broadcast_mask_is_summed() -> None:
    q, k, v = qkv()
    small = torch.randn(HQ, 1, N, dtype=torch.float64, requires_grad=True)
    full = small.detach().expand(B, HQ, M, N).clone().requires_grad_()
    for mask in (small, full):
        eager.attention(q, k, v, mask=mask).square().sum().backward()
    close(small.grad, full.grad.sum((0, 2))[:, None])


# NaN ----------------------------------------------------------------------------------------------

HIDING: dict[str, dict[str, Any]] = {
    "seqlens": {"seqlens_k": torch.tensor([4, 0])},
    "causal": {"causal": True},
    "window": {"window": (1, 1)},
    "bool-mask": {"mask": ROWS_MASK},
    "inf-mask": {"mask": torch.zeros(M, N).masked_fill(~ROWS_MASK, float("-inf"))},
    "mask-of-keys": {"mask": torch.arange(N) % 2 == 0},
    "mask-of-heads": {"mask": torch.arange(HQ * N).reshape(HQ, 1, N) % 3 == 0},
}
SCORE_STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {
        "softcap": 0.8,
        "sinks": torch.zeros(HQ),
        "alibi_slopes": torch.ones(HQ),
        "dropout_p": 0.4,
        "dropout_seed": torch.tensor([SEED, OFFSET]),
    },
}


def results(
    q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, **options: Any
) -> dict[str, Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    o, lse = eager.attention(q, k, v, **options, return_lse=True)
    loss = (o * upstream).sum() + lse.masked_fill(upstream.sum(-1) == 0, 0.0).sum()
    loss.backward()
    return {"o": o.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def visible_pairs(options: dict[str, Any], m: int, n: int) -> Tensor:
    """[B, HQ, m, n] by the loops' rule."""
    mask = options.get("mask", torch.tensor(True))
    mask = mask if mask.dtype == torch.bool else mask > float("-inf")
    lengths = options.get("seqlens_k", torch.full((B,), n))
    rule = partial(
        oracle.sees, m=m, n=n, causal=options.get("causal", False), band=band(options.get("window"))
    )
    seen = torch.tensor(
        [
            [[rule(i, j, length=int(length)) for j in range(n)] for i in range(m)]
            for length in lengths
        ]
    )
    return seen[:, None] & mask.expand(B, HQ, m, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("steps", SCORE_STEPS)
@pytest.mark.parametrize("name", HIDING)
def test_what_no_query_sees_changes_nothing(name: str, steps: str, bad: float) -> None:
    """Keys hidden from all that use them: o, lse and every gradient are the same bits."""
    q, k, v = qkv(dtype=torch.float32)
    options = HIDING[name] | SCORE_STEPS[steps]
    if name in ("causal", "window", "bool-mask", "inf-mask"):  # hide key 3 from all but query 4
        options["mask"] = _also_hiding_key_3(options.get("mask"))
    seen = visible_pairs(options, M, N).reshape(B, HK, HQ // HK, M, N).any(3).any(2)
    assert not seen.all()
    upstream = torch.randn(B, HQ, M, DV)
    expected = results(q, k, v, upstream, **options)
    k[~seen], v[~seen] = bad, bad
    for what, value in results(q, k, v, upstream, **options).items():
        assert torch.equal(value, expected[what]), what
        assert what == "lse" or value.isfinite().all(), what


def _also_hiding_key_3(mask: Tensor | None) -> Tensor:
    free = torch.arange(N) != 3
    if mask is None or mask.dtype == torch.bool:
        return free if mask is None else mask & free
    return mask.masked_fill(~free, float("-inf"))


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", SCORE_STEPS)
@pytest.mark.parametrize("name", HIDING)
def test_what_one_query_sees_shows_there_only(
    name: str, steps: str, bad: float, where: str
) -> None:
    """A NaN in one key: queries that see it turn non-finite, no bit of the others changes."""
    q, k, v = qkv(dtype=torch.float32)
    options = HIDING[name] | SCORE_STEPS[steps]
    key = 0 if name in ("mask-of-keys", "seqlens") else 4
    sees_it = visible_pairs(options, M, N)[..., key]
    upstream = torch.randn(B, HQ, M, DV)
    expected = results(q, k, v, upstream, **options)
    (k if where == "k" else v)[:, :, key, 1] = bad
    actual = results(q, k, v, upstream, **options)
    assert sees_it.any()
    columns = slice(None) if where == "k" else slice(1, 2)
    kept_by_dropout = torch.ones_like(sees_it)
    if where == "v" and bad != bad or where == "k":
        assert not actual["o"][..., columns][sees_it & kept_by_dropout].isfinite().any()
        assert not actual["dq"][sees_it].isfinite().any()
    for what in ("o", "lse", "dq"):
        assert torch.equal(actual[what][~sees_it], expected[what][~sees_it]), what
