"""MiB that a training step of attention with dropout takes beyond its in- and outputs, in a process of its own.

    python -m benchmarks.dropout_memory [--threads N] [--keys N]

B 1, H 12, D 64, float32. The high-water mark of resident memory (VmHWM) is set back when the inputs are there;
o, its gradient, and those of q, k and v count as outputs. Linux only.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

import pyfuse
from pyfuse.cli import machine


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def step(tokens: int) -> int:
    """One step; the bytes of memory it took at its height beyond in- and outputs."""
    q, k, v, upstream = (torch.randn(1, 12, tokens, 64) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    o = pyfuse.attention(q, k, v, dropout_p=0.1, backend="cpu")
    gradients = torch.autograd.grad(o, (q, k, v), upstream)
    outputs = sum(t.nbytes for t in (o, *gradients))
    return resident("VmHWM") - before - outputs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout_memory")
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--keys", type=int, default=16384)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step(256)  # what a process pays once: threads, libraries
    print(f"{step(arguments.keys) / 2**20:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
