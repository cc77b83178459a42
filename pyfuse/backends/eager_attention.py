"""Attention in plain torch: the oracle of every other backend, and their gradient.

The matmuls run in the inputs' dtype, the softmax in float32 (float64 for float64), as an eager
model does it. There is no branch on data, so that autograd (any order), functorch, forward-mode AD,
torch.compile and export all go through. Memory is O(M·N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import eager_masks as masks
from pyfuse.philox import dropout_mask, keep_mask

Output = Tensor | tuple[Tensor, Tensor]
ScoreSteps = list[Callable[[Tensor], Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Output:
    """See pyfuse.attention. window: (left, right), -1 for no limit; dropout_seed as in philox."""
    positions = masks.aligned_positions(q.shape[2], k.shape[2], q.device)
    conditions = masks.in_band(positions, causal, window)
    if seqlens_k is not None:
        conditions.append(masks.before(positions, seqlens_k))
    steps = score_steps(softcap, alibi_slopes, positions)
    if mask is not None:
        mask = masks.four_dims(mask)
        conditions.append(masks.allowed_by(mask))
        if mask.dtype != torch.bool:
            steps.append(_adding(mask))
    dropout = None
    if dropout_p > 0.0:
        shape = (*q.shape[:3], k.shape[2])
        keep = dropout_mask(_required(dropout_seed), shape, dropout_p, q.device)
        dropout = Dropout(keep, dropout_p)
    return attend(
        q,
        k,
        v,
        visible=masks.all_of(conditions),
        steps=steps,
        sinks=sinks,
        dropout=dropout,
        scale=scale,
        return_lse=return_lse,
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Output:
    """See pyfuse.varlen_attention. The sequences are a mask of all rows by all keys: O(T·Tk)."""
    q_rows = masks.segments(cu_seqlens_q, q.shape[0])
    k_rows = masks.segments(cu_seqlens_k, k.shape[0])
    positions = masks.packed_positions(q_rows, k_rows, cu_seqlens_q, cu_seqlens_k)
    sequence = q_rows.sequence[:, None]
    conditions = [
        ((sequence == k_rows.sequence) & (sequence >= 0))[None, None],
        *masks.in_band(positions, causal, window),
    ]
    dropout = None
    if dropout_p > 0.0:
        head = torch.arange(q.shape[1], device=q.device)[:, None, None]
        index = (sequence.clamp(min=0), head, q_rows.place[:, None], k_rows.place)
        dropout = Dropout(keep_mask(_required(dropout_seed), index, dropout_p), dropout_p)
    result = attend(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        visible=masks.all_of(conditions),
        steps=score_steps(softcap, alibi_slopes, positions),
        sinks=sinks,
        dropout=dropout,
        scale=scale,
        return_lse=return_lse,
    )
    if isinstance(result, tuple):
        return result[0][0].transpose(0, 1), result[1][0]
    return result[0].transpose(0, 1)


def _required(seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError("dropout_seed: got None, but dropout_p > 0 needs int64 (seed, offset)")
    return seed


def _adding(bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: s + bias


def score_steps(
    softcap: float | None, alibi_slopes: Tensor | None, positions: masks.Positions
) -> ScoreSteps:
    """What happens to the scaled scores s [B, Hq, M, N], in order, before any bias and the mask."""
    steps: ScoreSteps = []
    if softcap is not None:
        cap = softcap
        steps.append(lambda s: cap * torch.tanh(s / cap))
    if alibi_slopes is not None:
        slopes = alibi_slopes[:, None, None]
        steps.append(lambda s: s - slopes.to(s.dtype) * positions.distance())
    return steps


class Dropout(NamedTuple):
    """keep, broadcastable to [B, Hq, M, N], is True with probability 1 - p."""

    keep: Tensor
    p: float


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    steps: ScoreSteps,
    sinks: Tensor | None,
    dropout: Dropout | None,
    scale: float | None,
    return_lse: bool,
) -> Output:
    """q [B, Hq, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv]; visible broadcasts to [B, Hq, M, N]."""
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    rows_first = q.stride(1) < q.stride(2)
    wide = torch.promote_types(q.dtype, torch.float32)
    marks = None
    if visible is not None:
        visible = masks.four_dims(visible)
        sees_a_key = visible.any(-1, keepdim=True)
        q = torch.where(sees_a_key, q, 0.0)
        k, v, marks = _without_hidden(k, v, visible, q.shape)

    s = _times(q, k.transpose(-1, -2)).to(wide) * scale
    for step in steps:
        s = step(s)
    if marks is not None:
        s = s + marks.scores.to(wide)
    if visible is not None:
        s = torch.where(visible, s, float("-inf"))
    weights, lse = _softmax(s, sinks)
    first_weight = weights[..., :1].sum(-1, keepdim=True)  # [B, Hq, M, 1], of no key too
    if dropout is not None:
        weights = torch.where(dropout.keep, weights * (1.0 / (1.0 - dropout.p)), 0.0)
    o = _times(weights.to(v.dtype), v)
    if marks is not None:
        # Not o * marks: as with NaN in v itself, dq and dk of that query turn NaN, but not dv.
        o = o + (marks.output.to(wide) * first_weight).to(o.dtype)
    if visible is not None:
        o = torch.where(sees_a_key, o, 0.0)
    if rows_first:  # o takes q's memory order
        o = o.transpose(1, 2).contiguous().transpose(1, 2)
    return (o, lse) if return_lse else o


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x [B, Hq, M, J] @ y [B, Hk, J, L]: the queries of a group share one matmul."""
    batch, heads, rows, inner = x.shape
    groups = y.shape[1]
    if heads == groups:
        return x @ y
    folded = x.reshape(batch, groups, heads // groups * rows, inner)
    return (folded @ y).reshape(batch, heads, rows, y.shape[-1])


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the keys; a row of -inf gives 0 and -inf (or its sink)."""
    top = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    if sinks is not None:
        sink = sinks.to(s.dtype)[:, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == float("-inf"), 0.0, top)
    e = torch.exp(s - top[..., None])
    total = e.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    nothing = total == 0.0
    total = torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, float("-inf"), top + torch.log(total))
    return e / total[..., None], lse


class Marks(NamedTuple):
    """What brings visible NaN back: 0 or NaN, to add to the scores and to the output."""

    scores: Tensor
    output: Tensor


def _without_hidden(
    k: Tensor, v: Tensor, visible: Tensor, q_shape: torch.Size
) -> tuple[Tensor, Tensor, Marks | None]:
    """k and v whose hidden elements do no harm in a matmul, forward or backward.

    A hidden pair has weight 0, but 0 · NaN is NaN. Where a key is hidden from all queries or from
    none, a zero in its place will do. Otherwise the matmuls get finite keys and values only, and
    the queries that do see a non-finite one are marked with NaN.
    """
    if visible.shape[1] == 1 and visible.shape[2] == 1:
        seen = visible.transpose(-1, -2)
        return torch.where(seen, k, 0.0), torch.where(seen, v, 0.0), None
    batch, heads, rows, _ = q_shape
    k_finite, v_finite = torch.isfinite(k), torch.isfinite(v)
    scores = torch.where(k_finite.all(-1), 0.0, float("nan"))[:, :, None, :]
    scores = scores.repeat_interleave(heads // max(k.shape[1], 1), 1)  # [B, Hq, 1, N]
    seen = visible.expand(batch, heads, rows, k.shape[2]).to(v.dtype)
    leaks = _times(seen, (~v_finite).to(v.dtype)) > 0  # [B, Hq, M, Dv]
    output = torch.where(leaks, float("nan"), 0.0)
    return torch.where(k_finite, k, 0.0), torch.where(v_finite, v, 0.0), Marks(scores, output)
