"""Attention of queries over keys: whole batches and packed sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyfuse import dispatch
from pyfuse.ops import _attention_checks as check
from pyfuse.ops._autocast import autocast_enabled, for_attention
from pyfuse.ops._checks import bind_dims, require_floating, same_dtype_device, unit_last_stride
from pyfuse.ops._random import draw_seed

Window = check.Window


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """o[i] = sum_j p[i, j] · v[j], with p the softmax over the keys j that query i sees.

    Vaswani et al., arXiv:1706.03762; computed in tiles as in Dao, arXiv:2307.08691. In this order:

        s = scale · q · kᵀ                           scale: D**-0.5 by default
        s = softcap · tanh(s / softcap)              Gemma 2, arXiv:2408.00118
        s = s + mask                                 a float mask
        s = s - alibi_slopes[h] · |i + N - M - j|    Press et al., arXiv:2108.12409
        s = -inf                                     where the query may not see the key
        p = exp(s) / (sum_j exp(s) + exp(sinks[h]))  sinks: gpt-oss, arXiv:2508.10925
        p = dropout(p)                               p / (1 - dropout_p), or 0

    B batch, Hq and Hk heads, M queries, N keys, D and Dv head sizes:
    q [B, Hq, M, D]; k [B, Hk, N, D]; v [B, Hk, N, Dv]: one dtype (float64, float32, bfloat16 or
      float16), one device, any strides that are 1 in the last dimension. Hq is a multiple of Hk:
      query head h reads key head h // (Hq / Hk). Any size may be 0. torch.autocast casts them.
    mask: broadcastable to [B, Hq, M, N], never expanded. bool: True where the query may attend.
      In q's dtype or float32: added, and differentiable. -inf hides, and so does what is below
      -2.35e38, such as the lowest float32 or bfloat16. Other dtypes raise.
    causal: query i sees no key beyond i + N - M, so that the last query sees the last key.
    window: (left, right): of the keys around i + N - M it sees at most `left` before and `right`
      after it; -1 or None is no limit on that side. An int w is the last w keys, the aligned one
      included: (w - 1, 0), with or without causal. None or -1: no window.
    sinks, alibi_slopes: [Hq], in q's dtype or float32.
    seqlens_k: [B], int32 or int64: sequence b has keys 0 … seqlens_k[b] - 1 only. Alignment stays
      with N. The values are not checked: more than N is N, less than 0 is 0.
    dropout_p: the random numbers are a function of one seed, drawn from torch's default generator,
      and of (b, h, i, j), the same on every backend. Pass 0 outside training.

    Returns o [B, Hq, M, Dv] in q's dtype and in q's memory order ([B, M, Hq, Dv] where q is a
    transposed view of [B, M, Hq, D]). With return_lse also lse [B, Hq, M], the natural logarithm of
    the softmax's denominator, in float32 (float64 for float64).

    A query that sees no key: o = 0, lse = -inf (its sink, where there is one), gradients 0. What a
    key that a query does not see holds, NaN included, has no effect on that query; a NaN that it
    sees makes its result NaN.

    ValueError, TypeError: an argument that does not fit. NotImplementedError: `backend` was named
    and cannot do this.
    """
    dims = bind_dims(q=(q, "B Hq M D"), k=(k, "B Hk N D"), v=(v, "B Hk N Dv"))
    if autocast_enabled():
        q, k, v, mask, sinks, alibi_slopes = for_attention((q, k, v), mask, sinks, alibi_slopes)
    require_floating(q=q)
    same_dtype_device(q=q, k=k, v=v)
    unit_last_stride(q=q, k=k, v=v)
    heads = dims["Hq"]
    if heads != dims["Hk"]:
        check.check_heads(dims)
    if mask is not None:
        check.check_mask(mask, q, (dims["B"], heads, dims["M"], dims["N"]))
    if seqlens_k is not None:
        check.check_lengths("seqlens_k", seqlens_k, q, "B", dims["B"])
    options = {
        "mask": mask,
        "causal": causal,
        "window": check.resolve_window(window),
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "seqlens_k": seqlens_k,
        "dropout_p": dropout_p,
        "dropout_seed": None,
        "scale": check.resolve_scale(scale, dims["D"]),
        "return_lse": return_lse,
    }
    check.check_scores(q, heads, softcap, sinks, alibi_slopes)
    if dropout_p != 0.0:
        check.check_dropout(dropout_p)
        options["dropout_seed"] = draw_seed()
    return dispatch.run("attention", (q, k, v), options, backend)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of B sequences of different lengths, packed one after another without padding.

    q [T, Hq, D]; k [Tk, Hk, D]; v [Tk, Hk, Dv]: sequence b has the queries cu_seqlens_q[b] up to
      cu_seqlens_q[b + 1], exclusive, sees the keys cu_seqlens_k[b] up to cu_seqlens_k[b + 1], and
      nothing else. A sequence may have no queries, or no keys.
    cu_seqlens_q, cu_seqlens_k [B + 1]: int32 or int64, on q's device, from 0, never decreasing; not
      read on the host, so not checked. Rows from the last value on belong to no sequence: o = 0.

    causal, window and alibi_slopes align each sequence's last query with its own last key; dropout
    counts (b, h, i, j) within the sequence: the result is that of `attention` of a padded batch.
    Everything else as in `attention`. Returns o [T, Hq, Dv], and with return_lse also lse [Hq, T].
    """
    dims = bind_dims(
        q=(q, "T Hq D"),
        k=(k, "Tk Hk D"),
        v=(v, "Tk Hk Dv"),
        cu_seqlens_q=(cu_seqlens_q, "B+1"),
        cu_seqlens_k=(cu_seqlens_k, "B+1"),
    )
    if autocast_enabled():
        q, k, v, sinks, alibi_slopes = for_attention((q, k, v), sinks, alibi_slopes)
    require_floating(q=q)
    same_dtype_device(q=q, k=k, v=v)
    unit_last_stride(q=q, k=k, v=v)
    check.check_heads(dims)
    if dims["B+1"] == 0:
        raise ValueError("cu_seqlens_q: got no value, needs B + 1 of them (a 0 for no sequence)")
    check.check_lengths("cu_seqlens_q", cu_seqlens_q, q, "B+1", dims["B+1"])
    check.check_lengths("cu_seqlens_k", cu_seqlens_k, q, "B+1", dims["B+1"])
    check.check_scores(q, dims["Hq"], softcap, sinks, alibi_slopes)
    check.check_dropout(dropout_p)
    options = {
        "causal": causal,
        "window": check.resolve_window(window),
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "dropout_seed": draw_seed() if dropout_p > 0.0 else None,
        "scale": check.resolve_scale(scale, dims["D"]),
        "return_lse": return_lse,
    }
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    return dispatch.run("varlen_attention", tensors, options, backend)
