"""The promised figures of the loss of a language model's last layer: time and memory of a training step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.bar import Bar, times_bar
from benchmarks.command import require
from benchmarks.loss_memory import LOSSES, K, inputs, step
from benchmarks.turns import in_turns, ratio
from pyfuse.backends import torch_loss
from pyfuse.cli import measure
from pyfuse.ops.linear import linear_choices

TOKENS, VOCABULARY = 4096, 49152  # a batch of a small training run; SmolLM2's vocabulary
BUDGET = 60.0
TIMES, MEMORY = 1.2, 1 / 8  # targets; that of the time is for CPUs with AVX-512


def loss() -> Iterator[Bar]:
    """Forward and backward in float32, against F.cross_entropy of F.linear."""
    name = f"linear_cross_entropy {TOKENS} x {VOCABULARY} x {K}, forward and backward"
    yield _time(name)
    yield _memory(name)


def _time(name: str) -> Bar:
    x, weight, target = given = inputs(512, 4099)
    wide, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = step(LOSSES["stock"], wide, wide_weight, target)
    both = (step(LOSSES[label], *given) for label in ("pyfuse", "stock"))
    for part, ours, eager, truth in zip(("loss", "dx", "dW"), *both, exact, strict=True):
        require(f"linear_cross_entropy {part}", ours, eager, truth)
    x, weight, target = inputs(TOKENS, VOCABULARY)

    def run(label: str) -> Callable[[], object]:
        return lambda: step(LOSSES[label], x, weight, target)

    runs = {label: measure.stopwatch(run(label)) for label in LOSSES}
    rounds = in_turns(runs, budget=BUDGET, least=3)
    rows = torch_loss.sizes(VOCABULARY, K, torch.float32).rows
    choices = linear_choices(rows, VOCABULARY, K)
    ways = ", ".join(f"{kind} {choice.way}" for kind, choice in choices.items())
    return times_bar(f"{name}: against torch", ratio(rounds, "stock", "pyfuse"), TIMES, f"; {ways}")


def _memory(name: str) -> Bar:
    mib = {label: _mib(label) for label in LOSSES}
    share = mib["pyfuse"] / mib["stock"]
    figure = f"1/{1 / share:.1f}  ({mib['stock']:.0f} -> {mib['pyfuse']:.0f} MiB)"
    return Bar(f"{name}: extra memory", figure, "<= 1/8 of torch's", share <= MEMORY)


def _mib(label: str) -> float:
    size = ["--tokens", str(TOKENS), "--vocabulary", str(VOCABULARY)]
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.loss_memory", label, *size, *threads]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
