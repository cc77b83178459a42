"""Eager varlen and decode attention: equal to attention on each sequence alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfuse.backends import eager_attention as eager
from pyfuse.backends import eager_decode

HQ, HK, D, DV = 4, 2, 3, 4
QUERIES = [3, 0, 5, 2, 0, 1]
KEYS = [4, 3, 2, 0, 0, 6]
SEED = torch.tensor([11, 12])
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "all": {
        "causal": True,
        "window": (3, -1),
        "softcap": 0.8,
        "sinks": torch.randn(HQ, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64),
        "scale": 0.7,
    },
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def bounds(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def padded(x: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D]."""
    return x.transpose(0, 1)[None]


@pytest.mark.parametrize("tail", [0, 2], ids=["", "rows-beyond-the-end"])
@pytest.mark.parametrize("name", STEPS)
def test_varlen_is_attention_of_each(name: str, tail: int) -> None:
    options = STEPS[name]
    q = normal(sum(QUERIES) + tail, HQ, D)
    k, v = normal(sum(KEYS) + tail, HK, D), normal(sum(KEYS) + tail, HK, DV)
    cu_q, cu_k = bounds(QUERIES), bounds(KEYS, torch.int64)
    o, lse = eager.varlen_attention(q, k, v, cu_q, cu_k, **options, return_lse=True)
    assert o.shape == (len(q), HQ, DV) and lse.shape == (HQ, len(q))
    for b in range(len(QUERIES)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected_o, expected_lse = eager.attention(
            padded(q[rows]), padded(k[keys]), padded(v[keys]), **options, return_lse=True
        )
        close(o[rows], expected_o[0].transpose(0, 1))
        close(lse[:, rows], expected_lse[0])
    assert (o[len(q) - tail :] == 0).all()


def test_varlen_dropout_counts_within_the_sequence() -> None:
    lengths = [4, 0, 4]
    q, k, v = normal(8, HQ, D), normal(8, HK, D), normal(8, HK, DV)
    cu = bounds(lengths)
    dropout = {"dropout_p": 0.5, "dropout_seed": SEED}
    o = eager.varlen_attention(q, k, v, cu, cu, **dropout)
    batch = [torch.stack([x[:4], x[4:4].new_zeros(x[:4].shape), x[4:]]) for x in (q, k, v)]
    expected = eager.attention(*(x.transpose(1, 2) for x in batch), **dropout).transpose(1, 2)
    close(o, torch.cat([expected[0], expected[2]]))


def test_varlen_ignores_nan_in_other_sequences() -> None:
    """Of values and gradients of the others, no bit changes; beyond the end NaN is seen by none."""
    q, k, v = normal(7, HQ, D), normal(9, HK, D), normal(9, HK, DV)
    cu_q, cu_k = bounds([3, 3]), bounds([4, 4])

    def first_sequence(k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = eager.varlen_attention(*leaves, cu_q, cu_k, causal=True)
        grads = torch.autograd.grad(o[:3].sum(), leaves)
        return [o[:3], grads[0][:3], o[6:]]

    expected = first_sequence(k, v)
    k[8:], v[8:] = float("nan"), float("nan")
    q[6:] = float("nan")
    for x, y in zip(first_sequence(k, v), expected, strict=True):
        assert torch.equal(x, y)
    k[5], v[6] = float("nan"), float("inf")
    for x, y in zip(first_sequence(k, v), expected, strict=True):
        assert torch.equal(x, y)


def test_varlen_of_no_sequences() -> None:
    cu = torch.zeros(1, dtype=torch.int32)
    o, lse = eager.varlen_attention(
        normal(0, HQ, D), normal(0, HK, D), normal(0, HK, DV), cu, cu, return_lse=True
    )
    assert o.shape == (0, HQ, DV) and lse.shape == (HQ, 0)


def test_varlen_gradients() -> None:
    q, k, v = normal(5, HQ, D), normal(6, HK, D), normal(6, HK, DV)
    cu_q, cu_k = bounds([2, 0, 3]), bounds([4, 2, 0])
    point = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda *x: eager.varlen_attention(*x, cu_q, cu_k, causal=True), point, fast_mode=True
    )


def test_varlen_compiles_as_one_graph() -> None:
    q, k, v = normal(sum(QUERIES), HQ, D), normal(sum(KEYS), HK, D), normal(sum(KEYS), HK, DV)
    point = (q, k, v, bounds(QUERIES), bounds(KEYS))
    function = partial(eager.varlen_attention, causal=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*point), function(*point))


# Decode -------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 8, 1]
CACHE = 8


def cache(sizes: int) -> Tensor:
    """[B, HK, CACHE, size], NaN beyond each sequence's length."""
    x = normal(len(LENGTHS), HK, CACHE, sizes)
    for b, length in enumerate(LENGTHS):
        x[b, :, length:] = float("nan")
    return x


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_decode_is_attention_over_each_cache(name: str, causal: bool, m: int) -> None:
    options = STEPS[name] | {"causal": causal}
    q, k, v = normal(len(LENGTHS), HQ, m, D), cache(D), cache(DV)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    o, lse = eager_decode.decode_attention(q, k, v, seqlens_k=lengths, **options, return_lse=True)
    for b, length in enumerate(LENGTHS):
        one = slice(b, b + 1)
        expected_o, expected_lse = eager.attention(
            q[one], k[one, :, :length], v[one, :, :length], **options, return_lse=True
        )
        close(o[one], expected_o)
        close(lse[one], expected_lse)


@pytest.mark.parametrize("page_size", [1, 2, 4, 8])
def test_paged_cache_is_the_same_cache(page_size: int) -> None:
    batch, per_sequence = len(LENGTHS), CACHE // page_size
    q, k, v = normal(batch, HQ, 2, D), cache(D), cache(DV)
    lengths = torch.tensor(LENGTHS)
    order = torch.randperm(batch * per_sequence)
    table = order.reshape(batch, per_sequence).to(torch.int32)
    pages = []
    for x in (k, v):
        paged = torch.full((len(order) + 1, HK, page_size, x.shape[-1]), float("nan")).double()
        split = x.reshape(batch, HK, per_sequence, page_size, -1).transpose(1, 2)
        paged[order] = split.flatten(0, 1)
        pages.append(paged)
    unused = torch.arange(per_sequence) * page_size >= lengths[:, None]
    table[unused] = torch.tensor([-1, 10**6], dtype=torch.int32).repeat(len(order))[: unused.sum()]
    expected = eager_decode.decode_attention(q, k, v, seqlens_k=lengths)
    close(eager_decode.decode_attention(q, *pages, seqlens_k=lengths, block_table=table), expected)


def test_decode_gradient_has_no_nan() -> None:
    q, k, v = (x.requires_grad_() for x in (normal(len(LENGTHS), HQ, 2, D), cache(D), cache(DV)))
    eager_decode.decode_attention(q, k, v, seqlens_k=torch.tensor(LENGTHS)).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()
