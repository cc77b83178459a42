"""The promised figures of training: the reference Transformer on pyfuse's operations and on torch's, by turns."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyfuse.ops
from benchmarks.bar import Bar, times_bar, unmeasured
from benchmarks.training_memory import MODEL, TOKENS, batch
from benchmarks.turns import in_turns, ratio
from pyfuse.cli import measure
from pyfuse.folders import cache_folder
from pyfuse.models import stock, zoo
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import classifier, lm, reviews

STEP, DROPOUT_STEP, FINE_TUNING, MEMORY = 1.5, 2.5, 1.6, 0.5
OPERATIONS = {"torch": stock, "pyfuse": pyfuse.ops}
# Of a batch of texts: tokens of each, as sentences have them (mean 67 of 128).
TEXTS, LONGEST = 32, 128
# Of the classifier: steps of 32 texts, and how far below plain torch's F1 ours may be.
STEPS, POINTS = 150, 0.01
# Of the language model: steps, and what share of the uniform perplexity it falls below in how many minutes.
LM_STEPS, SHARE, MINUTES = 100, 0.1, 10


def training() -> Iterator[Bar]:
    """Forward, loss, backward and AdamW."""
    size = "GPT-2's width (768, 12 heads, 4 layers), 2 x 1024 tokens"
    yield _language_model(f"{size}: training step", 0.0, STEP)
    yield _language_model(f"{size}: training step, dropout 0.1", 0.1, DROPOUT_STEP)
    yield _fine_tuning()
    yield _classifier()
    yield _perplexity()
    yield _memory()


def _language_model(name: str, dropout: float, target: float) -> Bar:
    fields = vars(MODEL) | {"dropout": dropout, "attention_dropout": dropout}
    ids, targets = batch(2, 1024)
    steps = {}
    for label, ops in OPERATIONS.items():
        torch.manual_seed(0)
        model = Transformer(Config(**fields), ops)
        steps[label] = measure.stopwatch(_step(model, ids, targets=targets))
    return times_bar(name, ratio(in_turns(steps, budget=60, least=5), "torch", "pyfuse"), target)


def _fine_tuning() -> Bar:
    name = f"MiniLM, fine-tuning step, {TEXTS} texts of up to {LONGEST} tokens"
    if zoo.problem("minilm") is not None:
        return unmeasured(name, "minilm is not fetched: make models", f">= {FINE_TUNING} x")
    lengths = 6 + torch.arange(TEXTS) * (LONGEST - 6) // (TEXTS - 1)
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids = torch.randint(1000, 20000, mask.shape) * mask
    targets = torch.arange(TEXTS) % 2
    steps = {}
    for label, ops in OPERATIONS.items():
        model = from_pretrained(zoo.path("minilm"), ops=ops, head="classes", classes=2, dropout=0.1)
        steps[label] = measure.stopwatch(_step(model, ids, mask, targets=targets))
    spread = ratio(in_turns(steps, budget=60, least=5), "torch", "pyfuse")
    return times_bar(f"{name} ({mask.double().mean():.0%} real)", spread, FINE_TUNING)


def _classifier() -> Bar:
    """`pyfuse train classifier` with and without --stock: the same weights and batches, other dropout. The noise is the
    standard error of a share of so many texts."""
    name = f"MiniLM, {STEPS} steps on film reviews: macro F1 of what is held out"
    target = f">= torch's less {100 * POINTS:g} point"
    try:
        options = {
            "data": [reviews.fetch(cache_folder() / "data" / "reviews.csv")],
            "from_": zoo.path("minilm"),
            "steps": STEPS,
            "eval_every": 0,
            "save_every": 0,
        }
    except (FileNotFoundError, zoo.FetchError) as error:
        return unmeasured(name, str(error), target)
    found: dict[str, classifier.Result] = {}
    for label in OPERATIONS:
        with tempfile.TemporaryDirectory() as folder:
            given = {**options, "stock": label == "torch"}
            result = classifier.run(Path(folder), given, speak=io.StringIO())
        assert result is not None  # this is the only process
        found[label] = result
    ours, theirs = (found[label].metrics.macro("f1") for label in ("pyfuse", "torch"))
    figure = (
        f"{ours:.1%}, torch {theirs:.1%}  "
        f"({found['torch'].seconds:.0f} -> {found['pyfuse'].seconds:.0f} s of steps)"
    )
    behind, texts = theirs - ours, int(found["torch"].metrics.support.sum())
    noise = (theirs * (1 - theirs) / texts) ** 0.5
    return Bar(name, figure, target, behind <= POINTS, abs(behind - POINTS) < noise)


def _perplexity() -> Bar:
    """`pyfuse train lm` as it is, but for its length; the time is of everything, reading and tokenizing too."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = {"steps": LM_STEPS, "eval_every": 0, "save_every": 0}
        result = lm.run(Path(folder), given, speak=io.StringIO())
    minutes = (time.perf_counter() - began) / 60
    assert result is not None  # this is the only process
    found = result.perplexity / result.uniform
    return Bar(
        f"train lm, {LM_STEPS} steps: perplexity on held-out text",
        f"{result.perplexity:.0f}, 1/{1 / found:.0f} of uniform, in {minutes:.1f} minutes",
        f"< 1/{1 / SHARE:.0f} in {MINUTES}", found < SHARE and minutes <= MINUTES,
    )  # fmt: skip


def _step(model: Transformer, *given: Tensor, **more: Any) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    model.train()

    def step() -> object:
        optimizer.zero_grad()
        loss = model(*given, **more)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _memory() -> Bar:
    mib = {label: _mib(label) for label in OPERATIONS}
    share = mib["pyfuse"] / mib["torch"]
    figure = f"{share:.2f} x  ({mib['torch']:.0f} -> {mib['pyfuse']:.0f} MiB)"
    return Bar(
        f"the same model, 1 x {TOKENS} tokens: peak memory of a training step", figure,
        f"<= {MEMORY} x torch's", share <= MEMORY,
    )  # fmt: skip


def _mib(label: str) -> float:
    command = [
        sys.executable,
        "-m",
        "benchmarks.training_memory",
        label,
        "--threads",
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return float(done.stdout)
