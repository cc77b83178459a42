"""The backward of the norms by every backend, and dropout, against eager in float64."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import torch
from conftest import Target
from torch import Tensor

import pyfuse

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("layer_norm", {}),
    "layer-prenorm": ("layer_norm", {"residual": True, "prenorm": True}),
    "layer-dropout": ("layer_norm", {"residual": True, "prenorm": True, "dropout_p": 0.3}),
    "layer-plain": ("layer_norm", {"weight": False}),
    "llama": ("rms_norm", {"residual": True}),
    "gemma": ("rms_norm", {"casting": "gemma", "residual": True, "prenorm": True}),
    "torch": ("rms_norm", {"casting": "torch", "dropout_p": 0.3}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def made(name: str, rows: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    op, options = CASES[name]
    leaves = {"x": torch.randn(rows, d).to(dtype)}
    if options.get("residual"):
        leaves["residual"] = torch.randn(rows, d).to(dtype)
    if options.get("weight", True):
        leaves["weight"] = torch.randn(d).to(dtype)
        if op == "layer_norm":
            leaves["bias"] = torch.randn(d).to(dtype)
    return leaves


def run(
    name: str, leaves: dict[str, Tensor], backend: str, upstream: Tensor, wide: bool = False
) -> dict[str, Tensor]:
    """Results and the gradient of every leaf."""
    op, options = CASES[name]
    points = {n: (t.double() if wide else t).detach().requires_grad_() for n, t in leaves.items()}
    flags = {n: v for n, v in options.items() if n not in ("residual", "weight")}
    torch.manual_seed(1)
    result = getattr(pyfuse, op)(**points, **flags, backend=backend)
    results = result if isinstance(result, tuple) else (result,)
    loss = sum((r * upstream.to(r.dtype) * (i + 1)).sum() for i, r in enumerate(results))
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, list(points.values()))
    named = {f"d{n}": g for n, g in zip(points, found, strict=True)}
    return named | {f"result {i}": r for i, r in enumerate(results)}


@pytest.mark.parametrize("d", [1, 3, 65, 768, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(target: Target, name: str, dtype: torch.dtype, d: int) -> None:
    leaves, upstream = made(name, 37, d, dtype), torch.randn(37, d)
    actual = run(name, leaves, target.backend, upstream)
    exact = run(name, leaves, "eager", upstream, wide=True)
    eager = run(name, leaves, "eager", upstream)
    for key, value in actual.items():
        if (
            dtype == torch.float64
        ):  # of one element the exact dx is a difference of roundings, so absolute
            torch.testing.assert_close(value, exact[key], rtol=1e-9, atol=1e-11)
            continue
        kind: numerics.Kind = "gradient" if key.startswith("d") else "output"
        numerics.check(value, exact[key], eager[key], key, kind)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_every_thread_count(target: Target, name: str) -> None:
    leaves, upstream = made(name, 777, 111, torch.float32), torch.randn(777, 111)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(name, leaves, target.backend, upstream)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            for key, value in run(name, leaves, target.backend, upstream).items():
                numerics.assert_bitwise_equal(value, expected[key], f"{key}, {threads} threads")
    finally:
        torch.set_num_threads(before)
