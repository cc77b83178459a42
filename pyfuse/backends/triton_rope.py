"""The rotary embedding on the Triton kernels, one tensor or queries and keys together, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.triton_device import kernels

MOST_TOKENS = (1 << 31) - (1 << 16)  # counted in 32 bits
LARGEST_HEAD = 8192


def why_not_rope(x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> str | None:
    reason = triton_device.why_not("x", x)
    if reason is not None:
        return reason
    if x.stride(3) != 1 and x.shape[3] > 1:
        return f"x has stride {x.stride(3)} in its last dimension, the kernel needs 1"
    if x.shape[3] > LARGEST_HEAD:
        return f"head size {x.shape[3]}, the kernel has up to {LARGEST_HEAD}"
    if x.shape[0] * x.shape[2] > MOST_TOKENS:
        return f"{x.shape[0] * x.shape[2]} tokens, the kernel counts to {MOST_TOKENS}"
    return None


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """See pyfuse.rope. The turned elements of a token whose position is outside the table are NaN: to raise IndexError,
    the host would have to wait for the GPU. With TRITON_DEBUG=1 the kernel stops at it, as torch's own do."""
    y = x if inplace else torch.empty_like(x)
    turn(((x, y),), cos, sin, layout, positions, 1.0)
    return y


def rope_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """See pyfuse.rope_pair: one launch, which reads cos and sin once."""
    q_turned, k_turned = (x if inplace else torch.empty_like(x) for x in (q, k))
    turn(((q, q_turned), (k, k_turned)), cos, sin, layout, positions, 1.0)
    return q_turned, k_turned


def pair_backward(
    dq_turned: Tensor,
    dk_turned: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    positions: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients turned back, in one launch too."""
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    grads = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq_turned, dk_turned))
    turn(tuple(zip(grads, (dq, dk), strict=True)), cos, sin, layout, positions, -1.0)
    return dq, dk


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return rope(x, cos, sin, **options), ()


def backward(
    grads: Sequence[Tensor | None],
    tensors: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    saved: tuple[Tensor, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """dx = dy turned back by the same angles."""
    (dy,), (x, cos, sin) = grads, tensors
    dx = torch.empty_like(x)
    if dy is None:
        return {"x": dx.zero_()}
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    turn(((dy, dx),), cos, sin, options["layout"], options["positions"], -1.0)
    return {"x": dx}


def restore(*_: Any) -> tuple[Tensor, ...]:
    """What forward saves is nothing."""
    return ()


def why_not_backward(
    needs: frozenset[str], x: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False, **_: Any
) -> str | None:
    if not needs <= {"x"}:
        return "the kernel has no gradient of cos and sin"
    if inplace:
        return "inplace overwrites x"
    return None


def turn(
    pairs: Sequence[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    layout: str,
    positions: Tensor | None,
    sign: float,
) -> None:
    """Write x rotated by its tokens' angles (sign 1) or back by them (-1) into y, for one or two pairs (x, y)."""
    pairs = [pair for pair in pairs if pair[0].numel() > 0]
    if not pairs:
        return
    x, y = pairs[0]
    x2, y2 = pairs[1] if len(pairs) == 2 else (None, None)
    batch, heads, rows, d = x.shape
    more = 0 if x2 is None else x2.shape[1]
    tokens, r = batch * rows, 2 * cos.shape[-1]
    if r == 0:
        for source, target in pairs:
            target.copy_(source)
        return
    device = triton_device.of(x)
    unit = 16 // x.element_size()
    for pair in pairs:
        for t in pair:
            unit = gcd(unit, *t.stride()[:3])
    launch = kernels("position_configs").turn(
        tokens,
        heads + more,
        d,
        r,
        x.element_size(),
        unit,
        layout == "interleaved",
        x is y,
        device.arch,
    )
    if sin.stride() != cos.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    args = (
        *in_units(x, launch.unit), *in_units(y, launch.unit), heads, *in_units(x2, launch.unit),
        *in_units(y2, launch.unit), more, cos, sin, cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2),
        cos.shape[-2], positions, 0 if positions is None or positions.ndim == 1 else positions.stride(0),
        0 if positions is None else positions.stride(-1),
        tokens, rows, launch.each, launch.heads_each, launch.splits, sign,
    )  # fmt: skip
    programs = -(-tokens // launch.each) * launch.splits
    device.launch(kernels("rope").rope_kernel, (programs,), args, launch.options)


def in_units(t: Tensor | None, unit: int) -> tuple[Tensor | None, int, int, int]:
    """A tensor and its strides of batch, head and row, counted in `unit` elements."""
    if t is None:
        return None, 0, 0, 0
    b, h, m, _ = t.stride()
    return t, b // unit, h // unit, m // unit
