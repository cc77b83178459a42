"""LayerNorm and RMSNorm: every kernel against eager, eager against torch and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from numerics import assert_bitwise_equal, check
from torch import Tensor

import pyfuse

pytestmark = pytest.mark.emulated(sm_80=5, sm_90=32, sm_89=64, sm_120=64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 3, 15, 16, 17, 63, 65, 111, 197, 576, 768, 4097]
KINDS = ["layer_norm", "no_bias", "only_bias", "no_weight", "llama", "gemma", "torch", "rms_plain"]
Result = Tensor | tuple[Tensor, Tensor]


def norm(kind: str, x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Any:
    """Of this kind; what GPUs' kernels refuse skips the test."""
    try:
        return norm_of(kind, x, w, b, **options)
    except NotImplementedError as refusal:
        if options["backend"] not in ("cuda", "triton"):
            raise
        pytest.skip(str(refusal).splitlines()[-1].strip())


def norm_of(kind: str, x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Any:
    if kind in ("llama", "gemma", "torch", "rms_plain"):
        casting = "llama" if kind == "rms_plain" else kind
        weight = None if kind == "rms_plain" else w
        return pyfuse.rms_norm(x, weight, casting=casting, **options)
    weight = w if kind in ("layer_norm", "no_bias") else None
    bias = b if kind in ("layer_norm", "only_bias") else None
    return pyfuse.layer_norm(x, weight, bias, **options)


def inputs(
    rows: int, d: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, bias; x's mean is not 0, so that forgetting it shows."""
    x, residual = torch.randn(rows, d) + 0.5, torch.randn(rows, d)
    w, b = torch.randn(d) + 1, torch.randn(d)
    wide = weight_dtype or dtype
    return x.to(dtype), residual.to(dtype), w.to(wide), b.to(wide)


def check_norm(kind: str, target: Target, x: Tensor, w: Tensor, b: Tensor, name: str) -> None:
    actual = norm(kind, x, w, b, backend=target.backend)
    eager = norm(kind, x, w, b, backend="eager")
    exact = norm(kind, x.double(), w.double(), b.double(), backend="eager")
    check(actual, exact, eager, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel(kind: str, dtype: torch.dtype, target: Target) -> None:
    for d in SIZES:
        x, _, w, b = inputs(5, d, dtype)
        check_norm(kind, target, x, w, b, f"{kind} of {d}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_with_residual(kind: str, dtype: torch.dtype, target: Target) -> None:
    for d in SIZES:
        x, residual, w, b = inputs(5, d, dtype)
        y, z = norm(kind, x, w, b, residual=residual, prenorm=True, backend=target.backend)
        assert_bitwise_equal(z, x + residual, f"z of {d}")
        only_y = norm(kind, x, w, b, residual=residual, backend=target.backend)
        assert_bitwise_equal(only_y, y, f"y without z of {d}")
        assert_bitwise_equal(y, norm(kind, z, w, b, backend=target.backend), f"norm of z, {d}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "only_bias", "gemma", "torch"])
def test_kernel_with_float32_weights(kind: str, dtype: torch.dtype, target: Target) -> None:
    for d in SIZES:
        x, _, w, b = inputs(5, d, dtype, torch.float32)
        check_norm(kind, target, x, w, b, f"{kind} of {d}")


@pytest.mark.parametrize("kind", ["llama", "gemma", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_rounds_where_the_model_does(kind: str, dtype: torch.dtype, target: Target) -> None:
    # Rounding n once too often or too rarely is within the accuracy rule, but not the same numbers.
    x, _, w, b = inputs(40, 768, dtype)
    same = norm(kind, x, w, b, backend=target.backend) == norm(kind, x, w, b, backend="eager")
    assert same.double().mean().item() > 0.995


@pytest.mark.parametrize("kind", ["layer_norm", "llama"])
def test_large_mean_does_not_cancel(kind: str, target: Target) -> None:
    for d in (65, 768):
        # Many rows: each one's error is that of rounding its mean, which is luck.
        x, _, w, b = inputs(200, d, torch.float32)
        check_norm(kind, target, x + 1e4, w, b, f"{kind} of {d}")


@pytest.mark.parametrize("kind", ["layer_norm", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_neighbours_change_no_bit(
    kind: str, dtype: torch.dtype, target: Target
) -> None:
    x, residual, w, b = inputs(203, 577, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                norm(kind, x, w, b, residual=residual, prenorm=True, backend=target.backend)
            )
    finally:
        torch.set_num_threads(before)
    for y, z in results[1:]:
        assert_bitwise_equal(y, results[0][0], "y")
        assert_bitwise_equal(z, results[0][1], "z")
    for row in (0, 1, 202):
        part = slice(row, row + 1)
        alone = norm(kind, x[part], w, b, residual=residual[part], backend=target.backend)
        assert_bitwise_equal(alone, results[0][0][part], f"row {row} alone")


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout: str, target: Target) -> None:
    x, residual = torch.randn(3, 5, 65), torch.randn(3, 5, 65)
    w, b = torch.randn(130)[::2], torch.randn(65)
    expected_y, expected_z = norm(
        "layer_norm", x, w, b, residual=residual, prenorm=True, backend=target.backend
    )
    strided = STRIDED[layout](x)
    assert not strided.is_contiguous() and torch.equal(strided, x)
    for r in (residual, STRIDED[layout](residual)):
        y, z = norm("layer_norm", strided, w, b, residual=r, prenorm=True, backend=target.backend)
        assert torch.equal(y, expected_y) and torch.equal(z, expected_z)
        assert y.stride() == torch.empty_like(strided).stride()
        assert z.stride() == torch.empty_like(r).stride()
    one_row = residual[:1, :1].expand(3, 5, 65)
    y = norm("layer_norm", x, w, b, residual=one_row, backend=target.backend)
    dense = norm("layer_norm", x, w, b, residual=one_row.contiguous(), backend=target.backend)
    assert torch.equal(y, dense)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (7,), (1, 1, 1, 7)])
def test_any_leading_shape(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape)
    w, b = torch.randn(7), torch.randn(7)
    y, z = pyfuse.layer_norm(x, w, b, residual=x, prenorm=True, backend=backend)
    assert y.shape == z.shape == x.shape
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + x, (7,), w, b))


def test_nan_and_infinity_stay_in_their_row(target: Target) -> None:
    x, _, w, b = inputs(5, 67, torch.float32)
    clean = {kind: norm(kind, x, w, b, backend=target.backend) for kind in ("layer_norm", "llama")}
    x[1, 66], x[3, 0] = float("nan"), float("inf")
    for kind, expected in clean.items():
        y = norm(kind, x, w, b, backend=target.backend)
        assert torch.equal(y[::2], expected[::2])
        assert y[1].isnan().all() and y[3, 0].isnan()


def test_prenorm_without_residual_returns_x_itself(backend: str) -> None:
    x = torch.randn(3, 8)
    y, z = pyfuse.layer_norm(x, prenorm=True, backend=backend)
    assert z is x and torch.equal(y, pyfuse.layer_norm(x, backend=backend))
    y, z = pyfuse.rms_norm(x, prenorm=True, backend=backend)
    assert z is x and torch.equal(y, pyfuse.rms_norm(x, backend=backend))


def test_wider_residual_stays_wide(backend: str) -> None:
    x, _, w, b = inputs(5, 65, torch.bfloat16)
    residual = torch.randn(5, 65)
    y, z = pyfuse.layer_norm(x, w, b, residual=residual, prenorm=True, backend=backend)
    assert z.dtype == torch.float32 and torch.equal(z, x.float() + residual)
    assert y.dtype == torch.bfloat16
    expected = torch.nn.functional.layer_norm(z, (65,), w.float(), b.float())
    assert (y == expected.bfloat16()).double().mean().item() > 0.97
    y, _ = pyfuse.rms_norm(x, w, residual=residual, prenorm=True, backend=backend)
    assert y.dtype == torch.bfloat16


# ---- the same as the modules it stands in for ---------------------------------------------------


def peer(name: str) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """A module of 197 features with random parameters, and pyfuse's call for it."""
    if name in ("LayerNorm", "RMSNorm"):
        module = getattr(torch.nn, name)(197, eps=1e-5)
    elif name == "LlamaRMSNorm":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        module = LlamaRMSNorm(197, eps=1e-5)
    elif name == "GemmaRMSNorm":
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

        module = GemmaRMSNorm(197)
    else:
        from transformers.models.t5.modeling_t5 import T5LayerNorm

        module = T5LayerNorm(197)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)

    def ours(x: Tensor, **options: Any) -> Tensor:
        if name == "LayerNorm":
            y = pyfuse.layer_norm(x, module.weight, module.bias, module.eps, **options)
        elif name == "RMSNorm":
            y = pyfuse.rms_norm(x, module.weight, module.eps, casting="torch", **options)
        else:
            eps = getattr(module, "variance_epsilon", None) or module.eps
            casting = "gemma" if name == "GemmaRMSNorm" else "llama"
            y = pyfuse.rms_norm(x, module.weight, eps, casting=casting, **options)
        return y

    return module, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["LayerNorm", "RMSNorm", "LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"]
)
@torch.no_grad()
def test_equals_module(name: str, dtype: torch.dtype) -> None:
    module, ours = peer(name)
    x = torch.randn(4, 9, 197).to(dtype)
    module.to(dtype)
    expected = module(x)
    module.double()  # `ours` reads the module's parameters as they are
    exact = ours(x.double(), backend="eager")
    module.to(dtype)
    eager = ours(x, backend="eager")
    if name in ("LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"):
        assert_bitwise_equal(eager, expected, name)
    else:
        torch.testing.assert_close(eager, expected)
    check(ours(x), exact, expected, name)


@torch.no_grad()
def test_llama_casting_with_float32_weight_gives_float32(backend: str) -> None:
    module, ours = peer("LlamaRMSNorm")
    x = torch.randn(5, 197).bfloat16()
    y, expected = ours(x, backend=backend), module(x)
    assert y.dtype == torch.float32
    if backend == "eager":
        assert_bitwise_equal(y, expected, "float32 weight")
    else:  # n is rounded to bfloat16 before the weight: what differs, differs by a unit of that
        assert (y == expected).double().mean().item() > 0.9
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
