"""The rotary embedding on the Triton kernels, one tensor or queries and keys together: the launch. A token whose
position is outside the table gives NaN; with TRITON_DEBUG=1 the kernel stops at it, as torch's own do."""

from __future__ import annotations

from math import gcd

from torch import Tensor

from pyfuse.backends import triton_device
from pyfuse.backends.gpu_rope import Pairs, Rope, position_strides, table_strides
from pyfuse.backends.triton_device import kernels


def turn(
    pairs: Pairs,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    positions: Tensor | None,
    sign: float,
) -> None:
    """See gpu_rope.Turn."""
    x, y = pairs[0]
    x2, y2 = pairs[1] if len(pairs) == 2 else (None, None)
    batch, heads, rows, d = x.shape
    more = 0 if x2 is None else x2.shape[1]
    tokens, r = batch * rows, 2 * cos.shape[-1]
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
    args = (
        *in_units(x, launch.unit), *in_units(y, launch.unit), heads, *in_units(x2, launch.unit),
        *in_units(y2, launch.unit), more, cos, sin, *table_strides(cos), cos.shape[-2], positions,
        *position_strides(positions),
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


_ROPE = Rope(turn, triton_device.why_not)
rope, rope_pair = _ROPE.rope, _ROPE.rope_pair
OPS = _ROPE.impls()
