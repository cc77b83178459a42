"""Training an accelerated model: its own code, but for the products of its linear layers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hf_cases import build, inputs_for, small_models  # noqa: F401 (small_models is a fixture)
from torch import Tensor

import pyfuse
from pyfuse.backends import cpu_matmul
from pyfuse.linear import Choice

OP = sys.modules["pyfuse.ops.linear"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways of the products made: oneDNN's for every shape, in the linear layers of training."""
    if "onednn" not in cpu_matmul.ways():
        pytest.skip("this torch is built without oneDNN")
    seen: list[str] = []

    def counted(way: str, *arguments: Any) -> Tensor:
        seen.append(way)
        return multiply(way, *arguments)

    multiply = cpu_matmul.multiply
    monkeypatch.setattr(OP, "_deterministic", lambda: False)  # it is in all tests
    monkeypatch.setattr(OP, "MIN_FLOPS", 1.0)
    monkeypatch.setattr(OP, "choose", lambda *_: cpu_matmul.Choice("onednn"))
    monkeypatch.setattr(OP, "multiply", counted)
    packed = Choice(("rows",) * 4 + ("packed",) * 4, {})
    monkeypatch.setattr("pyfuse.linear.calibrate", lambda *_: packed)
    return seen


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_linear_layers_take_the_fastest_products(name: str, made: list[str]) -> None:
    model = build(name).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**inputs_for(model, "left"))
        values = output.logits if "logits" in output else output.last_hidden_state
        values.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stock = gradients()
    assert not made
    with pyfuse.accelerate(model, verify=False):
        ours = gradients()
    assert made and set(made) == {"onednn"}
    for a, b in zip(ours, stock, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7
    made.clear()
    with pyfuse.accelerate(model, verify=False, linear=False):
        gradients()
    assert not made
