"""pyfuse.compat.flash_attn.layers.rotary and ops.triton.rotary, against complex numbers in float64."""

from __future__ import annotations

import re
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import DTYPES, angles, judge, normal, offsets, turned
from torch import Tensor

from pyfuse.compat.flash_attn.layers import rotary
from pyfuse.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from pyfuse.compat.flash_attn.ops.triton.rotary import apply_rotary

ROWS = 64


def at(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [..., S, H, D] turned by the rows `positions` [..., S] of the tables."""
    c, s = (table[positions][..., None, :, :] for table in (cos, sin))
    return turned(x.transpose(-3, -2), c, s, interleaved).transpose(-3, -2)


OFFSETS: dict[str, int | Tensor] = {
    "0": 0,
    "5": 5,
    "each": torch.tensor([4, 0, 31], dtype=torch.int32),
    "each int64": torch.tensor([7, 1, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("sizes", [(33, 5, 24, 24), (17, 2, 40, 14), (1, 1, 7, 6)], ids=str)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int], offset: str, interleaved: bool, inplace: bool, dtype: str
) -> None:
    s, h, d, r = sizes
    tables, start = angles(ROWS, r, DTYPES[dtype]), OFFSETS[offset]
    first = start[:, None] if isinstance(start, Tensor) else torch.tensor([[start]])
    positions = (first + torch.arange(s)).expand(3, s)
    memory: list[Tensor] = []

    def actual(x: Tensor) -> Tensor:
        x = x * 1  # no leaf: its memory is written to
        memory[:] = [x]
        y = apply_rotary_emb(x, *tables, interleaved, inplace, start)
        assert (y.data_ptr() == x.data_ptr()) == inplace
        return y

    def formula(x: Tensor) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in tables)
        return at(x, cos, sin, positions, interleaved)

    judge(actual, formula, [normal(dtype, 3, s, h, d)], {}, "x")


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([9, 0, 2, 5])], ids=["0", "3", "each"])
def test_packed_sequences(offset: int | Tensor, inplace: bool) -> None:
    lengths = [7, 0, 20, 3]
    cu, (cos, sin) = offsets(lengths), angles(ROWS, 8)
    starts = offset if isinstance(offset, Tensor) else torch.full((4,), offset)
    positions = torch.cat([torch.arange(n) + int(o) for n, o in zip(lengths, starts, strict=True)])

    def actual(x: Tensor) -> Tensor:
        return apply_rotary_emb(
            x * 1, cos, sin, inplace=inplace, seqlen_offsets=offset, cu_seqlens=cu, max_seqlen=20
        )

    def formula(x: Tensor) -> Tensor:
        return at(x, cos.to(x.dtype), sin.to(x.dtype), positions, False)

    judge(actual, formula, [normal("f32", 30, 3, 16)], {}, "x")


def test_packed_rows_of_no_sequence_stay_as_they_are() -> None:
    cos, sin = angles(ROWS, 16)
    x = torch.randn(12, 2, 16)
    for cu, start, end in (([0, 4, 9], 0, 9), ([2, 4], 2, 4), ([5], 0, 0)):
        y = apply_rotary(x, cos, sin, cu_seqlens=torch.tensor(cu), max_seqlen=5)
        assert torch.equal(y[:start], x[:start]) and torch.equal(y[end:], x[end:])


def test_conjugate_turns_back() -> None:
    cos, sin = angles(ROWS, 12, torch.float64)
    x = torch.randn(2, 9, 3, 16, dtype=torch.float64)
    for interleaved in (False, True):
        there = apply_rotary(x, cos, sin, 5, interleaved=interleaved)
        back = apply_rotary(there, cos, sin, 5, interleaved=interleaved, conjugate=True)
        torch.testing.assert_close(back, x)
        assert not torch.allclose(there, x)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_the_formula_in_torch_is_the_same(interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(2, 9, 3, 16), angles(9, 12)
    expected = at(x.double(), cos.double(), sin.double(), torch.arange(9), interleaved).float()
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos, sin, interleaved), expected)
    batched = apply_rotary_emb_torch(x, cos.expand(2, 9, 6), sin.expand(2, 9, 6), interleaved)
    torch.testing.assert_close(batched, expected)
    c, s = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[:, None]
        for t in (cos, sin)
    )
    first = x[..., :12]
    by_half = first * c + rotary.rotate_half(first, interleaved) * s
    torch.testing.assert_close(by_half, expected[..., :12])
    assert rotary.apply_rotary_emb_func is apply_rotary_emb


def test_tables_of_another_dtype() -> None:
    x, (cos, sin) = torch.randn(2, 9, 3, 16).half(), angles(9, 16)
    expected = apply_rotary_emb(x, cos.bfloat16().float(), sin.bfloat16().float())
    numerics.assert_bitwise_equal(
        apply_rotary_emb(x, cos.bfloat16(), sin.bfloat16()), expected, "bfloat16 tables"
    )
    assert torch.equal(
        apply_rotary_emb(x, cos.double(), sin.double()), apply_rotary_emb(x, cos, sin)
    )


@pytest.mark.parametrize("own", [False, True], ids=["one table", "tables of k"])
@pytest.mark.parametrize("layout", ["three", "three of a slice", "heads", "kv"])
def test_in_place_on_packed_tensors(layout: str, own: bool) -> None:
    """Values, that v is left alone, gradients, and that it is in place."""
    tables, (cos_k, sin_k) = angles(ROWS, 8), angles(2 * ROWS, 8)
    of_k = (cos_k[ROWS:], sin_k[ROWS:]) if own and layout != "kv" else tables
    start, positions = torch.tensor([3, 11]), torch.tensor([[3], [11]]) + torch.arange(9)
    shape = {"three": (3, 2), "three of a slice": (3, 2), "heads": (8,), "kv": (2, 4)}[layout]

    def actual(x: Tensor) -> Tensor:
        x = x * 1
        if layout == "three of a slice":  # k does not follow q in memory
            x = torch.cat((x, x), 3)[:, :, :, :2]
        before = x.data_ptr()
        if layout == "kv":
            y = apply_rotary_emb_kv_(x, *tables, True, start)
        else:
            k_tables = of_k if own else (None, None)
            y = apply_rotary_emb_qkv_(
                x, *tables, *k_tables, True, start, 4 if layout == "heads" else None
            )
        assert y.data_ptr() == before
        return y

    def formula(x: Tensor) -> Tensor:
        q_tables, k_tables = ([t.to(x.dtype) for t in pair] for pair in (tables, of_k))
        if layout == "heads":
            q, k, v = x.split([4, 2, 2], 2)
            return torch.cat(
                (at(q, *q_tables, positions, True), at(k, *k_tables, positions, True), v), 2
            )
        parts = [at(x[:, :, -2], *k_tables, positions, True), x[:, :, -1]]
        if layout != "kv":
            parts.insert(0, at(x[:, :, 0], *q_tables, positions, True))
        return torch.stack(parts, 2)

    judge(actual, formula, [normal("f32", 2, 9, *shape, 16)], {}, "x")


def test_what_autograd_had_kept_says_that_it_is_gone() -> None:
    x, tables = torch.randn(2, 9, 2, 16, requires_grad=True), angles(ROWS, 16)
    kept = x.exp()  # its gradient needs its values
    apply_rotary_emb(kept, *tables, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_in_place_on_a_leaf_and_on_what_unbind_returns() -> None:
    """Both are usual in programs for the library; the result has the right gradient."""
    tables, weight = angles(ROWS, 16), torch.randn(2, 9, 2, 16)
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    q = (qkv * 1).unbind(2)[0]
    before = weight.clone()
    apply_rotary_emb(q, *tables, inplace=True).backward(weight)
    expected = apply_rotary(weight, *tables, conjugate=True)
    torch.testing.assert_close(qkv.grad[:, :, 0], expected)
    assert not qkv.grad[:, :, 1:].any()
    assert torch.equal(weight, before), "the gradient that came in was written to"
    leaf = torch.randn(2, 9, 2, 16, requires_grad=True)
    (apply_rotary_emb(leaf, *tables, inplace=True) * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def module_tables(
    dim: int, length: int, scale_base: float | None, part: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim / 2] of q (part 0) or k (1) with base 500, every step in that dtype."""
    pair = torch.arange(0, dim, 2, dtype=dtype)
    place = torch.arange(length, dtype=dtype)
    angle = place[:, None] * 500.0 ** -(pair / dim)
    if scale_base is None:
        return angle.cos(), angle.sin()
    power = (place - length // 2)[:, None] / scale_base
    factor = ((pair + 0.4 * dim) / (1.4 * dim)) ** (-power if part else power)
    return angle.cos() * factor, angle.sin() * factor


@pytest.mark.parametrize("scale_base", [None, 512.0], ids=["plain", "xpos"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_module(dtype: str, scale_base: float | None) -> None:
    """Its tables, by the formula; its two calls; bfloat16 parameters change no angle."""
    dim, length = 12, 3030  # far: there a rounded frequency is another angle
    module = RotaryEmbedding(dim, base=500.0, scale_base=scale_base).to(DTYPES[dtype])
    qkv = normal(dtype, 2, 30, 3, 2, 16)
    both = module(qkv.clone(), seqlen_offset=3000)
    positions = torch.arange(3000, 3030)
    for i in (0, 1):
        tables = [
            module_tables(dim, length, scale_base, i, t) for t in (torch.float64, torch.float32)
        ]
        rounded = [t.to(qkv.dtype) for t in tables[1]]
        exact = at(qkv[:, :, i].double(), *tables[0], positions, False)
        eager = at(qkv[:, :, i], *rounded, positions, False)
        numerics.check(both[:, :, i], exact, eager, f"part {i}")
    assert torch.equal(both[:, :, 2], qkv[:, :, 2])
    q, kv = module(
        qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([3000, 3000])
    )
    numerics.assert_bitwise_equal(torch.cat((q[:, :, None], kv), 2), both, "q and kv apart")
    assert not module.state_dict()


def test_the_module_s_tables_follow_what_is_asked_for() -> None:
    module = RotaryEmbedding(8)
    module(torch.randn(1, 5, 3, 2, 8))
    assert module._seq_len_cached == 5 and module._cos_k_cached is None
    module(torch.randn(1, 5, 3, 2, 8), seqlen_offset=4)
    assert module._seq_len_cached == 9
    kept = module._cos_cached
    module(torch.randn(1, 3, 3, 2, 8))
    assert module._cos_cached is kept
    module(torch.randn(1, 3, 3, 2, 8).double())
    assert module._cos_cached.dtype == torch.float64
    module(torch.randn(1, 3, 3, 2, 8), max_seqlen=50, seqlen_offset=torch.tensor([40]))
    assert module._seq_len_cached == 50
    with torch.inference_mode():
        module(torch.randn(1, 60, 3, 2, 8))
    module(torch.randn(1, 60, 3, 2, 8, requires_grad=True) * 1).sum().backward()
    with pytest.raises(ValueError, match="max_seqlen: got None, needs a length beside a tensor"):
        RotaryEmbedding(8)(torch.randn(1, 3, 3, 2, 8), seqlen_offset=torch.tensor([4]))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_sizes_of_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = apply_rotary_emb(x, *angles(9, 8), seqlen_offsets=torch.zeros(shape[0]).int())
    assert y.shape == shape and torch.autograd.grad(y.sum(), x)[0].shape == shape
    assert (
        apply_rotary_emb(
            torch.randn(0, 2, 8), *angles(9, 8), cu_seqlens=torch.tensor([0, 0]), max_seqlen=0
        ).shape[0]
        == 0
    )


X, (COS, SIN), CU = torch.zeros(2, 5, 3, 8), angles(9, 8), torch.tensor([0, 5])
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"x": X[0]}, ValueError, "x: expected [B, S, H, D], got shape (5, 3, 8)"),
    "packed rank": ({"cu_seqlens": CU, "max_seqlen": 5}, ValueError, "x: expected [T, H, D] beside cu_seqlens"),
    "longest": ({"x": X[0], "cu_seqlens": CU}, ValueError, "max_seqlen: got None, needs the longest length"),
    "lengths": ({"x": X[0], "cu_seqlens": CU[None], "max_seqlen": 5}, ValueError, "cu_seqlens: expected [B + 1]"),
    "floats": ({"x": X[0], "cu_seqlens": CU.float(), "max_seqlen": 5}, TypeError, "cu_seqlens: dtype torch.float32"),
    "wide": ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, ValueError, "R of at most x's head size 8, got"),
    "sin": ({"sin": SIN[1:]}, ValueError, "sin: expected cos's shape (9, 4), got (8, 4)"),
    "integers": ({"cos": COS.int(), "sin": SIN.int()}, TypeError, "cos: dtype torch.int32, needs a floating-point"),
    "short": ({"seqlen_offsets": 5}, ValueError, "cos: 9 rows, but tokens stand at up to 10"),
    "negative": ({"seqlen_offsets": -1}, ValueError, "seqlen_offsets: got -1, needs an int of 0 or more"),
    "offsets": ({"seqlen_offsets": torch.zeros(3).int()}, ValueError, "seqlen_offsets: expected (2,), got (3,)"),
    "float offsets": ({"seqlen_offsets": torch.zeros(2)}, TypeError, "seqlen_offsets: dtype torch.float32, needs"),
    "beyond": ({"seqlen_offsets": torch.tensor([0, 5])}, IndexError, "position"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    change, error, message = WRONG[name]
    good = {"x": X, "cos": COS, "sin": SIN}
    for function in (apply_rotary, apply_rotary_emb):
        with pytest.raises(error, match=re.escape(message)):
            function(**(good | change))
        assert function(**good).shape == X.shape


def test_what_is_not_packed() -> None:
    table = angles(9, 4)
    for message, call in {
        "qkv: expected [B, S, 3, H, D], got": lambda: apply_rotary_emb_qkv_(
            torch.zeros(1, 2, 2, 1, 4), *table
        ),
        "qkv: expected [B, S, 3, H, D] or [B, S,": lambda: apply_rotary_emb_qkv_(
            torch.zeros(1, 2, 4), *table
        ),
        "num_heads_q: got None": lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 4, 4), *table),
        "num_heads_q: got 3, but qkv has 4 heads": lambda: apply_rotary_emb_qkv_(
            torch.zeros(1, 2, 4, 4), *table, num_heads_q=3
        ),
        "sin_k: got None": lambda: apply_rotary_emb_qkv_(
            torch.zeros(1, 2, 3, 1, 4), *table, table[0]
        ),
        "kv: expected [B, S, 2, H, D]": lambda: apply_rotary_emb_kv_(
            torch.zeros(1, 2, 3, 1, 4), *table
        ),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
