"""pyfuse.compat.flash_attn: attention of whole batches, against the formula in float64."""

from __future__ import annotations

import re
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import DTYPES, judge, normal, reference
from torch import Tensor

from pyfuse.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (16, 5)},
    "left": {"window_size": (7, -1)},
    "right": {"window_size": (-1, 3)},
    "causal window": {"causal": True, "window_size": (9, 4)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.5},
    "alibi": {"alibi_slopes": SLOPES},
    "causal alibi": {"causal": True, "alibi_slopes": SLOPES},
    "alibi of sequences": {
        "causal": True,
        "alibi_slopes": torch.stack([SLOPES, 3 * SLOPES.flip(0)]),
    },
    "all": {"causal": True, "window_size": (40, 0), "softcap": 2.0, "alibi_slopes": SLOPES},
}
SIZES = {"M65-N111": (65, 111), "M63-N17": (63, 17), "M1-N33": (1, 33), "M3-N3": (3, 3)}


def with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert probabilities.shape == (0,) and probabilities.dtype == q.dtype
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name: str, sizes: str, dtype: str) -> None:
    (m, n), heads_k = SIZES[sizes], {"M65-N111": 2, "M63-N17": 1, "M1-N33": 4, "M3-N3": 2}[sizes]
    d = {"M65-N111": 40, "M63-N17": 64, "M1-N33": 16, "M3-N3": 7}[sizes]
    tensors = (
        normal(dtype, 2, m, 4, d),
        normal(dtype, 2, n, heads_k, d),
        normal(dtype, 2, n, heads_k, d),
    )
    judge(with_lse, reference, tensors, OPTIONS[name], "q k v")


@pytest.mark.parametrize("name", OPTIONS)
def test_float64_and_the_gradient_check(name: str) -> None:
    points = [
        torch.randn(2, m, h, 3).double().requires_grad_() for m, h in ((4, 4), (6, 2), (6, 2))
    ]
    options = OPTIONS[name]
    torch.testing.assert_close(
        flash_attn_func(*points, **options), reference(*points, **options)[0]
    )
    assert torch.autograd.gradcheck(lambda *x: flash_attn_func(*x, **options), points)


@pytest.mark.parametrize("name", ["causal", "alibi of sequences"])
def test_packed_tensors_have_the_bits_of_separate_ones(name: str) -> None:
    qkv = torch.randn(2, 17, 3, 4, 16, requires_grad=True)
    q, kv = (
        torch.randn(2, 9, 4, 16, requires_grad=True),
        torch.randn(2, 17, 2, 2, 16, requires_grad=True),
    )
    for packed, separate, points in (
        (flash_attn_qkvpacked_func(qkv, **OPTIONS[name]), qkv.unbind(2), [qkv]),
        (flash_attn_kvpacked_func(q, kv, **OPTIONS[name]), (q, *kv.unbind(2)), [q, kv]),
    ):
        expected = flash_attn_func(*separate, **OPTIONS[name])
        assert packed.is_contiguous(), "programs call view()"
        numerics.assert_bitwise_equal(packed, expected, "out")
        upstream = torch.randn_like(packed)
        for a, b in zip(
            torch.autograd.grad(packed, points, upstream),
            torch.autograd.grad(expected, points, upstream),
            strict=True,
        ):
            numerics.assert_bitwise_equal(a, b, "gradient")


def test_the_library_s_drawing_of_causal_alignment() -> None:
    """Its documentation: 2 queries of 5 keys see 4 and 5; of 5 queries of 2 keys the first three see none."""
    for m, n, seen in ((2, 5, [4, 5]), (5, 2, [0, 0, 0, 1, 2])):
        q, k = torch.zeros(1, m, 1, n), torch.zeros(1, n, 1, n)
        out, lse, _ = flash_attn_func(
            q, k, torch.eye(n)[None, :, None], causal=True, return_attn_probs=True
        )
        expected = torch.tensor([[1.0 / c if j < c else 0.0 for j in range(n)] for c in seen])
        torch.testing.assert_close(out[0, :, 0], expected)
        logs = [torch.tensor(float(c)).log().item() if c else torch.inf for c in seen]
        torch.testing.assert_close(lse[0, 0], torch.tensor(logs))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("slopes", [None, "heads", "sequences"])
def test_sizes_of_zero(shape: tuple[int, int, int], slopes: str | None) -> None:
    b, m, n = shape
    points = [
        torch.randn(b, rows, h, 8, requires_grad=True) for rows, h in ((m, 4), (n, 2), (n, 2))
    ]
    values = {None: None, "heads": torch.rand(4), "sequences": torch.rand(b, 4)}[slopes]
    out, lse, _ = flash_attn_func(*points, alibi_slopes=values, return_attn_probs=True)
    assert out.shape == (b, m, 4, 8) and lse.shape == (b, 4, m)
    assert not out.any() and (lse == torch.inf).all()
    for x, grad in zip(points, torch.autograd.grad(out.sum(), points), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_layouts_and_what_changes_nothing() -> None:
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    expected = flash_attn_func(q, k, v, causal=True)
    scattered = [x.mT.contiguous().mT for x in (q, k, v)]
    assert scattered[0].stride(-1) != 1
    for options in ({}, {"deterministic": True}, {"window_size": [-1, -1]}, {"window_size": (-7, 0)},
                    {"softcap": -1.0}, {"window_size": (500, 0)}):  # fmt: skip
        actual = flash_attn_func(*scattered, causal=True, **options)
        numerics.assert_bitwise_equal(actual, expected, str(options))


P, KEYS = 0.3, 211


def kept_by_dropout(seed: int) -> Tensor:
    """[2, 37, 3, KEYS], True where a probability was kept: uniform ones, and v that shows each."""
    torch.manual_seed(seed)
    q, k = torch.zeros(2, 37, 3, 8), torch.zeros(2, KEYS, 3, 8)
    v = torch.eye(KEYS)[None, :, None].expand(2, KEYS, 3, KEYS)
    out = flash_attn_func(q, k, v, dropout_p=P)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1.0 / (KEYS * (1.0 - P))))
    return kept


def test_dropout_has_its_share_in_every_direction() -> None:
    """Within five standard deviations overall and along each dimension; neighbours are independent."""
    kept = kept_by_dropout(1)
    count = kept.numel()
    assert abs(kept.double().mean() - (1 - P)) < 5 * (P * (1 - P) / count) ** 0.5
    for dim in range(4):
        means = kept.double().movedim(dim, 0).flatten(1).mean(1)
        spread = (P * (1 - P) / (count // kept.shape[dim])) ** 0.5
        assert (means - (1 - P)).abs().max() < 5 * spread, f"dimension {dim}"
        shifted = (kept ^ kept.roll(1, dim)).double().mean()
        assert abs(shifted - 2 * P * (1 - P)) < 0.01, f"dimension {dim}"


def test_dropout_follows_the_seed_and_not_the_call() -> None:
    assert torch.equal(kept_by_dropout(1), kept_by_dropout(1))
    assert not torch.equal(kept_by_dropout(1), kept_by_dropout(2))
    torch.manual_seed(0)
    slopes = torch.zeros(2, 4)
    q = torch.zeros(2, 20, 4, 8)
    out = flash_attn_func(q, q, torch.ones_like(q), dropout_p=0.5, alibi_slopes=slopes)
    assert not torch.equal(out[0], out[1]), "two sequences share a mask"


def test_dropout_keeps_the_expectation() -> None:
    q, k, v = (torch.randn(1, 3, 1, 8) for _ in range(3))
    exact = flash_attn_func(q, k, v, causal=True)
    copies = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    outs = flash_attn_func(*copies, dropout_p=0.25, causal=True)
    error = (outs.mean(0) - exact[0]).abs() / (outs.std(0) / 4000**0.5 + 1e-12)
    assert error.max() < 5


@pytest.mark.parametrize(
    "slopes", [None, torch.tensor([[0.5, 0.1], [0.2, 1.0]])], ids=["shared", "own"]
)
def test_the_gradient_of_dropout_is_that_of_its_values(slopes: Tensor | None) -> None:
    def fixed(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return flash_attn_func(
            *tensors, dropout_p=0.4, causal=True, softcap=2.0, alibi_slopes=slopes
        )

    points = [torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(fixed, points)


def good(**change: Any) -> dict[str, Any]:
    call = {
        "q": torch.zeros(2, 5, 4, 8),
        "k": torch.zeros(2, 6, 2, 8),
        "v": torch.zeros(2, 6, 2, 8),
    }
    return call | change


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    "rank": ({"q": torch.zeros(5, 4, 8)}, ValueError, "q: expected 4 dimensions [B, M, Hq, D], got shape (5, 4, 8)"),
    "batch": ({"k": torch.zeros(3, 6, 2, 8)}, ValueError, "k: B is 3, but q has B = 2"),
    "keys": ({"v": torch.zeros(2, 7, 2, 8)}, ValueError, "v: N is 7, but k has N = 6"),
    "head size": ({"k": torch.zeros(2, 6, 2, 9)}, ValueError, "k: D is 9, but q has D = 8"),
    "heads": ({"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)}, ValueError, "k: Hk is 3, but q has Hq = 4"),
    "dtype": ({"k": torch.zeros(2, 6, 2, 8).half()}, TypeError, "k: dtype torch.float16, but q has torch.float32"),
    "integers": ({n: torch.zeros(2, 6, 2, 8).int() for n in "qkv"}, TypeError, "q: dtype torch.int32, needs"),
    "window": ({"window_size": 3}, TypeError, "window_size: expected (left, right), got 3"),
    "window of floats": ({"window_size": (1.0, 2)}, TypeError, "window_size: expected two ints, got (1.0, 2)"),
    "scale": ({"softmax_scale": torch.ones(())}, TypeError, "softmax_scale: expected a float or None, got Tensor"),
    "softcap": ({"softcap": None}, TypeError, "softcap: expected a float, got NoneType"),
    "softcap NaN": ({"softcap": float("nan")}, ValueError, "softcap: got nan"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0, needs 0 <= dropout_p < 1"),
    "slopes": ({"alibi_slopes": torch.zeros(2)}, ValueError, "alibi_slopes: expected [Hq] = (4,) or [B, Hq] = (2, 4)"),
    "list of slopes": ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes: expected a torch.Tensor, got list"),
    "probabilities": (
        {"return_attn_probs": True, "dropout_p": 0.1},
        NotImplementedError,
        "return_attn_probs: True beside dropout_p > 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_func(**good(**change))
    assert flash_attn_func(**good()).shape == (2, 5, 4, 8)


def test_what_is_not_packed() -> None:
    with pytest.raises(
        ValueError, match=re.escape("qkv: expected [B, S, 3, H, D], got shape (2, 5, 2, 4, 8)")
    ):
        flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(
        ValueError, match=re.escape("kv: expected [B, S, 2, H, D], got shape (2, 5, 4, 8)")
    ):
        flash_attn_kvpacked_func(torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 4, 8))
    with pytest.raises(TypeError, match="qkv: expected a"):
        flash_attn_qkvpacked_func(None)  # type: ignore[arg-type]
