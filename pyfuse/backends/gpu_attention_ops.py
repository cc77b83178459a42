"""Attention's operations on a GPU, of whatever kernels: what these take, and the tensors that they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyfuse.backends.gpu_attention import (
    MOST_KEYS,
    empty_like_q,
    per_head,
    sink_gradient,
    without_pairs,
)
from pyfuse.backends.gpu_decode import why_not_pages
from pyfuse.dispatch import Gradient, Impl

LARGEST_HEAD = 256
MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)

Result = Tensor | tuple[Tensor, Tensor]
Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]
# (gradient wanted, *tensors, **options): see pyfuse.dispatch.Impl.yields.
Yields = Callable[..., str | None]


class Call(NamedTuple):
    """Padded tensors [B, H, M, D], or packed ones [T, H, D] with the bounds of their sequences; and the options."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None
    options: dict[str, Any]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Call:
        q, k, v = tensors[:3]
        cu_q, cu_k = tensors[3:] or (None, None)
        return cls(q, k, v, cu_q, cu_k, options)

    def new_o(self) -> Tensor:
        if self.cu_q is None:
            return empty_like_q(self.q, self.v.shape[3])
        return self.q.new_empty((*self.q.shape[:2], self.v.shape[2]))

    def new_lse(self) -> Tensor:
        """[B, Hq, M], or packed [Hq, T]."""
        rows, heads = self.q.shape[:2]
        shape = self.q.shape[:3] if self.cu_q is None else (heads, rows)
        return self.q.new_empty(shape, dtype=torch.float32)


class Backward(Protocol):
    """The gradients' kernels over one call. Both are terms of its rows, like lse: delta is Σ p dp - dlse."""

    lse: Tensor
    delta: Tensor

    def dk_dv(self) -> tuple[Tensor, Tensor]: ...

    def dq(self, slopes: Tensor | None) -> Tensor:
        """slopes: like delta, to be written: each query's share of the slopes' gradient."""

    def dmask(self, mask: Tensor) -> Tensor: ...


class Attention(NamedTuple):
    """The operations of a backend by its own functions.

    why_not: (name, tensor) -> why no kernel can take it. write: (call, o, lse) writes o, and lse where it is one.
    backward: (call, o, lse, do, dlse, exact): do and dlse None for zeros; exact: delta from the scores rather than
    from o. decode: (o, lse, *tensors of decode_attention, **options) writes o, lse, and what is new into the cache.
    """

    why_not: Callable[[str, Tensor], str | None]
    write: Callable[[Call, Tensor, Tensor | None], None]
    backward: Callable[[Call, Tensor, Tensor, Tensor | None, Tensor | None, bool], Backward]
    decode: Callable[..., None]
    yields: Callable[[str], Yields | None] = lambda operation: None

    def ops(self) -> dict[str, Impl]:
        gradient = Gradient(self.forward, self.gradients, why_not_gradient, restore)
        both = {
            name: Impl(self.values, self.why_not_attention, gradient, self.yields(name))
            for name in ("attention", "varlen_attention")
        }
        return both | {"decode_attention": Impl(self.decode_attention, self.why_not_decode)}

    def why_not_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *_: Tensor, mask: Tensor | None = None, **__: Any
    ) -> str | None:
        reason = self.why_not("q", q)
        if reason is not None:
            return reason
        for letter, d in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
            if not 0 < d <= LARGEST_HEAD:
                return f"{letter} is {d}, the kernel has 1 to {LARGEST_HEAD}"
        rows = 2 if q.ndim == 4 else 0
        most = max(q.shape[rows], k.shape[rows])
        if most >= MOST_KEYS:
            return f"{most} queries or keys, the kernel counts to {MOST_KEYS}"
        if mask is not None and mask.dtype not in MASK_DTYPES:
            return f"mask is {mask.dtype}; the kernel has bool, float32, bfloat16 and float16"
        return None

    def values(self, *tensors: Tensor, **options: Any) -> Result:
        """See pyfuse.attention and pyfuse.varlen_attention."""
        call = Call.of(tensors, options)
        o, lse = call.new_o(), call.new_lse() if options["return_lse"] else None
        if o.numel() > 0:
            self.write(call, o, lse)
        return o if lse is None else (o, lse)

    def forward(self, *tensors: Tensor, **options: Any) -> tuple[Result, Saved]:
        """The result, and what the backward needs beside the arguments: o and lse."""
        call = Call.of(tensors, options)
        o, lse = call.new_o(), call.new_lse()
        if o.numel() > 0:
            self.write(call, o, lse)
        return (o, lse) if options["return_lse"] else o, (o, lse)

    def gradients(
        self,
        grads: Grads,
        tensors: tuple[Tensor, ...],
        options: dict[str, Any],
        saved: Saved,
        needs: frozenset[str],
    ) -> dict[str, Tensor]:
        """The gradients of q, k, v, mask, sinks and alibi_slopes from those of o and lse."""
        call, (o, lse) = Call.of(tensors, options), saved
        assert o is not None and lse is not None
        if o.numel() == 0 or call.k.numel() == 0:
            return without_pairs(grads, call.q, call.k, call.v, options, lse, needs)
        # Σ o do has the rounding of o. In half precision that shows where distances magnify it, and in float32 sinks
        # and masks.
        finer = not needs.isdisjoint(("alibi_slopes", "mask", "sinks"))
        do, dlse = (*grads, None)[:2]
        run = self.backward(call, o, lse, do, dlse, finer or o.dtype == torch.float32)
        result: dict[str, Tensor] = {}
        if not needs.isdisjoint("kv"):
            result["k"], result["v"] = run.dk_dv()
        slopes = torch.empty_like(run.delta) if "alibi_slopes" in needs else None
        if "q" in needs or slopes is not None:
            result["q"] = run.dq(slopes)
        if slopes is not None:
            result["alibi_slopes"] = per_head(slopes, options["alibi_slopes"])
        if "sinks" in needs:
            result["sinks"] = sink_gradient(options["sinks"], run.lse, run.delta)
        if "mask" in needs:
            result["mask"] = run.dmask(options["mask"])
        return {name: result[name] for name in needs}

    def why_not_decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *_: Tensor | None,
        block_table: Tensor | None = None,
        **__: Any,
    ) -> str | None:
        reason = self.why_not_attention(q, k_cache, v_cache)
        return why_not_pages(k_cache, block_table) if reason is None else reason

    def decode_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Result:
        """See pyfuse.decode_attention."""
        o = empty_like_q(q, v_cache.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
        if o.numel() > 0:
            self.decode(o, lse, q, k_cache, v_cache, k_new, v_new, **options)
            if k_new is not None:
                torch._C._increment_version((k_cache, v_cache))  # as torch's own in-place writes do
        return o if lse is None else (o, lse)


def restore(results: tuple[Tensor, ...], *_: Any) -> Saved:
    """What a forward saves, from the results of any."""
    o, lse = results
    return o, lse


def why_not_gradient(needs: frozenset[str], *_tensors: Tensor, **_: Any) -> str | None:
    return None  # whatever the forward takes
