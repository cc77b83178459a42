"""32 steps of training: every loss and the last parameters are plain torch's, for the reference models and for those of
Hugging Face under accelerate()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hf_cases import _SIZES, VOCAB, build
from model_cases import minis
from torch import Tensor, nn

import pyfuse
import pyfuse.ops
from pyfuse.models import stock
from pyfuse.models.transformer import Transformer

STEPS, BATCH, LENGTH = 32, 4, 48
MINIS = minis(vocabulary=VOCAB, width=64, layers=2, heads=4, hidden=128)
# Of the loss, relative; of the last parameters, the largest difference in float32. In bfloat16 it is their root mean
# square: the bias of the keys has no gradient but rounding (softmax does not see it), of which Adam makes whole steps.
LIMITS = {torch.float32: (1e-5, 5e-3), torch.bfloat16: (1e-2, 5e-3)}


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, targets, mask): few words that repeat themselves, so that there is something to learn, and padding."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(STEPS):
        words = torch.randint(3, 15, (BATCH, 7), generator=generator)
        ids = words.repeat(1, LENGTH // 7 + 2)[:, : LENGTH + 1]
        mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        mask[1, 30:] = 0
        made.append((ids[:, :-1], ids[:, 1:].masked_fill(mask == 0, -100), mask))
    return made


def trained(model: nn.Module, loss_of: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(runs: list[tuple[nn.Module, list[float]]], dtype: torch.dtype) -> None:
    (ours, losses), (theirs, stocks) = runs
    assert losses[-1] < 0.9 * losses[0], "nothing was learnt"
    loss_limit, parameter_limit = LIMITS[dtype]
    for step, (a, b) in enumerate(zip(losses, stocks, strict=True)):
        assert abs(a - b) <= loss_limit * abs(b), f"step {step}: {a}, torch {b}"
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        apart = a.detach() - b.detach()
        distance = apart.square().mean().sqrt() if dtype == torch.bfloat16 else apart.abs().max()
        assert distance <= parameter_limit, name


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", MINIS)
def test_reference_models(name: str, dtype: torch.dtype) -> None:
    runs = []
    for ops in (pyfuse.ops, stock):
        torch.manual_seed(1)
        model = Transformer(MINIS[name], ops)

        def loss_of(
            ids: Tensor, targets: Tensor, mask: Tensor, model: Transformer = model
        ) -> Tensor:
            more = {}
            if model.encoder is not None:
                more = {"memory": model.encode(ids, mask), "memory_mask": mask}
            y: Tensor = model(ids, mask, targets=targets, **more)
            return y

        runs.append((model, trained(model, loss_of, dtype)))
    compare(runs, dtype)


def made(name: str) -> Any:
    """A small model of Hugging Face's, with weights as they are initialised for BERT, with larger ones for others."""
    if not name.startswith("Bert"):
        return build(name)
    torch.manual_seed(0)
    return getattr(hf, name)(hf.BertConfig(**_SIZES, num_labels=7))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bart", "BertForMaskedLM", "BertForSequenceClassification"]
)
def test_models_of_hugging_face_under_accelerate(name: str, dtype: torch.dtype) -> None:
    runs = []
    for accelerated in (True, False):
        model = made(name)
        for part in model.modules():  # other random numbers are other losses
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
        for part in model.modules():
            if isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
            if isinstance(getattr(part, "activation_dropout", None), float):
                part.activation_dropout = 0.0
        model.train()
        if accelerated:
            pyfuse.accelerate(model, verify=False)

        def loss_of(ids: Tensor, targets: Tensor, mask: Tensor, model: Any = model) -> Tensor:
            if name == "BertForSequenceClassification":  # which word the text begins with
                logits = model(ids, attention_mask=mask).logits
                return F.cross_entropy(logits, ids[:, 0] % 7)
            if model.config.is_encoder_decoder:
                logits = model(ids, attention_mask=mask, decoder_input_ids=ids).logits
            else:
                logits = model(ids, attention_mask=mask).logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        runs.append((model, trained(model, loss_of, dtype)))
    compare(runs, dtype)
