"""Launcher of csrc/cpu/sample.cpp: tokens by their logits, and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import module, why_unavailable

ONE = 1 << 40  # weight of the likeliest token


def why_not_sample(*logits: Tensor) -> str | None:
    """Each of them float32 [R, V]."""
    for t in logits:
        if not t.is_cpu:
            return f"logits are on {t.device}, not on the CPU"
        if t.stride(1) != 1 and t.shape[1] > 1:
            return f"logits have stride {t.stride(1)} in their last dimension, the kernel needs 1"
    return why_unavailable()


def sample(
    logits: Tensor,
    seeds: Sequence[tuple[int, int]],
    steps: Sequence[int],
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    raw: Tensor | None = None,
    top: int = 0,
) -> tuple[list[int], list[tuple[Any, ...]] | None]:
    """(a token for each row, (token, log-probability, those of the `top` likeliest) of each by raw, if it is given).

    See pyfuse/generation/sampling.py. ValueError: a row of which no probabilities can be made.
    """
    found: tuple[list[int], list[tuple[Any, ...]] | None] = module().sample(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        temperature or 0.0,
        top_k or 0,
        1.0 if top_p is None else top_p,
        0 if min_p is None else math.ceil(min_p * ONE),
        seeds,
        steps,
        0 if raw is None else raw.data_ptr(),
        0 if raw is None else raw.stride(0),
        top,
        torch.get_num_threads(),
    )
    return found
