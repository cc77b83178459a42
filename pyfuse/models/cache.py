"""Keys and values of the tokens that a model has seen, in pages that sequences share.

A page holds `page_size` tokens of all layers. A sequence has a list of pages, its block table; two sequences that begin
alike have the same pages for that, and whoever writes to a page that others hold writes to a copy (Kwon et al.,
"Efficient memory management for large language model serving with PagedAttention", arXiv:2309.06180).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyfuse.models._memory import check_memory
from pyfuse.models.pages import Pages

GIVEN_BACK = -1  # a page before the window
_LEAST = torch.finfo(torch.float32).tiny  # of scales: that of zeros must not be 0


class CacheFull(RuntimeError):
    """The cache has no room for the tokens that are to be appended."""


@dataclass(eq=False)
class Slot:
    """A sequence in the cache.

    tokens: the ids whose keys and values are there. pages: where, GIVEN_BACK for those before the window.
    chain: numbers of its full pages (see `Pages`), after `root`. prompt: how many tokens it was begun for; see
    `Rows`. memory: keys and values [1, Hk, S, D] of an encoder's result, for each layer.
    """

    root: int = 0
    prompt: int = 0
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    memory: tuple[tuple[Tensor, Tensor], ...] = ()
    ended: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens)


class PagedCache:
    """k, v [layers, pages, Hk, page_size, D], and which sequence has which pages.

    k[layer] and v[layer] are what `pyfuse.decode_attention` takes, with the block table and lengths of `prepare`.
    A call of a model appends tokens in three steps: `prepare` reserves their places, the layers write keys and values
    there, `commit` says that they are there. Until then the slots have their old lengths.
    window: tokens that one sees, itself included; pages wholly before the window of the next token are given back, so
      a sequence never holds more than the pages of its window and of the tokens being appended.
    quantized: k and v are int8, with k_scale and v_scale [layers, pages, Hk, page_size] in float32, one for each token
      and head. Of x in head and token: scale = max|x| / 127, i = round(x / scale), x̂ = scale · i, so that

        |x - x̂| ≤ max|x| / 254            and what float32, and dtype after it, round

      It takes D + 4 bytes instead of 2·D or 4·D.

    MemoryError: the tensors need more bytes than the machine has available; nothing is allocated then.
    """

    def __init__(
        self, layers: int, heads: int, d: int, pages: int, *, page_size: int = 32, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", window: int | None = None, quantized: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (("pages", pages), ("page_size", page_size)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.page_size, self.window, self.quantized = page_size, window, quantized
        self.dtype, self.device = dtype, torch.device(device)
        kept = torch.int8 if quantized else dtype
        shape = layers, pages, heads, page_size
        self.bytes = 2 * math.prod(shape) * (d * kept.itemsize + 4 * quantized)
        check_memory(
            self.bytes, self.device, f"cache: {pages} pages of {page_size} tokens need",
            "fewer sequences or max_tokens need less",
        )  # fmt: skip
        with torch.inference_mode(False):  # else nobody could write to them outside of it
            self.k, self.v = (torch.empty(*shape, d, dtype=kept, device=device) for _ in "kv")
            if quantized:
                self.k_scale, self.v_scale = (torch.empty(shape, device=device) for _ in "kv")
        self.pages = Pages(pages)

    @property
    def pages_in_use(self) -> int:
        """Held by sequences."""
        return self.pages.in_use

    @property
    def pages_kept(self) -> int:
        """Of sequences that have ended, kept for prompts that begin alike until somebody needs the room."""
        return self.pages.idle

    # ---- sequences -------------------------------------------------------------------------------

    def new(self, tokens: Sequence[int], root: int = 0) -> Slot:
        """A sequence that has the full pages of what `tokens` has in common with earlier ones, but its last token.

        root: sequences of different roots share nothing (`Pages.new_number`).
        """
        slot = Slot(root)
        self.extend(slot, tokens)
        return slot

    def extend(self, slot: Slot, tokens: Sequence[int]) -> int:
        """Append the full pages of `tokens` that are known already, but not the last token. Returns their tokens."""
        size = self.page_size
        if slot.ended or slot.length % size or len(slot.pages) * size > slot.length:
            return 0
        done = 0
        while done + size < len(tokens):
            page_tokens = tuple(tokens[done : done + size])
            known = self.pages.find(slot.chain[-1] if slot.chain else slot.root, page_tokens)
            if known is None:
                break
            self.pages.hold(known.page)
            slot.pages.append(known.page)
            slot.chain.append(known.number)
            slot.tokens.extend(page_tokens)
            done += size
        return done

    def fork(self, slot: Slot) -> Slot:
        """Another sequence of the same tokens, in the same pages."""
        _check_alive(slot)
        pages = slot.pages[: self._pages_for(slot.length)]
        for page in pages:
            if page != GIVEN_BACK:
                self.pages.hold(page)
        return Slot(slot.root, slot.prompt, list(slot.tokens), pages, list(slot.chain), slot.memory)

    def rewind(self, slot: Slot, length: int) -> None:
        """Forget the tokens from `length` on.

        ValueError: more than there are, or so many that the window of the next token has been given back already
        (never so for those of the last call).
        """
        _check_alive(slot)
        if not 0 <= length <= slot.length:
            raise ValueError(f"length: got {length}, the sequence has {slot.length} tokens")
        keep = self._pages_for(length)
        if GIVEN_BACK in slot.pages[self._first_page(length) : keep]:
            raise ValueError(f"length: got {length}, but pages before that have been given back")
        self._drop(slot.pages[keep:])
        del slot.pages[keep:], slot.chain[length // self.page_size :], slot.tokens[length:]

    def release(self, slot: Slot) -> None:
        """The end of a sequence. Its full pages are kept as long as nobody needs the room."""
        _check_alive(slot)
        self._drop(slot.pages)
        slot.pages, slot.memory, slot.ended = [], (), True

    # ---- a call ----------------------------------------------------------------------------------

    def prepare(self, slots: Sequence[Slot], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reserve places for counts[b] more tokens of slots[b]: no page that is written to is anybody else's then.

        Returns block_table [B, P], int32, and lengths [B], int64, the new tokens included. In block_table all entries
        are pages, but those before the window or beyond a sequence's length mean nothing.
        CacheFull: there is no room; nothing is reserved then. ValueError: a slot has ended, or comes twice.
        """
        for slot in slots:
            self._give_back(slot)
        self.check_room(slots, counts)
        for slot, count in zip(slots, counts, strict=True):
            self._reserve(slot, slot.length + count)
        width = max((len(slot.pages) for slot in slots), default=0)
        rows = [[max(p, 0) for p in s.pages] + [0] * (width - len(s.pages)) for s in slots]
        lengths = [slot.length + count for slot, count in zip(slots, counts, strict=True)]
        table = torch.tensor(rows, dtype=torch.int32).reshape(len(slots), width)
        return table.to(self.device), torch.tensor(lengths).to(self.device)

    def commit(self, slot: Slot, tokens: Sequence[int]) -> None:
        """The keys and values of these tokens have been written to the places reserved for them."""
        slot.tokens.extend(tokens)
        size = self.page_size
        for i in range(len(slot.chain), slot.length // size):
            before = slot.chain[-1] if slot.chain else slot.root
            page_tokens = tuple(slot.tokens[i * size : (i + 1) * size])
            slot.chain.append(self.pages.learn(before, page_tokens, slot.pages[i]))

    def check_room(
        self, slots: Sequence[Slot], counts: Sequence[int], at_a_time: int | None = None
    ) -> None:
        """CacheFull: no room for counts[b] more tokens of slots[b], in calls of `at_a_time` at most.

        ValueError: a slot has ended, or comes twice.
        """
        if len({id(slot) for slot in slots}) < len(slots):
            raise ValueError("slot: comes twice in one call")
        for slot in slots:
            _check_alive(slot)
        needed = free = 0  # free: places in pages that are there already
        copies: dict[int, int] = {}
        for slot, count in zip(slots, counts, strict=True):
            needed += self._pages_missing(slot, count, at_a_time or count)
            free += len(slot.pages) * self.page_size - slot.length
            if count and slot.length % self.page_size:
                page = slot.pages[slot.length // self.page_size]
                made = copies.get(page, 0)
                if self.pages.holders(page) - made > 1:
                    copies[page] = made + 1
        copied = sum(copies.values())
        if needed + copied > self.pages.room:
            places = max(0, free + (self.pages.room - copied) * self.page_size)
            raise CacheFull(
                f"the cache has room for {places} more tokens of these {len(slots)} sequences, but"
                f" {sum(counts)} are wanted ({self.pages.total} pages of {self.page_size} tokens,"
                f" {self.pages_in_use} in use)"
            )

    def _pages_missing(self, slot: Slot, count: int, at_a_time: int) -> int:
        missing = max(0, self._pages_for(slot.length + count) - len(slot.pages))
        if self.window is None:
            return missing
        most = self._pages_for(self.window - 1 + min(count, at_a_time)) + 1
        own = sum(p != GIVEN_BACK and self.pages.holders(p) == 1 for p in slot.pages)
        return min(missing, max(0, most - own))

    def write(self, layer: int, slot: Slot, k: Tensor, v: Tensor) -> None:
        """Keys and values [Hk, M, D] of the M tokens after those of the slot, to the places reserved for them."""
        at = torch.arange(slot.length, slot.length + k.shape[1])
        page = torch.tensor(slot.pages)[at // self.page_size].to(self.device)
        place = (at % self.page_size).to(self.device)
        for tensor, x in zip(self._tensors(), self._kept_as(k, v), strict=True):
            tensor[layer][page, :, place] = x.transpose(0, 1)

    def gather(self, layer: int, slot: Slot, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hk, N, D] of the slot's tokens before `length`, without the pages given back."""
        first = self._first_page(slot.length)
        pages = torch.tensor(slot.pages[first : self._pages_for(length)], device=self.device)
        n = length - first * self.page_size
        k, v, *scales = (
            tensor[layer].transpose(0, 1)[:, pages].flatten(1, 2)[None, :, :n]
            for tensor in self._tensors()
        )
        if self.quantized:
            k, v = (
                (x * scale[..., None]).to(self.dtype)
                for x, scale in zip((k, v), scales, strict=True)
            )
        return k, v

    def _tensors(self) -> tuple[Tensor, ...]:
        """All that is in pages: [layers, pages, ...]."""
        return (self.k, self.v, self.k_scale, self.v_scale) if self.quantized else (self.k, self.v)

    def _kept_as(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if not self.quantized:
            return k, v
        scales = [(x.float().abs().amax(-1) / 127).clamp_min(_LEAST) for x in (k, v)]
        k, v = (
            (x.float() / scale[..., None]).round().to(torch.int8)
            for x, scale in zip((k, v), scales, strict=True)
        )
        return k, v, *scales

    # ---- pages -----------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _first_page(self, length: int) -> int:
        """Of what a token at that position sees."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.page_size

    def _drop(self, pages: list[int]) -> None:
        for page in reversed(pages):  # the last one is given up first: without it the others serve
            if page != GIVEN_BACK:
                self.pages.drop(page)

    def _give_back(self, slot: Slot) -> None:
        first = min(self._first_page(slot.length), len(slot.pages))
        self._drop(slot.pages[:first])
        slot.pages[:first] = [GIVEN_BACK] * first

    def _reserve(self, slot: Slot, length: int) -> None:
        if length > slot.length and slot.length % self.page_size:
            last = slot.length // self.page_size
            slot.pages[last] = self._own(slot.pages[last])
        while len(slot.pages) < self._pages_for(length):
            slot.pages.append(self.pages.take())

    def _own(self, page: int) -> int:
        """This page, or a copy if others hold it as well."""
        if self.pages.holders(page) == 1:
            self.pages.forget(page)
            return page
        copy = self.pages.take()
        for tensor in self._tensors():
            tensor[:, copy] = tensor[:, page]
        self.pages.drop(page)
        return copy


def _check_alive(slot: Slot) -> None:
    if slot.ended:
        raise ValueError("slot: the sequence has ended")
