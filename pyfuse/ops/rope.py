"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.ops._autocast import autocast_enabled, for_rope

LAYOUTS = ("half", "interleaved")


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Turn the pairs of x's first R elements by the angles of their token; copy the other D - R.

    y1 = x1·cos - x2·sin, y2 = x2·cos + x1·sin for each pair (x1, x2). (Su et al., arXiv:2104.09864)

    x [B, H, M, D], any strides with unit stride in D: float32, bfloat16, float16 or float64.
    layout: which elements i < R/2 pairs with i:
      "half": x[i] with x[i + R/2] (Llama, GPT-NeoX and most of Hugging Face);
      "interleaved": x[2i] with x[2i + 1] (GPT-J, the paper).
    cos, sin, float32 or of x's dtype, R ≤ D:
      [M, R/2]: one angle for each token and pair;
      [B, M, R/2]: the same, for each sequence;
      [P, R/2] with positions [M] or [B, M] (int64 or int32): token m takes row positions[m].
    inplace: write into x and return it. Refused where a gradient is asked for.

    Hugging Face's cos and sin are [B, M, R] with the two halves alike: pass cos[..., : R // 2].

    Returns y [B, H, M, D] in x's dtype, computed in float32 (float64 for float64) and rounded once
    (Hugging Face in bfloat16 rounds three times); kernels keep x's memory order.
    ValueError, TypeError: a size, dtype or device that does not fit, an unknown layout;
    IndexError: a position outside the table (on a GPU, which nothing here waits for, the turned elements of that token
    are NaN instead); NotImplementedError: a named backend that cannot.
    """
    cos, sin = _checked(x, cos, sin, layout, positions, inplace)
    options = {"layout": layout, "positions": positions, "inplace": inplace}
    return dispatch.run("rope", (x, cos, sin), options, backend)


def rope_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(rope(q), rope(k)): queries and keys turned by the same angles. On a GPU in one launch, which reads those once.

    q [B, Hq, M, D] and k [B, Hk, M, D] of one dtype; cos, sin, layout, positions, inplace and errors as in `rope`.
    """
    cos, sin = _checked(q, cos, sin, layout, positions, inplace, "q")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        batch, _, rows, d = q.shape
        raise ValueError(f"k: expected [{batch}, Hk, {rows}, {d}] like q, got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: is on {k.device}, but q is on {q.device}")
    if inplace:
        _check_inplace(k, cos, sin, "k")
    options = {"layout": layout, "positions": positions, "inplace": inplace}
    return dispatch.run("rope_pair", (q, k, cos, sin), options, backend)


def _checked(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    positions: Tensor | None,
    inplace: bool,
    name: str = "x",
) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels take them; or an error that says what does not fit."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, needs one of {', '.join(LAYOUTS)}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions [B, H, M, D], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if autocast_enabled():
        cos, sin = for_rope(x, cos, sin)
    _check_tables(x, cos, sin, positions, name)
    if inplace:
        _check_inplace(x, cos, sin, name)
    return cos, sin


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, name: str) -> None:
    batch, _, rows, d = x.shape
    if positions is None:
        lead = cos.shape[:-1]
        fits = lead == (rows,) or lead == (batch, rows)
        needed = f"[{rows}, R/2] or [{batch}, {rows}, R/2]"
    else:
        fits, needed = cos.ndim == 2, "[P, R/2] beside positions"
        if positions.shape != (rows,) and positions.shape != (batch, rows):
            raise ValueError(
                f"positions: expected shape ({rows},) or ({batch}, {rows}) for {name} of shape"
                f" {tuple(x.shape)}, got {tuple(positions.shape)}"
            )
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions: expected int64 or int32, got {positions.dtype}")
        if positions.device != x.device:
            raise ValueError(f"positions: is on {positions.device}, but {name} is on {x.device}")
    if not fits:
        raise ValueError(
            f"cos: expected {needed} for {name} {tuple(x.shape)}, got {tuple(cos.shape)}"
        )
    if 2 * cos.shape[-1] > d:
        raise ValueError(
            f"cos: {cos.shape[-1]} columns rotate R = {2 * cos.shape[-1]} elements, but {name} has head"
            f" size {d} (of Hugging Face's [B, M, R] tables pass the first half)"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if cos.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"cos: expected float32 or {name}'s dtype {x.dtype}, got {cos.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin: expected cos's dtype {cos.dtype}, got {sin.dtype}")
    if cos.device != x.device or sin.device != x.device:
        raise ValueError(f"cos, sin: on {cos.device} and {sin.device}, but {name} is on {x.device}")


def _check_inplace(x: Tensor, cos: Tensor, sin: Tensor, name: str) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
        raise ValueError("inplace: True, but a gradient is asked for; use it under torch.no_grad()")
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride == 0 and size > 1:
            raise ValueError(
                f"inplace: True, but {name} of shape {tuple(x.shape)} is expanded (strides {x.stride()})"
            )
