"""The learning rate of each step: up in a line, then down along a cosine (Loshchilov and Hutter, arXiv:1608.03983)."""

from __future__ import annotations

import math

FLOOR = 0.1  # of the peak, where the cosine ends: Hoffmann et al., arXiv:2203.15556, appendix B


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Of step 0 … steps - 1: peak·(step + 1) / warmup up to the peak, then to FLOOR·peak after the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done)))
