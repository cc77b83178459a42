"""pyfuse.compat.flash_attn.ops.triton.layer_norm, against the formula in float64."""

from __future__ import annotations

import re
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import DTYPES, double, judge, normal
from torch import Tensor
from torch.nn import functional as F

from pyfuse.compat.flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    rms_norm_fn,
)

D = 111


def formula(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    p: float = 0.0,
) -> Any:
    """Step by step in torch, in the tensors' dtypes; dropout by given masks."""
    dtype = x.dtype
    z = x if rowscale is None else x * rowscale.to(dtype)[..., None]
    for i, term in enumerate((z, x1)):
        if term is not None:
            mask = masks[i]
            kept = term if mask is None else term * mask / (1.0 - p)
            z = kept if i == 0 else z + kept
    if residual is not None:
        z = (z + residual).to(residual.dtype)
    elif residual_in_fp32:
        z = z.to(torch.promote_types(dtype, torch.float32))
    mean = 0.0 if is_rms_norm else z.mean(-1, keepdim=True)
    n = (z - mean) / ((z - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    outs = []
    for w, b in ((weight, bias), (weight1, bias1)):
        if w is None and outs:
            continue
        y = n if w is None else n * (w + 1.0 if zero_centered_weight else w)
        outs.append((y if b is None else y + b).to(dtype))
    outs += [z] * prenorm
    return tuple(outs) if len(outs) > 1 else outs[0]


# The tensors that are given, of x w b residual x1 w1 b1, and the options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("x w b", {}),
    "without bias": ("x w", {"eps": 1e-3}),
    "without weight": ("x", {}),
    "residual": ("x w b residual", {"prenorm": True}),
    "prenorm of x": ("x w b", {"prenorm": True}),
    "residual in fp32": ("x w b", {"prenorm": True, "residual_in_fp32": True}),
    "zero-centred": ("x w b residual", {"zero_centered_weight": True}),
    "second branch": ("x w b residual x1", {"prenorm": True}),
    "second norm": ("x w b residual x1 w1 b1", {"prenorm": True}),
    "second norm alone": ("x w b w1", {"zero_centered_weight": True}),
    "scaled rows": ("x w b residual", {"rowscale": True, "prenorm": True}),
}


def arguments(names: str, dtype: torch.dtype, residual_dtype: torch.dtype) -> list[Tensor | None]:
    """The positional arguments as far as the last that is given; parameters in float32."""
    given = names.split()
    wide = torch.promote_types(dtype, torch.float32)
    made: list[Tensor | None] = []
    for name in ("x", "w", "b", "residual", "x1", "w1", "b1"):
        if name not in given:
            made.append(None)
        elif name[0] in "wb":
            made.append((torch.rand(D) + 0.5).to(wide))
        else:
            made.append(
                (torch.randn(2, 5, D) + 0.3).to(residual_dtype if name == "residual" else dtype)
            )
    return made


@pytest.mark.parametrize("stream", ["same", "f32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, rms: bool, dtype: str, stream: str) -> None:
    names, options = CASES[name]
    options = {**options, "is_rms_norm": rms}
    if "rowscale" in options:
        options["rowscale"] = torch.tensor([[0.0, 1.25, 0.5, 2.0, 1.0], [1.0, 1.25, 0.0, 0.5, 1.0]])
    made = arguments(names, DTYPES[dtype], DTYPES[dtype] if stream == "same" else torch.float32)
    given = [i for i, x in enumerate(made) if x is not None]

    def placed(function: Any) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Any:
            positional: list[Tensor | None] = [None] * 7
            for i, x in zip(given, tensors, strict=True):
                positional[i] = x
            return function(*positional, **options)

        return call

    labels = " ".join(
        ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")[i] for i in given
    )
    tensors = [x for x in made if x is not None]
    judge(placed(layer_norm_fn), placed(formula), tensors, options, labels)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_float64_and_the_gradient_check(rms: bool) -> None:
    x, residual, x1 = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b, w1, b1 = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(4))
    points = (x, w, b, residual, x1, w1, b1)

    def actual(*tensors: Tensor) -> Any:
        return layer_norm_fn(*tensors, prenorm=True, is_rms_norm=rms)

    torch.testing.assert_close(actual(*points), formula(*points, prenorm=True, is_rms_norm=rms))
    assert torch.autograd.gradcheck(actual, points)
    assert all(t.dtype == torch.float64 for t in actual(*points))


def test_rms_norm_fn_is_layer_norm_fn_with_rms() -> None:
    x, w, b, residual = torch.randn(4, D), torch.rand(D), torch.rand(D), torch.randn(4, D)
    for more in (
        {},
        {"prenorm": True},
        {"zero_centered_weight": True},
        {"out_dtype": torch.float64},
    ):
        a, e = (
            f(x, w, b, residual, **more, **o)
            for f, o in ((rms_norm_fn, {}), (layer_norm_fn, {"is_rms_norm": True}))
        )
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_a_residual_narrower_than_x() -> None:
    """z has the residual's dtype, whatever x's."""
    x, w, residual = torch.randn(5, D), torch.rand(D), torch.randn(5, D).bfloat16()
    y, z = rms_norm_fn(x, w, None, residual, prenorm=True)
    assert y.dtype == torch.float32 and z.dtype == torch.bfloat16
    assert torch.equal(z, (x + residual).bfloat16())
    torch.testing.assert_close(y, formula(z.float(), w, is_rms_norm=True))


def test_dtypes_and_buffers_of_the_results() -> None:
    x, w, b = torch.randn(2, 5, D).bfloat16(), torch.rand(D), torch.rand(D)
    expected = layer_norm_fn(x.float(), w, b)
    y = layer_norm_fn(x, w, b, out_dtype=torch.float32)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    out = torch.empty(2, 5, D, dtype=torch.float16)
    y = layer_norm_fn(x, w, b, out=out)
    assert y is out and torch.equal(out, expected.half())
    residual, stream = torch.randn(2, 5, D).bfloat16(), torch.empty(2, 5, D)
    y, z = layer_norm_fn(x, w, b, residual, prenorm=True, residual_out=stream)
    assert z is stream and torch.equal(stream, x.float() + residual.float())
    stream.zero_()
    assert torch.equal(layer_norm_fn(x, w, b, residual, residual_out=stream), y) and stream.any()
    weight = torch.rand(D, requires_grad=True)
    layer_norm_fn(x, weight, b, out=torch.empty(2, 5, D)).sum().backward()
    assert weight.grad is not None and weight.grad.any()


P = 0.3


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_dropout_is_that_of_its_masks(rms: bool, branches: int) -> None:
    """Values and gradients are the formula's with the masks that are returned; they have their share."""
    x, x1, residual = (
        torch.randn(40, D, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    w, second = torch.rand(D, dtype=torch.float64), x1 if branches == 2 else None
    y, z, mask, mask1 = layer_norm_fn(
        x, w, None, residual, second, dropout_p=P, prenorm=True, is_rms_norm=rms, return_dropout_mask=True
    )  # fmt: skip
    assert mask.dtype == torch.bool and mask.shape == x.shape
    assert (mask1 is None) == (branches == 1)
    masks = (mask, mask1)
    expected = formula(
        x, w, None, residual, second, masks=masks, p=P, prenorm=True, is_rms_norm=rms
    )
    torch.testing.assert_close((y, z), expected)
    points = [x, residual] + [x1] * (branches - 1)
    upstream = torch.randn_like(y)
    for a, e in zip(
        torch.autograd.grad(y, points, upstream),
        torch.autograd.grad(expected[0], points, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e)
    for m in masks[:branches]:
        for dim in (0, 1):
            spread = (P * (1 - P) / m.shape[1 - dim]) ** 0.5
            assert (m.double().mean(1 - dim) - (1 - P)).abs().max() < 5 * spread
        assert abs(m.double().mean() - (1 - P)) < 5 * (P * (1 - P) / m.numel()) ** 0.5
    if branches == 2:
        assert not torch.equal(mask, mask1)


@pytest.mark.parametrize("more", [{}, {"return_dropout_mask": True}], ids=["fused", "masks"])
def test_dropout_follows_the_seed(more: dict[str, Any]) -> None:
    x, w, zs = torch.ones(20, D), torch.rand(D), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        zs.append(layer_norm_fn(x, w, None, dropout_p=P, prenorm=True, **more)[1])
    assert torch.equal(zs[0], zs[1]) and not torch.equal(zs[0], zs[2])
    kept = zs[0] != 0
    torch.testing.assert_close(zs[0][kept], torch.full_like(zs[0][kept], 1 / (1 - P)))
    assert abs(kept.double().mean() - (1 - P)) < 5 * (P * (1 - P) / kept.numel()) ** 0.5


def test_no_masks_without_dropout() -> None:
    x, w = torch.randn(3, D), torch.rand(D)
    y, mask, mask1 = layer_norm_fn(x, w, None, return_dropout_mask=True)
    assert mask is None and mask1 is None
    y2, y1, z, mask, mask1 = layer_norm_fn(
        x, w, None, weight1=w, prenorm=True, return_dropout_mask=True
    )
    assert torch.equal(y2, y) and torch.equal(y1, y) and z is x


@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_module(zero_centered: bool) -> None:
    module = RMSNorm(D, dropout_p=0.4, zero_centered_weight=zero_centered, dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["weight"] and module.bias is None and module.eps == 1e-5
    assert (module.weight == (0.0 if zero_centered else 1.0)).all()
    x = torch.randn(2, 5, D).bfloat16()
    z = torch.stack([module(x, prenorm=True)[1] for _ in range(2)])
    assert not torch.equal(z[0], z[1]), "no dropout while training"
    module.eval()
    torch.nn.init.normal_(module.weight)
    y, z = module(x, residual=x, prenorm=True, residual_in_fp32=True)
    assert z.dtype == torch.bfloat16, "the residual's"
    assert module(x, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    parts = {"zero_centered_weight": zero_centered, "is_rms_norm": True, "eps": 1e-5}
    weight = module.weight.detach()
    exact = formula(double(x), double(weight), residual=double(x), **parts)
    numerics.check(y, exact, formula(x, weight, residual=x, **parts), "y")
    assert RMSNorm(3).drop is None


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_norm_and_linear(rms: bool) -> None:
    def actual(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Any:
        return layer_norm_linear_fn(x, w, b, w2, b2, residual, prenorm=True, is_rms_norm=rms)

    def expected(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Any:
        y, z = formula(x, w, b, residual, prenorm=True, is_rms_norm=rms)
        return F.linear(y, w2, b2), z

    shapes = ((2, 5, D), (D,), (D,), (17, D), (17,), (2, 5, D))
    tensors = [normal("f32", *shape) for shape in shapes]
    judge(
        actual, expected, tensors, {}, "x norm_weight norm_bias linear_weight linear_bias residual"
    )
    out = layer_norm_linear_fn(tensors[0].bfloat16(), *tensors[1:4], None)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 17)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm_linear_fn(*tensors[:5]).dtype == torch.bfloat16


def test_sizes_of_zero() -> None:
    x, w = torch.randn(0, 4, D, requires_grad=True), torch.rand(D)
    for options in (
        {},
        {"x1": x},
        {"dropout_p": 0.5},
        {"dropout_p": 0.5, "return_dropout_mask": True},
    ):
        y = layer_norm_fn(x, w, None, prenorm=True, **options)[0]
        assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


X = torch.zeros(2, 5, 8)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"x": X.int()}, TypeError, "x: expected a floating-point tensor, got torch.int32"),
    "residual": ({"residual": X[0]}, ValueError, "residual: expected x's shape (2, 5, 8), got (5, 8)"),
    "integer residual": ({"residual": X.int()}, TypeError, "residual: expected a floating-point tensor"),
    "x1": ({"x1": X[:1]}, ValueError, "x1: expected x's shape (2, 5, 8), got (1, 5, 8)"),
    "weight": ({"weight": X[0]}, ValueError, "weight: expected shape (8,), got (5, 8)"),
    "bias": ({"bias": torch.zeros(1)}, ValueError, "bias: expected shape (8,), got (1,)"),
    "integer weight1": ({"weight1": torch.zeros(8).int()}, TypeError, "weight1: expected a floating-point tensor"),
    "bias1": ({"bias1": torch.zeros(8)}, ValueError, "bias1: given without weight1"),
    "rowscale and x1": ({"x1": X, "rowscale": torch.ones(2, 5)}, ValueError, "rowscale: given beside x1"),
    "rowscale": ({"rowscale": torch.ones(2)}, ValueError, "rowscale: expected a value for each of x's rows (2, 5)"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
    "out": ({"out": X[0]}, ValueError, "out: expected x's shape (2, 5, 8), got (5, 8)"),
    "residual_out": ({"residual_out": X[0]}, ValueError, "residual_out: expected x's shape"),
}  # fmt: skip


@pytest.mark.parametrize("function", [layer_norm_fn, rms_norm_fn])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str, function: Any) -> None:
    change, error, message = WRONG[name]
    good = {"x": X, "weight": torch.ones(8), "bias": None}
    with pytest.raises(error, match=re.escape(message)):
        function(**(good | change))
    assert function(**good).shape == X.shape
