"""Dropout, with the activation that stands before it in a feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.activations import FORMULA
from pyfuse.ops._random import draw_seed


def dropout(
    x: Tensor, p: float = 0.5, *, activation: str | None = None, backend: str | None = None
) -> Tensor:
    """y = dropout(act(x)): each element is set to 0 with probability p, the others are divided by 1 - p.

    Srivastava et al., JMLR 15 (2014). In backward, dx = act'(x) · dy / (1 - p) where y was kept, else 0.

    x [..., D], any leading shape: float32, bfloat16, float16 or float64; y likewise, computed in
      float32 or wider and rounded once.
    p: at least 0 and below 1. The seed comes from torch's default generator, one draw for a call;
      which elements it drops is the same on every backend. Pass 0 outside training: without an
      activation y is x itself then, not a copy.
    activation: "relu", "gelu" (the exact one), "gelu_tanh" (its approximation by tanh), "silu", or None
      for none.

    For the backward pass autograd keeps the seed and no mask: beside it nothing without an activation, y for
    "relu" and x for the others.
    ValueError, TypeError: an argument that does not fit; NotImplementedError: a named backend that
    cannot do this.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x: expected [..., D], got a tensor without dimensions")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected 0 <= p < 1, got {p}")
    if activation is not None and activation not in FORMULA:
        known = ", ".join(FORMULA)
        raise ValueError(f"activation: got {activation!r}, needs None or one of {known}")
    explained = not torch.compiler.is_compiling() and dispatch._explaining.get()
    if p == 0.0 and activation is None and not explained:
        return x
    seed = draw_seed() if p > 0.0 else None
    options = {"dropout_p": p, "dropout_seed": seed, "activation": activation}
    y: Tensor = dispatch.run("dropout", (x,), options, backend)
    return y
