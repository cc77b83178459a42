"""How Triton kernels are compiled and launched: arguments, specialisation, errors."""

# mypy: allow-untyped-defs
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptxemu import EmulationError, Output, triton_run

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

pytestmark = pytest.mark.triton


@triton.jit
def affine_kernel(y, pair, n, a: tl.float16, b: tl.bfloat16, negate, bias, BLOCK: tl.constexpr):
    """y = a x + b (+ bias), for pair = (x, (stride, scale)); x has that stride, and all is multiplied by scale."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pair[0] + i * pair[1][0], mask=i < n).to(tl.float32)
    result = (a.to(tl.float32) * x + b.to(tl.float32)) * pair[1][1]
    if bias is not None:
        result += tl.load(bias + i, mask=i < n)
    tl.store(y + i, tl.where(negate, -result, result), mask=i < n)


def affine(x: torch.Tensor, n: int, *rest: Any, scale: float = 2.0, **options: Any) -> torch.Tensor:
    y = torch.empty(n)
    pair = (x, (x.stride(0), scale))
    report = triton_run.launch(
        affine_kernel,
        lambda arguments: (triton.cdiv(arguments["n"], arguments["BLOCK"]),),
        *(Output(y), pair, n, *rest),
        **{"BLOCK": 128, **options},
    )
    assert report.instructions > 0
    return y


@pytest.mark.parametrize("n", [1, 16, 300])
@pytest.mark.parametrize("stride", [1, 3, 16])
@pytest.mark.parametrize("negate", [False, True])
def test_scalars_tuples_and_none_are_passed(n: int, stride: int, negate: bool) -> None:
    x = torch.randn(n, stride)[:, 0]
    expected = (1.5 * x - 0.375) * 2 * (-1 if negate else 1)
    torch.testing.assert_close(affine(x, n, 1.5, -0.375, negate, None), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_pointers_of_many_types(dtype: torch.dtype) -> None:
    x = torch.arange(-20, 44).to(dtype)
    bias = torch.randn(64)
    y = affine(x, 64, 1.0, 0.5, False, bias, scale=1.0, num_warps=2)
    torch.testing.assert_close(y, x.float() + 0.5 + bias)


def test_unaligned_pointers_get_other_code() -> None:
    x, y = torch.randn(520), torch.empty(512)
    vectors = [
        triton_run.compile_ptx(doubled_kernel, view, y, 512, BLOCK=512).count("ld.global.v4")
        for view in (x[:512], x[1:513])
    ]
    assert vectors == [1, 0]


@triton.jit
def doubled_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.device_assert(n > 3, "more than three")
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@pytest.mark.parametrize("ctas", [1, 2])
def test_blocks_of_a_cluster_share_a_program(ctas: int) -> None:
    x = torch.randn(1000)
    y = torch.full_like(x, torch.nan)
    triton_run.launch(doubled_kernel, (2,), x, Output(y), 1000, arch=90, BLOCK=512, num_ctas=ctas)
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)


def test_findings_name_arguments() -> None:
    x, y = torch.randn(40), torch.empty(39)
    with pytest.raises(EmulationError, match="past the end of y"):
        triton_run.launch(doubled_kernel, (1,), x, y, 40, BLOCK=64)
    report = triton_run.launch(doubled_kernel, (1,), x, y, 40, BLOCK=64, check=False)
    assert report.kinds() == {"out-of-bounds"}


def test_device_asserts_trap_in_debug_mode() -> None:
    x, y = torch.randn(2, 3)
    triton_run.launch(doubled_kernel, (1,), x, y, 3, BLOCK=64)
    with pytest.raises(EmulationError, match="more than three"):
        triton_run.launch(doubled_kernel, (1,), x, y, 3, BLOCK=64, debug=True)


X, Y = torch.zeros(64), torch.zeros(64)
REFUSED: dict[str, tuple[type[Exception], tuple[Any, ...], dict[str, Any]]] = {
    "y: a tensor on meta": (TypeError, (X, Y.to("meta"), 64), {}),
    "x: dtype torch.complex64": (TypeError, (X.to(torch.complex64), Y, 64), {}),
    "missing a required argument|doubled_kernel.. missing 1": (TypeError, (X, Y), {}),
    "stages: neither an argument of doubled_kernel": (TypeError, (X, Y, 64), {"stages": 2}),
    "grid: .0,., needs one to three": (ValueError, (X, Y, 64), {"grid": (0,)}),
    "grid: .1, 1, 1, 1., needs": (ValueError, (X, Y, 64), {"grid": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_calls_are_refused(message: str) -> None:
    error, args, options = REFUSED[message]
    with pytest.raises(error, match=message):
        triton_run.launch(
            doubled_kernel, options.get("grid", (1,)), *args, BLOCK=64,
            **{name: value for name, value in options.items() if name != "grid"},
        )  # fmt: skip


def test_only_plain_kernels_are_run() -> None:
    with pytest.raises(TypeError, match="fn: function, needs a function decorated"):
        triton_run.launch(doubled_kernel.fn, (1,), X, Y, 64, BLOCK=64)


@triton.jit
def product_kernel(x, y, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    left = tl.load(x + m[:, None] * K + k[None, :])
    right = tl.load(x + k[:, None] + m[None, :] * K)
    tl.store(y + m[:, None] * M + m[None, :], tl.dot(left, right))


def test_too_much_shared_memory_is_refused() -> None:
    x, y = torch.zeros(64, 1024, dtype=torch.float16), torch.zeros(64, 64)
    with pytest.raises(ValueError, match="262144 B of shared memory, sm_89 has 101376"):
        triton_run.launch(product_kernel, (1,), x, y, M=64, K=1024, arch=89, num_warps=8)


def test_without_triton() -> None:
    """The emulator and this module import; a launch says what is missing."""
    script = """
import sys
sys.modules["triton"] = None
from ptxemu import triton_run
try:
    triton_run.launch(None, (1,))
except triton_run.TritonNotFound as error:
    print(error)
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tests
    )
    assert done.stdout == "triton is not installed; it compiles the kernel\n"
