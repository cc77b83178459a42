"""Tokens in, logits out by one call of the compiled step, for models and caches that it knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfuse.backends.cpu_step import NativeStep, why_not_step
from pyfuse.models._memory import check_memory
from pyfuse.models.cache import PagedCache, Slot
from pyfuse.models.rows import goes_on
from pyfuse.models.transformer import Transformer


def why_not_native(model: Transformer, cache: PagedCache) -> str | None:
    """Why the compiled step cannot run this model with this cache; None if it can."""
    if cache.quantized:
        return "it has no int8 cache"
    return why_not_step(model)


class KernelStep:
    """A `Step` of csrc/cpu/decode_step.cpp, for sequences of max_tokens.

    weights: torch.int8, or None for the model's own dtype. MemoryError: no room for the packed copy of them.
    """

    def __init__(
        self, model: Transformer, cache: PagedCache, max_tokens: int, weights: torch.dtype | None
    ) -> None:
        size = sum(
            p.numel() * (p if weights is None else weights).itemsize for p in model.parameters()
        )
        check_memory(size, cache.device, "weights: a packed copy needs", "kernel=False needs none")
        self.native, self.cache = NativeStep(model, max_tokens, weights), cache

    def forward_rows(
        self, ids: list[int], slots: Sequence[Slot], counts: Sequence[int], every: bool
    ) -> Tensor:
        """See Step."""
        table, ends = self.cache.prepare(slots, counts)
        kinds = [
            (count, not goes_on(slot, count)) for slot, count in zip(slots, counts, strict=True)
        ]
        if len(set(kinds)) == 1:  # as in nearly every step: one call, and nothing to sort
            count, prompt = kinds[0]
            return self._call(torch.tensor(ids).view(-1, count), ends, table, prompt, every)
        found: list[Tensor] = [ends] * len(slots)
        parts = torch.tensor(ids).split(list(counts))
        for kind in dict.fromkeys(kinds):
            which = [b for b, other in enumerate(kinds) if other == kind]
            rows = torch.stack([parts[b] for b in which])
            logits = self._call(rows, ends[which], table[which], kind[1], every)
            for b, part in zip(which, logits.chunk(len(which)), strict=True):
                found[b] = part
        return torch.cat(found)

    def _call(self, ids: Tensor, ends: Tensor, table: Tensor, prompt: bool, every: bool) -> Tensor:
        """ids [B, M], in calls of as many tokens as the step takes."""
        cache, native = self.cache, self.native
        many = ids.shape[1] - native.most
        if prompt or many <= 0:
            return native(ids, ends, table, cache.k, cache.v, prompt=prompt, every=every)
        first = self._call(ids[:, :many].contiguous(), ends - native.most, table, prompt, every)
        rest = ids[:, many:].contiguous()
        last = native(rest, ends, table, cache.k, cache.v, every=every)
        if not every:
            return last
        sizes = (len(ids), -1, native.vocabulary)
        return torch.cat([first.view(sizes), last.view(sizes)], 1).flatten(0, 1)
