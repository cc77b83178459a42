"""The oracle itself: eager attention against its definition in Python loops, and against torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyfuse.backends import eager_attention as eager

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
            torch.testing.assert_close(o, expected, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_lse_is_float32(dtype: torch.dtype) -> None:
    o, lse = eager.attention(*qkv(dtype=dtype), return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)


def test_output_takes_the_memory_order_of_q() -> None:
    q, k, v = qkv()
    o = eager.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert o.transpose(1, 2).is_contiguous()
    assert eager.attention(q, k, v).is_contiguous()


@pytest.mark.parametrize(
    "sizes",
    [(0, 4, 2, 5, 7), (2, 0, 0, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (0, 0, 0, 0, 0)],
    ids=["B0", "H0", "M0", "N0", "all0"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_any_size_may_be_zero(sizes: tuple[int, ...], masked: bool) -> None:
    b, hq, hk, m, n = sizes
    q = torch.randn(b, hq, m, D, requires_grad=True)
    k, v = (torch.randn(b, hk, n, size, requires_grad=True) for size in (D, DV))
    options: dict[str, Any] = {}
    if masked:
        options = {
            "causal": True,
            "mask": torch.zeros(m, n),
            "seqlens_k": torch.full((b,), n),
            "dropout_p": 0.5,
            "dropout_seed": torch.tensor([SEED, OFFSET]),
        }
    o, lse = eager.attention(q, k, v, **options, return_lse=True)
    assert o.shape == (b, hq, m, DV) and lse.shape == (b, hq, m)
    assert (o == 0).all() and (lse == float("-inf")).all()
    o.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and (x.grad == 0).all()


def test_head_size_zero() -> None:
    """Without a scale of 0**-0.5: all scores are 0, and o is the mean."""
    v = torch.randn(1, 1, 3, 2)
    o = eager.attention(torch.zeros(1, 1, 2, 0), torch.zeros(1, 1, 3, 0), v)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand(1, 1, 2, 2))


def test_dropout_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="dropout_seed"):
        eager.attention(*qkv(), dropout_p=0.5)


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


def results(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, **options: Any) -> dict[str, Tensor]:
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
    """A NaN in one key: queries that see it turn NaN, no bit of the others changes."""
    q, k, v = qkv(dtype=torch.float32)
    options = HIDING[name] | SCORE_STEPS[steps]
    key = 0 if name in ("mask-of-keys", "seqlens") else 4
    sees_it = visible_pairs(options, M, N)[..., key]
    upstream = torch.randn(B, HQ, M, DV)
    expected = results(q, k, v, upstream, **options)
    (k if where == "k" else v)[:, :, key, 1] = bad
    actual = results(q, k, v, upstream, **options)
    assert sees_it.any()
    if bad != bad:  # an infinite key may also take all the weight, or none
        columns = slice(None) if where == "k" else slice(1, 2)
        assert actual["o"][..., columns][sees_it].isnan().all()
        if where == "k" or "dropout_p" not in options:  # a dropped weight hears nothing from v
            assert actual["dq"][sees_it].isnan().all()
    for what in ("o", "lse", "dq"):
        assert torch.equal(actual[what][~sees_it], expected[what][~sees_it]), what


def test_garbage_in_a_query_that_sees_nothing() -> None:
    """Padding queries hold anything: their o is 0, and no gradient hears of them."""
    q, k, v = qkv(dtype=torch.float32)
    q[:, :, 2] = float("nan")  # row 2 of ROWS_MASK is empty
    actual = results(q, k, v, torch.ones(B, HQ, M, DV), mask=ROWS_MASK)
    assert (actual["o"][:, :, 2] == 0).all() and (actual["dq"][:, :, 2] == 0).all()
    assert (actual["lse"][:, :, 2] == float("-inf")).all()
    for what in ("o", "dq", "dk", "dv"):
        assert actual[what].isfinite().all(), what
