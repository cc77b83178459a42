"""MiB that a training step's loss takes beyond its in- and outputs, in a process of its own.

    python -m benchmarks.loss_memory stock|pyfuse [--threads N] [--tokens T] [--vocabulary V]

K 576, float32: x·Wᵀ, its cross-entropy, and the gradients of x and W. A thread samples resident memory; x, W and
their gradients do not count. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.dropout_memory import resident
from pyfuse.cli import machine
from pyfuse.ops import linear_cross_entropy

K = 576
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def stock(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


LOSSES: dict[str, Loss] = {"stock": stock, "pyfuse": linear_cross_entropy}


def inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and targets; logits of the size that a model has."""
    x = torch.randn(tokens, K, requires_grad=True)
    weight = (torch.randn(vocabulary, K) / K**0.5).requires_grad_()
    return x, weight, torch.randint(vocabulary, (tokens,))


def step(loss: Loss, x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of x and W."""
    value = loss(x, weight, target)
    value.backward()
    assert x.grad is not None and weight.grad is not None
    found = value.detach(), x.grad, weight.grad
    x.grad = weight.grad = None
    return found


class Sampler(threading.Thread):
    """The largest resident memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.height = resident("VmRSS")
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.height = max(self.height, resident("VmRSS"))


def extra_bytes(loss: Loss, tokens: int, vocabulary: int) -> int:
    """What one step took at its height beyond in- and outputs."""
    given = inputs(tokens, vocabulary)
    before = resident("VmRSS")
    sampler = Sampler()
    sampler.start()
    outputs = step(loss, *given)
    sampler.done.set()
    sampler.join()
    return sampler.height - before - sum(t.nbytes for t in outputs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_memory")
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loss = LOSSES[arguments.loss]
    step(loss, *inputs(64, 4096))  # what a process pays once: threads, libraries, calibration
    extra = extra_bytes(loss, arguments.tokens, arguments.vocabulary)
    print(f"{extra / 2**20:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
