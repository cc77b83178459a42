"""Pages of keys and values: who holds them, what they hold, and that nothing gets lost or mixed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfuse
from pyfuse.models import _memory
from pyfuse.models.cache import GIVEN_BACK, CacheFull, PagedCache, Slot
from pyfuse.models.pages import Pages

LAYERS, HEADS, D, SIZE = 2, 3, 5, 4


def made(pages: int = 8, **options: Any) -> PagedCache:
    return PagedCache(LAYERS, HEADS, D, pages, page_size=SIZE, **options)


def content(layer: int, tokens: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values [Hk, M, D] of tokens start … stop - 1, which say what all tokens up to them are."""
    numbers = [hash((layer, *tokens[: i + 1])) % 1_000_003 for i in range(start, stop)]
    base = torch.tensor(numbers, dtype=torch.float64)[None, :, None] / 1e6
    parts = torch.arange(HEADS)[:, None, None] * 10.0 + torch.arange(D)
    return (base + parts).float(), (base * 3.0 - parts).float()


def append(cache: PagedCache, work: list[tuple[Slot, list[int]]]) -> tuple[Tensor, Tensor]:
    """As a model does."""
    slots, counts = [slot for slot, _ in work], [len(tokens) for _, tokens in work]
    found = cache.prepare(slots, counts)
    for slot, tokens in work:
        for layer in range(LAYERS):
            all_tokens = slot.tokens + tokens
            cache.write(layer, slot, *content(layer, all_tokens, slot.length, len(all_tokens)))
        cache.commit(slot, tokens)
    return found


def check(cache: PagedCache, slot: Slot, tokens: list[int]) -> None:
    """That the slot holds what these tokens gave."""
    assert slot.tokens == tokens and slot.length == len(tokens)
    seen = 0 if cache.window is None else max(0, len(tokens) - cache.window + 1)
    for layer in range(LAYERS if seen < len(tokens) else 0):
        for actual, exact in zip(
            cache.gather(layer, slot, len(tokens)),
            content(layer, tokens, seen, len(tokens)),
            strict=True,
        ):
            assert torch.equal(actual[0, :, actual.shape[2] - exact.shape[1] :], exact)


# ---- pages alone ---------------------------------------------------------------------------------


def test_pages_are_counted() -> None:
    pages = Pages(3)
    a, b = pages.take(), pages.take()
    assert a != b and (pages.room, pages.in_use, pages.idle) == (1, 2, 0)
    pages.hold(a)
    pages.drop(a)
    assert pages.in_use == 2 and pages.holders(a) == 1
    pages.drop(a)
    pages.drop(b)
    assert (pages.room, pages.in_use, pages.idle) == (3, 0, 0)
    assert {pages.take() for _ in range(3)} == {0, 1, 2}
    with pytest.raises(IndexError, match="no page is free"):
        pages.take()


def test_known_pages_stay_until_their_room_is_needed() -> None:
    pages = Pages(3)
    first, second = pages.take(), pages.take()
    one = pages.learn(0, (1, 2), first)
    two = pages.learn(one, (3, 4), second)
    assert pages.learn(one, (3, 4), pages.take()) == two  # computed twice at the same time
    for page in range(3):
        pages.drop(page)
    assert (pages.in_use, pages.idle) == (0, 2)
    found = pages.find(0, (1, 2))
    assert found is not None and found.page == first
    assert pages.find(one, (3, 4)) == (two, second) and pages.find(0, (3, 4)) is None
    pages.hold(first)
    pages.take()
    pages.take()  # in the place of `second`
    assert pages.find(one, (3, 4)) is None and pages.find(0, (1, 2)) is not None
    pages.drop(first)
    pages.forget_idle()
    assert pages.find(0, (1, 2)) is None and (pages.room, pages.idle) == (1, 0)


def test_the_page_that_is_idle_longest_goes_first() -> None:
    pages = Pages(3)
    for i in range(3):
        pages.learn(0, (i,), pages.take())
    for page in (1, 0, 2):
        pages.drop(page)
    assert [pages.take() for _ in range(3)] == [1, 0, 2]


# ---- sequences -----------------------------------------------------------------------------------


def test_tables_are_those_of_decode_attention() -> None:
    cache = made()
    slots = [cache.new([1]), cache.new([2])]
    append(cache, [(slots[0], list(range(10))), (slots[1], [7, 8, 9])])
    table, lengths = cache.prepare(slots, [1, 1])
    assert (table.dtype, lengths.dtype) == (torch.int32, torch.int64)
    assert lengths.tolist() == [11, 4]
    assert table.shape == (2, 3) and table[0].tolist() == slots[0].pages
    assert cache.k.is_contiguous() and cache.k.shape == (LAYERS, 8, HEADS, SIZE, D)
    q, new = torch.randn(2, 2 * HEADS, 1, D), [torch.randn(2, HEADS, 1, D) for _ in "kv"]
    for layer in range(LAYERS):
        o = pyfuse.decode_attention(
            q, cache.k[layer], cache.v[layer], seqlens_k=lengths, block_table=table,
            k_new=new[0], v_new=new[1],
        )  # fmt: skip
        for b, slot in enumerate(slots):
            k, v = cache.gather(layer, slot, slot.length + 1)
            assert torch.equal(k[0, :, -1], new[0][b, :, 0])
            alone = pyfuse.attention(q[b : b + 1], k, v, causal=True)
            torch.testing.assert_close(o[b : b + 1], alone)


def test_a_common_beginning_is_shared() -> None:
    cache, text = made(), list(range(11))
    slot = cache.new(text)
    assert slot.length == 0
    append(cache, [(slot, text)])
    assert cache.pages_in_use == 3
    same, longer, shorter = cache.new(text), cache.new([*text[:8], 50, 51]), cache.new(text[:8])
    assert [s.length for s in (same, longer, shorter)] == [8, 8, 4]  # never the last token
    other = cache.new([0, 1, 2, 4, 4, 5, 6, 7, 8])
    assert other.length == 0 and cache.pages_in_use == 3
    check(cache, same, text[:8])
    append(cache, [(same, text[8:]), (longer, [50, 51])])
    assert cache.pages_in_use == 5
    check(cache, same, text)
    check(cache, longer, [*text[:8], 50, 51])
    check(cache, slot, text)
    assert cache.new(text, root=cache.pages.new_number()).length == 0


def test_what_has_ended_is_kept_until_room_is_needed() -> None:
    cache, text = made(pages=4), list(range(13))
    slot = cache.new(text)
    append(cache, [(slot, text)])
    cache.release(slot)
    assert (cache.pages_in_use, cache.pages_kept) == (0, 3)
    again = cache.new(text)
    assert again.length == 12 and (cache.pages_in_use, cache.pages_kept) == (3, 0)
    cache.release(again)
    other = cache.new([20] * 8)
    append(cache, [(other, [20] * 8)])
    assert (cache.pages_in_use, cache.pages_kept) == (2, 2)
    assert cache.new(text).length == 8  # the end of it went first


def test_a_fork_shares_and_writes_to_a_copy() -> None:
    cache, text = made(), list(range(6))
    slot = cache.new(text)
    append(cache, [(slot, text)])
    forks = [cache.fork(slot) for _ in range(3)]
    assert cache.pages_in_use == 2
    append(cache, [(fork, [100 + i]) for i, fork in enumerate(forks)])
    assert cache.pages_in_use == 1 + 4
    append(cache, [(slot, [200])])
    assert cache.pages_in_use == 1 + 4
    check(cache, slot, [*text, 200])
    for i, fork in enumerate(forks):
        check(cache, fork, [*text, 100 + i])
    for each in (slot, *forks):
        cache.release(each)
    assert cache.pages_in_use == 0


def test_the_last_of_those_who_write_needs_no_copy() -> None:
    cache = made(pages=3)
    slot = cache.new([1])
    append(cache, [(slot, [1, 2])])
    fork, third = cache.fork(slot), cache.fork(slot)
    append(cache, [(slot, [3]), (fork, [4]), (third, [5])])
    check(cache, slot, [1, 2, 3])
    check(cache, fork, [1, 2, 4])
    check(cache, third, [1, 2, 5])
    assert cache.pages_in_use == 3


def test_rewinding_forgets() -> None:
    cache, text = made(), list(range(10))
    slot = cache.new(text)
    append(cache, [(slot, text)])
    cache.rewind(slot, 6)
    assert cache.pages_in_use == 2
    check(cache, slot, text[:6])
    append(cache, [(slot, [60, 61, 62])])
    check(cache, slot, [*text[:6], 60, 61, 62])
    known = cache.new(text)  # its second page was written over
    assert known.length == 4
    cache.rewind(slot, 0)
    check(cache, slot, [])
    with pytest.raises(ValueError, match="length: got 1, the sequence has 0 tokens"):
        cache.rewind(slot, 1)


def test_rewinding_into_a_page_that_others_hold_leaves_it_to_them() -> None:
    cache, text = made(), list(range(8))
    slot = cache.new(text)
    append(cache, [(slot, text)])
    other = cache.fork(slot)
    cache.rewind(slot, 6)
    append(cache, [(slot, [60, 61, 62])])
    check(cache, other, text)
    check(cache, slot, [*text[:6], 60, 61, 62])
    assert cache.new([*text, 1]).length == 8


def test_a_window_bounds_the_pages() -> None:
    cache = made(pages=4, window=6)
    slot, text = cache.new([0]), []
    for step in range(60):
        append(cache, [(slot, [step])])
        text.append(step)
        check(cache, slot, text)
        assert cache.pages_in_use <= 3
    cache.release(slot)
    assert cache.pages_in_use == 0


def test_a_page_is_given_back_as_soon_as_it_may_be() -> None:
    cache = made(window=6)
    slot = cache.new([0])
    append(cache, [(slot, [1] * 8)])
    for length, given_back in ((9, 0), (10, 1), (13, 1), (14, 2)):
        append(cache, [(slot, [1] * (length - slot.length))])
        assert [page == GIVEN_BACK for page in slot.pages].count(True) == given_back, length


def test_how_far_a_window_rewinds() -> None:
    cache, text = made(window=6), list(range(30))
    slot = cache.new(text)
    append(cache, [(slot, text)])
    append(cache, [(slot, [30, 31, 32, 33])])
    cache.rewind(slot, 30)
    check(cache, slot, text)
    with pytest.raises(ValueError, match="length: got 24, but pages before that have been given"):
        cache.rewind(slot, 24)
    check(cache, slot, text)


def test_a_windows_pages_can_be_shared_later() -> None:
    cache, text = made(pages=16, window=6), list(range(30))
    for _ in range(2):
        slot = cache.new(text)
        append(cache, [(slot, text[slot.length :])])
        append(cache, [(slot, [99])])
        check(cache, slot, [*text, 99])
        cache.release(slot)
    assert cache.new(text).length == 28 and cache.pages_in_use == 7


# ---- room ----------------------------------------------------------------------------------------


def test_a_full_cache_says_so_and_changes_nothing() -> None:
    cache = made(pages=3)
    slot, other = cache.new([1]), cache.new([2])
    append(cache, [(slot, [1] * 6)])
    with pytest.raises(CacheFull, match="room for 6 more tokens of these 1 sequences, but 7 are"):
        cache.prepare([slot], [7])
    with pytest.raises(CacheFull, match=r"but 7 are wanted \(3 pages of 4 tokens, 2 in"):
        cache.prepare([slot, other], [2, 5])
    assert cache.pages_in_use == 2
    check(cache, slot, [1] * 6)
    fork = cache.fork(slot)
    append(cache, [(fork, [3])])  # the copy is the last page
    with pytest.raises(CacheFull, match="room for 1 more"):
        cache.prepare([fork], [2])
    cache.release(slot)
    append(cache, [(fork, [3, 3])])
    check(cache, fork, [1] * 6 + [3] * 3)


def test_pages_of_a_window_that_others_hold_too_are_no_room() -> None:
    """A long text in small calls gives back what it held, if nobody else does."""
    cache = made(pages=8, window=6)
    slot = cache.new([0])
    append(cache, [(slot, [1] * 20)])
    cache.check_room([slot], [40], 4)
    fork = cache.fork(slot)
    with pytest.raises(CacheFull):
        cache.check_room([slot], [40], 4)
    cache.release(fork)
    for _ in range(10):
        append(cache, [(slot, [2] * 4)])
    check(cache, slot, [1] * 20 + [2] * 40)


def test_places_that_were_never_written_are_used_again() -> None:
    """After a call that failed."""
    cache = made(pages=3)
    slot = cache.new([1])
    cache.prepare([slot], [9])
    assert cache.pages_in_use == 3 and slot.length == 0
    assert cache.extend(slot, list(range(9))) == 0
    append(cache, [(slot, [1, 2])])
    check(cache, cache.fork(slot), [1, 2])
    assert cache.pages_in_use == 3
    cache.rewind(slot, 2)
    assert cache.pages_in_use == 1


def test_nothing_is_allocated_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_wanted = 2 * LAYERS * 8 * HEADS * SIZE * D * 4
    monkeypatch.setattr(_memory, "available_bytes", lambda device: bytes_wanted - 1)
    with monkeypatch.context() as inner:
        inner.setattr(torch, "empty", None)
        with pytest.raises(
            MemoryError, match=rf"8 pages of 4 tokens need {bytes_wanted} bytes, but {bytes_wanted - 1}"
        ):  # fmt: skip
            made()
    assert made(quantized=True).bytes == 2 * LAYERS * 8 * HEADS * SIZE * (D + 4)
    monkeypatch.setattr(_memory, "available_bytes", lambda device: None)
    assert made().bytes == bytes_wanted


def test_this_machine_has_memory() -> None:
    found = _memory.available_bytes(torch.device("cpu"))
    assert found is None or 2**20 < found < 2**50
    assert _memory.available_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("name", ["pages", "page_size"])
def test_errors_of_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
        PagedCache(1, 1, 1, **({"pages": 1} | {name: 0}))


def test_errors_of_calls() -> None:
    cache = made()
    slot = cache.new([1])
    with pytest.raises(ValueError, match="slot: comes twice"):
        cache.prepare([slot, slot], [1, 1])
    cache.release(slot)
    for call in (cache.release, cache.fork, lambda s: cache.rewind(s, 0)):
        with pytest.raises(ValueError, match="slot: the sequence has ended"):
            call(slot)
    with pytest.raises(ValueError, match="slot: the sequence has ended"):
        cache.prepare([slot], [1])


# ---- int8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_int8_keeps_its_bound(dtype: torch.dtype) -> None:
    """|x - x̂| <= max|x| / 254 in a head of a token, and what float32 and the dtype round."""
    cache = PagedCache(1, HEADS, 63, 40, page_size=SIZE, dtype=dtype, quantized=True)
    slot, n = cache.new([1]), 151
    sizes = torch.logspace(-4, 4, n)[None, :, None]
    k, v = ((torch.randn(HEADS, n, 63) * sizes).to(dtype) for _ in "kv")
    k[1, 5] = 0.0
    v[:, 7] = torch.eye(63)[0].to(dtype) * 100
    cache.prepare([slot], [n])
    cache.write(0, slot, k, v)
    cache.commit(slot, [1] * n)
    assert cache.k.dtype == torch.int8 and cache.k_scale.dtype == torch.float32
    for x, kept in zip((k, v), cache.gather(0, slot, n), strict=True):
        assert kept.dtype == dtype
        largest = x.double().abs().amax(-1, keepdim=True)
        bound = largest / 254 * (1 + 1e-4) + largest * max(torch.finfo(dtype).eps / 2, 1e-7)
        error = (kept[0].double() - x.double()).abs()
        assert (error <= bound).all() and (error[:, 10] > largest[:, 10] / 400).any()
    assert not cache.gather(0, slot, n)[0][0, 1, 5].any()
    product = cache.k[0, slot.pages[0]] * cache.k_scale[0, slot.pages[0], :, :, None]
    assert torch.equal(product.to(dtype), cache.gather(0, slot, n)[0][0, :, :SIZE])


def test_int8_pages_are_copied_with_their_scales() -> None:
    cache = made(quantized=True)
    slot = cache.new([1])
    append(cache, [(slot, [1, 2])])
    fork = cache.fork(slot)
    append(cache, [(fork, [3])])
    for layer in range(LAYERS):
        for a, b in zip(cache.gather(layer, slot, 2), cache.gather(layer, fork, 2), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
    assert slot.pages != fork.pages


# ---- by chance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window, pages", [(None, 24), (1, 8), (6, 12), (11, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_mixed(seed: int, window: int | None, pages: int) -> None:
    """Random sequences that begin, grow, fork, go back and end, few different tokens, little room."""
    draw = random.Random(seed)
    cache = made(pages, window=window)
    alive: list[tuple[Slot, list[int]]] = []
    texts = [[draw.randrange(3) for _ in range(30)] for _ in range(3)]
    shared = full = 0
    for _ in range(300):
        action = draw.random()
        if action < 0.2 and len(alive) < 8:
            text = draw.choice(texts)[: draw.randrange(1, 30)]
            slot = cache.new(text)
            shared += slot.length
            alive.append((slot, text[: slot.length]))
        elif action < 0.3 and alive and len(alive) < 8:
            slot, tokens = draw.choice(alive)
            alive.append((cache.fork(slot), tokens.copy()))
        elif action < 0.4 and alive:
            slot, _ = alive.pop(draw.randrange(len(alive)))
            cache.release(slot)
        elif action < 0.5 and alive:
            slot, tokens = draw.choice(alive)
            length = draw.randrange(len(tokens) + 1)
            try:
                cache.rewind(slot, length)
                del tokens[length:]
            except ValueError:
                assert window is not None
        elif alive:
            chosen = draw.sample(alive, draw.randrange(1, len(alive) + 1))
            text = draw.choice(texts)
            work = [
                (s, text[len(t) : len(t) + draw.choice((1, 1, 2, 5, 9))] or [0]) for s, t in chosen
            ]
            try:
                append(cache, work)
                for (_, tokens), (_, new) in zip(chosen, work, strict=True):
                    tokens.extend(new)
            except CacheFull:
                full += 1
        if alive:
            check(cache, *draw.choice(alive))
        held = {page for slot, _ in alive for page in slot.pages if page >= 0}
        assert cache.pages_in_use == len(held)
    assert shared > 0 and full > 0
    for slot, tokens in alive:
        check(cache, slot, tokens)
        cache.release(slot)
    assert cache.pages_in_use == 0
    cache.pages.forget_idle()
    assert cache.pages_kept == 0 and cache.pages.room == pages
