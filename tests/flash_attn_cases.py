"""What flash-attn's functions compute, written as plain torch in the dtype that the tensors have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numerics
import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def normal(dtype: str | torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPES.get(dtype, dtype))  # type: ignore[call-overload]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, M, Hq, D] and softmax_lse [B, Hq, M] of q [B, M, Hq, D], k and v [B, N, Hk, D]."""
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = torch.einsum("bmhd,bnhd->bhmn", q * scale, k)
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    m, n = s.shape[-2:]
    ahead = torch.arange(n) - (torch.arange(m)[:, None] + n - m)  # > 0: after the aligned key
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype)
        slopes = slopes[None] if slopes.dim() == 1 else slopes
        s = s - slopes[:, :, None, None] * ahead.abs()
    left, right = window_size
    hidden = torch.zeros(m, n, dtype=torch.bool)
    if causal:
        hidden |= ahead > 0
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    lse = s.masked_fill(hidden, -torch.inf).to(torch.promote_types(s.dtype, torch.float32))
    lse = lse.logsumexp(-1) if n else s.new_full(s.shape[:-1], -torch.inf, dtype=lse.dtype)
    empty = hidden.all(-1) | (n == 0)
    # Softmax of a row that is hidden as a whole, and its gradient, must not be NaN.
    p = torch.softmax(s.masked_fill(hidden & ~empty[:, None], -torch.inf), -1)
    p = p.masked_fill(hidden, 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", p, v), lse.masked_fill(empty, torch.inf)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and softmax_lse [Hq, T]: `reference` of each sequence by itself."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    parts = zip(
        q.split(list(lengths_q)), k.split(list(lengths_k)), v.split(list(lengths_k)), strict=True
    )
    for b, part in enumerate(parts):
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = reference(*(x[None] for x in part), alibi_slopes=own, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., S, H, D] with its first R elements, as complex numbers, times cos + i·sin [..., S, R/2]."""
    half = cos.shape[-1]
    first, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = first.unflatten(-1, (half, 2)) if interleaved else first.unflatten(-1, (2, half)).mT
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    a, b = pairs[..., 0], pairs[..., 1]
    both = torch.stack((a * c - b * s, a * s + b * c), -1)
    return torch.cat(((both if interleaved else both.mT).flatten(-2), rest), -1)


def angles(
    length: int, rotary_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, R/2]."""
    frequency = 1e4 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def judge(
    actual: Callable[..., Any],
    formula: Callable[..., Any],
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    names: str,
) -> None:
    """Outputs and gradients of `actual` by the accuracy rule: `formula` in float64 is the truth, in the tensors' own
    dtype the measure. Only floating-point tensors have gradients; the names are those of the tensors."""

    def run(function: Callable[..., Any], inputs: list[Tensor], options: dict[str, Any]) -> Any:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        points = [x for x in inputs if x.requires_grad]
        finite = [torch.where(o.isfinite(), o, 0.0) for o in outputs if o.numel()]
        loss = sum((o * upstream(o)).sum() for o in finite)
        grads = torch.autograd.grad(loss, points) if finite else []
        return outputs, grads

    wide = {name: double(x) for name, x in options.items()}
    results = run(actual, list(tensors), options)
    truth = run(formula, [double(x) for x in tensors], wide)
    eager = run(formula, list(tensors), options)
    for kind, i in (("output", 0), ("gradient", 1)):
        words = [f"output {j}" for j in range(len(results[0]))] if i == 0 else names.split()
        for name, a, t, e in zip(words, results[i], truth[i], eager[i], strict=True):
            numerics.check(a, t, e, f"{kind} {name}", kind)  # type: ignore[arg-type]


def upstream(output: Tensor) -> Tensor:
    """The same gradient of the output in every dtype: of few bits, so exact in each."""
    count = torch.arange(output.numel(), dtype=torch.float64)
    return (((count * 7) % 13 - 6) / 8).reshape(output.shape).to(output.dtype)
