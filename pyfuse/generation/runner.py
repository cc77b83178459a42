"""A model and its cache: tokens in, logits out. What every way of decoding is made of.

runner = Runner(model, sequences=4)
slot = runner.begin(prompt)                                  # what is known of the prompt is there already
logits = runner.forward([(slot, prompt[slot.length :])])     # [1, V]: what may follow
other = runner.fork(slot)
logits = runner.forward([(slot, [7]), (other, [8])])         # [2, V]
runner.end(slot)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyfuse.generation.native import KernelStep, why_not_native
from pyfuse.models.cache import CacheFull, PagedCache, Slot
from pyfuse.models.rows import Rows, goes_on
from pyfuse.models.transformer import Transformer

__all__ = ["CacheFull", "Runner", "Slot"]

Work = Sequence[tuple[Slot, Sequence[int]]]
Progress = Callable[[int, int], object]
Memory = tuple[int, tuple[tuple[Tensor, Tensor], ...]]


class Step(Protocol):
    """Who computes a call: the model's modules, or a kernel that has all of it."""

    def forward_rows(
        self, ids: list[int], slots: Sequence[Slot], counts: Sequence[int], every: bool
    ) -> Tensor:
        """Logits, float32 or float64, after the last new token of each slot [B, V]; of every one [N, V] with `every`.

        ids: counts[0] tokens of slots[0], then those of the next. Reserves their places in the cache
        (`PagedCache.prepare`) and writes keys and values there; to commit them is the caller's.
        """
        ...


class ModuleStep:
    """Through the model's modules."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    def forward_rows(
        self, ids: list[int], slots: Sequence[Slot], counts: Sequence[int], every: bool
    ) -> Tensor:
        """See Step."""
        device = self.cache.device
        rows = Rows(self.cache, slots, counts)
        wanted = range(len(ids)) if every else [end - 1 for end in rows.bounds[1:]]
        logits = self.model.of_rows(
            torch.tensor([ids], device=device), rows, torch.tensor(wanted, device=device)
        )
        return logits if logits.dtype == torch.float64 else logits.float()


class Runner:
    """Sequences of a causal `Transformer` that grow token by token.

    model: in inference mode, with the head "lm"; of an encoder and a decoder it is the latter that grows.
    max_tokens: of a sequence; None: the model's max_positions. sequences: for how many of that length there is room;
      more fit if they are shorter or share pages. page_size: tokens of a page. chunk: tokens of a long prompt that are
      computed at a time.
    cache: "model", keys and values in the model's dtype, or "int8" (`PagedCache` states its error), for less memory at
      the cost of time.
    kernel: True, the compiled step (pyfuse.backends.cpu_step), which packs a copy of the weights; False, the model's
      modules; None, the former where it can. weights: "model", in the model's dtype, or "int8", for the kernel.
    computed: tokens that have gone through the model; those that were shared have not.

    ValueError: a model or size that does not fit. MemoryError: the cache would not fit into memory.
    """

    def __init__(
        self, model: Transformer, *, max_tokens: int | None = None, sequences: int = 1, page_size: int = 32,
        cache: str = "model", chunk: int = 512, weights: str = "model", kernel: bool | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("sequences", sequences), ("page_size", page_size), ("chunk", chunk)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name, choice in (("cache", cache), ("weights", weights)):
            if choice not in ("model", "int8"):
                raise ValueError(f"{name}: got {choice!r}, needs 'model' or 'int8'")
        self.model, self.chunk, self.sequences = model, chunk, sequences
        self.vocabulary = model.config.vocabulary
        self.max_tokens = _max_tokens(model, max_tokens)
        c = model.config
        tokens = self.max_tokens
        if c.window is not None:  # and one page more, since a window begins within a page
            tokens = min(tokens, c.window - 1 + chunk + page_size)
        table = model.decoder.embedding.token.weight
        self.cache = PagedCache(
            c.layers, c.kv_heads or c.heads, c.d, sequences * -(-tokens // page_size), page_size=page_size,
            dtype=table.dtype, device=table.device, window=c.window, quantized=cache == "int8",
        )  # fmt: skip
        self.step: Step = self._chosen_step(weights, kernel)
        self.computed = 0
        self._memories = WeakIdKeyDictionary()  # memory -> (root, its keys and values)

    def _chosen_step(self, weights: str, kernel: bool | None) -> Step:
        reason = why_not_native(self.model, self.cache)
        needs = "kernel" if kernel else "weights" if weights == "int8" else None
        if kernel is False and weights == "int8":
            raise ValueError("weights: 'int8' is the kernel's, but kernel=False")
        if reason is not None and needs is not None:
            raise ValueError(f"{needs}: the compiled step cannot run this model: {reason}")
        if reason is not None or kernel is False:
            return ModuleStep(self.model, self.cache)
        kind = torch.int8 if weights == "int8" else None
        return KernelStep(self.model, self.cache, self.max_tokens, kind)

    # ---- sequences -------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> Tensor:
        """The encoder's result [1, S, W], a memory for `begin`."""
        self._check_ids("ids", ids)
        if not ids:
            raise ValueError("ids: empty, needs a token at least")
        return self.model.encode(torch.tensor([list(ids)], device=self.cache.device))

    @torch.no_grad()
    def begin(
        self, prompt: Sequence[int], memory: Tensor | None = None, memory_length: int | None = None
    ) -> Slot:
        """A new sequence. slot.length: so many tokens of the prompt are there already, but never its last one.

        memory: [1, S, W] or [S, W], of an encoder (see `encode`); memory_length: of its tokens, the rest is padding.
        Sequences share what they have in common if they have the same memory, the very tensor.
        ValueError: an empty prompt, or one that is too long; an id that is none; a memory without an encoder, or none.
        """
        if not prompt:
            raise ValueError("prompt: empty, needs a token at least")
        if len(prompt) > self.max_tokens:
            limit = (
                "max_tokens" if self.max_tokens < self.model.config.max_positions else "positions"
            )
            raise ValueError(
                f"prompt: {len(prompt)} tokens, but {self.max_tokens} are allowed ({limit})"
            )
        self._check_ids("prompt", prompt)
        if (memory is None) != (self.model.encoder is None):
            raise ValueError("memory: needed with an encoder (see encode), and only then")
        root, keys = (0, ()) if memory is None else self._memory_keys(memory, memory_length)
        slot = self.cache.new(prompt, root)
        slot.prompt, slot.memory = len(prompt), keys
        return slot

    def fork(self, slot: Slot) -> Slot:
        """Another sequence that begins with the same tokens, in the same memory until either of them writes."""
        return self.cache.fork(slot)

    def rewind(self, slot: Slot, length: int) -> None:
        """Forget the tokens from `length` on. ValueError: see `PagedCache.rewind`."""
        self.cache.rewind(slot, length)

    def end(self, slot: Slot) -> None:
        """Give its memory back."""
        self.cache.release(slot)

    # ---- tokens in, logits out -------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, work: Work, every: bool = False, progress: Progress | None = None) -> Tensor:
        """Append tokens to slots, and return the logits after the last token of each, [len(work), V].

        every: after each token, [sum of all, V], in order. float32 (float64 of a model in float64).
        progress(done, total) is called after every part of the computation, with numbers of tokens.

        What a sequence gets does not depend on the others in `work`: on the CPU bit by bit, in each dtype.
        CacheFull: not enough room, or a sequence would exceed max_tokens; nothing has been appended then.
        ValueError: an id that is none, a slot without tokens, that has ended or comes twice.
        """
        self._check_work(work)
        if not work:
            return torch.empty(0, self.vocabulary, device=self.cache.device)
        few = [i for i, (slot, tokens) in enumerate(work) if goes_on(slot, len(tokens))]
        before = sum(slot.length for slot, _ in work)
        total = sum(len(tokens) for _, tokens in work)
        found: list[list[Tensor]] = [[] for _ in work]
        for batch in self._batches(work, few, every):
            logits = self._append([(work[i][0], tokens) for i, tokens in batch], every)
            sizes = [len(tokens) if every else 1 for _, tokens in batch]
            for (i, _), rows in zip(batch, logits.split(sizes), strict=True):
                found[i] = [*found[i], rows] if every else [rows]
            if progress is not None:
                progress(sum(slot.length for slot, _ in work) - before, total)
        all_rows = [rows for parts in found for rows in parts]
        return all_rows[0] if len(all_rows) == 1 else torch.cat(all_rows)

    def _batches(
        self, work: Work, few: list[int], every: bool
    ) -> Iterator[list[tuple[int, Sequence[int]]]]:
        """What is computed at a time: (index into work, tokens) of each sequence.

        Those that go on by a few tokens together; every other one by itself, in chunks. So how a sequence is computed
        follows from its own tokens.
        """
        if few:
            yield [(i, work[i][1]) for i in few]
        for i in sorted(set(range(len(work))) - set(few)):
            slot, tokens = work[i]
            begin, end = slot.length, slot.length + len(tokens)
            if not every and slot.length < slot.prompt:
                self.cache.extend(slot, tokens)  # the one before may have computed some of them
            while slot.length < end:
                stop = min(end, slot.length + self.chunk)
                yield [(i, tokens[slot.length - begin : stop - begin])]

    def _append(self, work: Work, every: bool) -> Tensor:
        slots, counts = [slot for slot, _ in work], [len(tokens) for _, tokens in work]
        ids = [token for _, tokens in work for token in tokens]
        logits = self.step.forward_rows(ids, slots, counts, every)
        for slot, tokens in work:
            self.cache.commit(slot, tokens)
        self.computed += len(ids)
        return logits

    def _memory_keys(self, memory: Tensor, length: int | None) -> Memory:
        """Once for a memory: the root of its sequences, and its keys and values."""
        known: dict[int | None, Memory] = self._memories.setdefault(memory, {})
        if length not in known:
            c, one = self.model.config, memory[None] if memory.dim() == 2 else memory
            if one.dim() != 3 or len(one) != 1 or one.shape[2] != c.width:
                raise ValueError(
                    f"memory: expected [S, {c.width}] or [1, S, {c.width}], got {tuple(memory.shape)}"
                )
            if length is not None and not 0 < length <= one.shape[1]:
                raise ValueError(
                    f"memory_length: got {length}, the memory has {one.shape[1]} tokens"
                )
            keys = self.model.memory_keys(one[:, :length])
            known[length] = self.cache.pages.new_number(), keys
        return known[length]

    # ---- checks ----------------------------------------------------------------------------------

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise ValueError(
                    f"{name}: unknown id {token}, the model has 0 … {self.vocabulary - 1}"
                )

    def _check_work(self, work: Work) -> None:
        if self.model.training:
            raise ValueError("model: is in training mode, call its eval()")
        for slot, tokens in work:
            if not tokens:
                raise ValueError("work: a slot without tokens")
            self._check_ids("work", tokens)
            if slot.length + len(tokens) > self.max_tokens:
                raise CacheFull(
                    f"a sequence of {slot.length} tokens has room for {self.max_tokens - slot.length} more,"
                    f" but {len(tokens)} are wanted (max_tokens={self.max_tokens})"
                )
        if not all(
            goes_on(slot, len(tokens)) for slot, tokens in work
        ):  # else one call, which looks
            self.cache.check_room(
                [slot for slot, _ in work], [len(tokens) for _, tokens in work], self.chunk
            )


def _max_tokens(model: Transformer, wanted: int | None) -> int:
    """Of a sequence. ValueError: the model has no cached path, or fewer positions."""
    c = model.config
    if model.on_torch:
        raise ValueError("model: computes by torch's functions (stock), which know no cache")
    if not c.causal or c.head != "lm":
        raise ValueError(
            f"model: needs a causal one with the head 'lm', got causal={c.causal}, head={c.head!r}"
        )
    if wanted is None:
        return c.max_positions
    if wanted <= 0:
        raise ValueError(f"max_tokens: expected a positive number, got {wanted}")
    rope = model.decoder.rope
    bound = c.position == "learned" or (rope is not None and rope.follows_length)
    if bound and wanted > c.max_positions:
        raise ValueError(f"max_tokens: got {wanted}, the model has {c.max_positions} positions")
    return wanted
