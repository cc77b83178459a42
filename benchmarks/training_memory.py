"""MiB that a training step of a language model takes at its height beyond weights, gradients and optimizer, in
a process of its own.

    python -m benchmarks.training_memory torch|pyfuse [--threads N]

GPT-2's width, 4 layers, 1 x 4096 tokens, float32. Linux only.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import pyfuse.ops
from benchmarks.dropout_memory import resident
from benchmarks.loss_memory import Sampler
from pyfuse.cli import machine
from pyfuse.models import stock
from pyfuse.models.transformer import Config, Transformer

TOKENS = 4096
MODEL = Config(vocabulary=50257, width=768, layers=4, heads=12, hidden=3072, max_positions=TOKENS)


def batch(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        MODEL.vocabulary, (rows, tokens + 1), generator=torch.Generator().manual_seed(0)
    )
    return ids[:, :-1], ids[:, 1:]


def peak(model: Transformer) -> int:
    """Bytes beyond what was there before the step and stays after it."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step(tokens: int) -> None:
        ids, targets = batch(1, tokens)
        model(ids, targets=targets).backward()
        optimizer.step()

    step(64)  # gradients and the optimizer's state are there from now on
    before = resident("VmRSS")
    sampler = Sampler()
    sampler.start()
    step(TOKENS)
    sampler.done.set()
    sampler.join()
    return sampler.height - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory")
    parser.add_argument("operations", choices=("torch", "pyfuse"))
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ops = stock if arguments.operations == "torch" else pyfuse.ops
    print(f"{peak(Transformer(MODEL, ops).train()) / 2**20:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
