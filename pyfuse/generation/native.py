"""Tokens in, logits out by one call of the compiled step, for models and caches that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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
        check_memory(size, cache.device, "the packed weights")
        self.native, self.cache = NativeStep(model, max_tokens, weights), cache

    def forward_rows(
        self, ids: list[int], slots: Sequence[Slot], counts: Sequence[int], every: bool
    ) -> Tensor:
        """See Step."""
        table, lengths = self.cache.prepare(slots, counts)
        rows, ends = torch.tensor(ids), lengths.long()
        begins = list(accumulate(counts, initial=0))
        groups: dict[tuple[int, bool], list[int]] = {}  # sequences that one call takes
        for b, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            groups.setdefault((count, not goes_on(slot, count)), []).append(b)
        found: list[Tensor] = [rows[:0]] * len(slots)
        for (count, prompt), which in groups.items():
            own = rows.view(len(slots), count) if len(which) == len(slots) else None
            if own is None:
                own = torch.stack([rows[begins[b] : begins[b] + count] for b in which])
            logits = self._call(own, ends[which], table[which], prompt, every)
            if len(which) == len(slots):
                return logits
            for b, part in zip(which, logits.chunk(len(which)), strict=True):
                found[b] = part
        return torch.cat(found)

    def _call(self, ids: Tensor, ends: Tensor, table: Tensor, prompt: bool, every: bool) -> Tensor:
        """ids [B, M], in calls of as many tokens as the step takes."""
        count, cache = ids.shape[1], self.cache
        most = count if prompt else self.native.most
        parts = []
        for at in range(0, count, most):
            some = ids[:, at : at + most].contiguous()
            last = at + most >= count
            parts.append(
                self.native(
                    some, ends - (count - at - some.shape[1]), table, cache.k, cache.v,
                    prompt=prompt, every=every,
                ).view(len(ids), -1, self.native.vocabulary)
            )  # fmt: skip
            if last and not every:
                return parts[-1][:, 0]
        return torch.cat(parts, 1).flatten(0, 1)
