"""The promised figures of pyfuse.nn: a Transformer encoder by another import, and by none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyfuse.nn
from benchmarks.bar import Bar, times_bar
from benchmarks.command import require
from benchmarks.turns import in_turns, ratio
from pyfuse.cli import measure

SCRIPT = Path(__file__).with_name("encoder_script.py")
TRAINING, INFERENCE = 2.0, 1.5
BATCH, LENGTH, WIDTH = 16, 512, 512


def modules() -> Iterator[Bar]:
    """4 layers of width 512 with 8 heads on 16 x 512 tokens."""
    encoders = {name: _encoder(parts) for name, parts in (("torch", nn), ("pyfuse", pyfuse.nn))}
    x = torch.randn(BATCH, LENGTH, WIDTH)
    _check(encoders, x[:2])
    steps = {name: measure.stopwatch(_step(m, x)) for name, m in encoders.items()}
    size = "nn.TransformerEncoder, 4 x 512, 16 x 512 tokens"
    training = ratio(in_turns(steps, budget=60, least=5), "torch", "pyfuse")
    yield times_bar(f"{size}: training step, dropout 0.1", training, TRAINING)
    runs = {name: measure.stopwatch(_inference(m, x)) for name, m in encoders.items()}
    inference = ratio(in_turns(runs, budget=20, least=5), "torch", "pyfuse")
    yield times_bar(f"{size}: eval, against torch's fast path", inference, INFERENCE)
    yield _script()


def _encoder(parts: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = parts.TransformerEncoderLayer(WIDTH, 8, dropout=0.1, batch_first=True)
    encoder: nn.Module = parts.TransformerEncoder(layer, 4)
    return encoder


def _check(encoders: dict[str, nn.Module], x: Tensor) -> None:
    with torch.no_grad():
        theirs, ours = (encoders[name].eval()(x) for name in ("torch", "pyfuse"))
        exact = encoders["torch"].double()(x.double())
        encoders["torch"].float()
    require("TransformerEncoder", ours, theirs, exact)


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    wanted = torch.randn_like(x)

    def step() -> object:
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.inference_mode():
            return model(x)

    return run


def _script() -> Bar:
    """The same training by a script that imports torch alone: processes of their own, in turns."""
    words = [str(SCRIPT), str(torch.get_num_threads()), "4"]
    texts: dict[str, str] = {}

    def run(name: str, *prefix: str) -> Callable[[], float]:
        def once() -> float:
            done = subprocess.run(
                [sys.executable, *prefix, *words], cwd=SCRIPT.parent.parent, env=os.environ,
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            texts[name] = done.stderr
            return float(done.stdout.split()[0]) / 1e3

        return once

    runs = {"torch": run("torch"), "pyfuse": run("pyfuse", "-m", "pyfuse", "run")}
    spread = ratio(in_turns(runs, budget=0, least=3), "torch", "pyfuse")
    counts = re.search(r"\d+ calls run by pyfuse, \d+ left to torch", texts["pyfuse"])
    note = f", {counts[0]}" if counts else ", no count was printed"
    bar = times_bar("the same by `pyfuse run` of an unchanged script", spread, TRAINING, note)
    return bar if counts else Bar(bar.name, bar.figure, bar.target, met=False)
