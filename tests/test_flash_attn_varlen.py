"""pyfuse.compat.flash_attn: attention of packed sequences, their padding, and pages."""

from __future__ import annotations

import re
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import DTYPES, judge, normal, offsets, packed
from torch import Tensor

from pyfuse.compat.flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

QUERIES, KEYS = [33, 0, 1, 65, 3, 0], [57, 5, 40, 65, 0, 0]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])
OWN_SLOPES = SLOPES * torch.arange(1, 7)[:, None]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4), "softmax_scale": 0.2},
    "causal window": {"causal": True, "window_size": (16, -1)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of sequences": {"alibi_slopes": OWN_SLOPES},
    "causal alibi of sequences": {"causal": True, "window_size": (20, 0), "alibi_slopes": OWN_SLOPES},
}  # fmt: skip


def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse, probabilities = flash_attn_varlen_func(
        q, k, v, offsets(QUERIES), offsets(KEYS), max(QUERIES), max(KEYS), return_attn_probs=True, **options
    )  # fmt: skip
    assert probabilities.shape == (0,)
    return out, lse


def formula(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return packed(q, k, v, QUERIES, KEYS, **options)


def drawn(dtype: str, d: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(dtype, sum(QUERIES), 4, d),
        normal(dtype, sum(KEYS), 2, d),
        normal(dtype, sum(KEYS), 2, d),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name: str, dtype: str) -> None:
    judge(call, formula, drawn(dtype), OPTIONS[name], "q k v")


@pytest.mark.parametrize("name", ["causal", "causal alibi of sequences"])
def test_float64_and_the_gradient_check(name: str) -> None:
    cu_q, cu_k, options = (
        offsets([2, 0, 3]),
        offsets([4, 1, 2], torch.int64).int(),
        dict(OPTIONS[name]),
    )
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(3, 2)
    points = [
        torch.randn(n, h, 3, dtype=torch.float64, requires_grad=True)
        for n, h in ((5, 2), (7, 1), (7, 1))
    ]

    def actual(*tensors: Tensor) -> Tensor:
        return flash_attn_varlen_func(*tensors, cu_q, cu_k, 3, 4, **options)

    torch.testing.assert_close(actual(*points), packed(*points, [2, 0, 3], [4, 1, 2], **options)[0])
    assert torch.autograd.gradcheck(actual, points)


@pytest.mark.parametrize("name", ["causal", "causal alibi of sequences"])
def test_packed_tensors_have_the_bits_of_separate_ones(name: str) -> None:
    lengths, options = [7, 0, 20, 3], dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = OWN_SLOPES[:4]
    cu, t = offsets(lengths), sum(lengths)
    qkv = torch.randn(t, 3, 4, 16, requires_grad=True)
    q, kv = torch.randn(t, 4, 16, requires_grad=True), torch.randn(t, 2, 2, 16, requires_grad=True)
    for actual, separate, points in (
        (flash_attn_varlen_qkvpacked_func(qkv, cu, 20, **options), qkv.unbind(1), [qkv]),
        (flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 20, 20, **options), (q, *kv.unbind(1)), [q, kv]),
    ):  # fmt: skip
        expected = flash_attn_varlen_func(*separate, cu, cu, 20, 20, **options)
        assert actual.is_contiguous()
        numerics.assert_bitwise_equal(actual, expected, "out")
        upstream = torch.randn_like(actual)
        for a, b in zip(
            torch.autograd.grad(actual, points, upstream),
            torch.autograd.grad(expected, points, upstream),
            strict=True,
        ):
            numerics.assert_bitwise_equal(a, b, "gradient")


@pytest.mark.parametrize("name", ["causal", "causal alibi of sequences"])
def test_rows_of_no_sequence_and_other_sequences_have_no_part(name: str) -> None:
    """NaN behind the last sequence stays there; NaN in one sequence stays in it."""
    q, k, v = drawn("f32", 16)
    expected = call(q, k, v, **OPTIONS[name])[0]
    q, k, v = (torch.cat([x, torch.full((5, *x.shape[1:]), torch.nan)]) for x in (q, k, v))
    k[:57] = torch.nan
    actual = call(q, k, v, **OPTIONS[name])[0]
    assert actual[:33].isnan().all() and not actual[-5:].any()
    numerics.assert_bitwise_equal(actual[33:-5], expected[33:], "the other sequences")


def test_dropout_of_packed_sequences() -> None:
    lengths, p = [40, 0, 25], 0.25
    cu, q = offsets(lengths), torch.zeros(65, 2, 8)
    v = torch.cat([torch.eye(40), torch.eye(40)[:25]])[:, None].expand(65, 2, 40)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(flash_attn_varlen_func(q, q, v, cu, cu, 40, 40, dropout_p=p))
    numerics.assert_bitwise_equal(outs[0], outs[1], "the same seed")
    assert not torch.equal(outs[0], outs[2])
    for own, n in ((outs[0][:40], 40), (outs[0][40:], 25)):
        kept = own[..., :n] != 0
        torch.testing.assert_close(
            own[..., :n][kept], torch.full((int(kept.sum()),), 1 / (n * (1 - p)))
        )
        assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert not own[..., n:].any()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("page_size", [1, 7, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_pages(name: str, page_size: int, dtype: str) -> None:
    """Keys in shuffled pages, NaN in what no sequence uses: the formula of the same keys in a row."""
    q, k, v = drawn(dtype)
    width = max(-(-n // page_size) for n in KEYS) + 1
    table = torch.randperm(len(KEYS) * width).reshape(-1, width).int()
    pages = [
        torch.full((table.numel(), page_size, *x.shape[1:]), torch.nan, dtype=x.dtype)
        for x in (k, v)
    ]
    start = 0
    for b, n in enumerate(KEYS):
        j = torch.arange(n)
        for page, x in zip(pages, (k, v), strict=True):
            page[table[b, j // page_size].long(), j % page_size] = x[start : start + n]
        start += n

    def paged(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return call(q, *pages, block_table=table, **options)

    def same(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return formula(q, k.to(q.dtype), v.to(q.dtype), **options)

    judge(paged, same, [q], OPTIONS[name], "q")


def test_sizes_of_zero() -> None:
    for cu_q, cu_k in (([0], [0]), ([0, 0, 0], [0, 4, 4]), ([0, 3], [0, 0])):
        for own in (False, True):
            q, k = torch.randn(cu_q[-1], 4, 8, requires_grad=True), torch.randn(cu_k[-1], 2, 8)
            slopes = torch.rand(len(cu_q) - 1, 4) if own else None
            out, lse, _ = flash_attn_varlen_func(
                q, k, k, torch.tensor(cu_q), torch.tensor(cu_k), 3, 4, alibi_slopes=slopes, return_attn_probs=True
            )  # fmt: skip
            assert out.shape == q.shape and lse.shape == (4, cu_q[-1])
            assert not out.any() and (lse == torch.inf).all()
            assert not torch.autograd.grad(out.sum(), q)[0].any()


def good(**change: Any) -> dict[str, Any]:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    tensors = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3}
    return tensors | lengths | change


PAGES = {"k": torch.zeros(4, 2, 2, 8), "v": torch.zeros(4, 2, 2, 8)}
TABLE = torch.tensor([[0, 1], [2, 3]])
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": torch.zeros(1, 5, 4, 8)}, ValueError, "q: expected 3 dimensions [T, Hq, D]"),
    "keys": ({"v": torch.zeros(4, 2, 8)}, ValueError, "v: Tk is 4, but k has Tk = 5"),
    "heads": ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, ValueError, "k: Hk is 3, but q has Hq = 4"),
    "lengths": ({"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "cu_seqlens_k: expected shape (3,), got (2,)"),
    "no lengths": ({"cu_seqlens_q": torch.tensor([]).int()}, ValueError, "cu_seqlens_q: expected a tensor [B + 1]"),
    "list": ({"cu_seqlens_q": [0, 2, 5]}, ValueError, "cu_seqlens_q: expected a tensor [B + 1]"),
    "floats": ({"cu_seqlens_k": torch.tensor([0.0, 2, 5])}, TypeError, "cu_seqlens_k: dtype torch.float32, needs"),
    "longest": ({"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q: expected an int, got float"),
    "none": ({"max_seqlen_k": None}, TypeError, "max_seqlen_k: expected an int, got NoneType"),
    "negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: got -1, needs 0 or more"),
    "short": ({"max_seqlen_k": 2, "alibi_slopes": torch.zeros(2, 4)}, ValueError, "max_seqlen_k: got 3, needs 0 to 2"),
    "slopes": ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "expected [Hq] = (4,) or [B, Hq] = (2, 4)"),
    "table": ({**PAGES, "block_table": TABLE[:1]}, ValueError, "block_table: expected shape (2, 2), got (1, 2)"),
    "table rank": ({**PAGES, "block_table": TABLE[0]}, ValueError, "block_table: expected a tensor [B, pages"),
    "no pages": ({"block_table": TABLE}, ValueError, "k: expected 4 dimensions [pages, page_size, Hk, D]"),
    "few pages": ({**PAGES, "block_table": TABLE[:, :1]}, ValueError, "cu_seqlens_k: got 3, needs 0 to 2"),
    "dropout": ({**PAGES, "block_table": TABLE, "dropout_p": 0.1}, NotImplementedError, "dropout_p: above 0 beside"),
    "gradient": (
        {**PAGES, "v": torch.zeros(4, 2, 2, 8, requires_grad=True), "block_table": TABLE},
        NotImplementedError,
        "k, v: require grad, but pages",
    ),
    "probabilities": ({"dropout_p": 0.1, "return_attn_probs": True}, NotImplementedError, "return_attn_probs: True"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_varlen_func(**good(**change))
    assert flash_attn_varlen_func(**good()).shape == (5, 4, 8)
    assert flash_attn_varlen_func(**good(**PAGES, block_table=TABLE)).shape == (5, 4, 8)


def test_what_is_not_packed() -> None:
    cu = torch.tensor([0, 5])
    with pytest.raises(
        ValueError, match=re.escape("qkv: expected [T, 3, H, D], got shape (5, 2, 4, 8)")
    ):
        flash_attn_varlen_qkvpacked_func(torch.zeros(5, 2, 4, 8), cu, 5)
    with pytest.raises(
        ValueError, match=re.escape("kv: expected [T, 2, H, D], got shape (5, 3, 4, 8)")
    ):
        flash_attn_varlen_kvpacked_func(torch.zeros(5, 4, 8), torch.zeros(5, 3, 4, 8), cu, cu, 5, 5)
