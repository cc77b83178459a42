"""Batches with padding for models that unpad, and the fixture that lets them do so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_cases import ENCODERS, MORE_ENCODERS, build, tokens
from torch import Tensor, nn

import pyfuse
from pyfuse.hf import attention as hf_attention
from pyfuse.hf import entry

NAMES = [name for name in (*ENCODERS, *MORE_ENCODERS) if name != "prelayernorm"]
LENGTH = 24
LENGTHS = {"right": [24, 9, 1, 17], "left": [24, 9, 1, 17], "holes": [24, 9, 1, 17]}
SIDES = list(LENGTHS)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


packed_rows: list[int] = []  # T of every call of attention on packed rows, in this test


@pytest.fixture(autouse=True)
def unpads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For test files that import it: models unpad, whether or not a kernel is there for it."""
    objections, varlen = entry._objections, pyfuse.varlen_attention
    packed_rows.clear()

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed_rows.append(q.shape[0])
        return varlen(q, *args, **kwargs)

    def without(model: Any) -> dict[str, str]:
        return {k: why for k, why in objections(model).items() if k != "packed attention"}

    monkeypatch.setattr(entry, "_objections", without)
    monkeypatch.setattr(hf_attention, "varlen_attention", counted)


def accelerate(model: Any, **options: Any) -> pyfuse.Receipt:
    return pyfuse.accelerate(model, **{"verify": False, "linear": False, **options})


def batch(model: Any, side: str, lengths: list[int] | None = None) -> dict[str, Tensor]:
    """Rows of these lengths, among padding tokens on one side, or with every second one a hole."""
    mask = torch.arange(LENGTH) < torch.tensor(lengths or LENGTHS[side])[:, None]
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 3:11:2] = False
        mask[3, 1:4] = False
    ids = tokens(len(mask), LENGTH).masked_fill(~mask, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def states(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).last_hidden_state


def computed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """bool [B, S]: where unpadding computes."""
    kept = inputs["attention_mask"].bool() | (inputs["input_ids"] != model.config.pad_token_id)
    kept[:, 0] = True
    return kept


def example(model: Any, side: str = "right") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch, where unpadding computes, and what the model as it is now says there."""
    inputs = batch(model, side)
    kept = computed(model, inputs)
    return inputs, kept, states(model, inputs)[kept]


def attributes(model: nn.Module) -> dict[str, int]:
    """Which object each attribute of each module is."""
    return {
        f"{path}.{key}": id(value)
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
    }


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def with_head(cls: Any, name: str) -> Any:
    """A head on the model that build() makes."""
    body = build(name)
    torch.manual_seed(3)
    model = cls(copy.deepcopy(body.config)).eval()
    getattr(model, model.base_model_prefix, model).load_state_dict(body.state_dict(), strict=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class Double(nn.Module):
    """Anything that is put into the model later."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[:2] == (4, LENGTH)
        y: Tensor = self.inner(x)
        return y
