"""pyfuse.compat.flash_attn.flash_attn_with_kvcache, against a loop over sequences in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import DTYPES, angles, normal, reference, turned
from torch import Tensor

from pyfuse.compat.flash_attn import flash_attn_with_kvcache

ROOM, HEADS, HEADS_K = 48, 4, 2
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (11, 2), "softmax_scale": 0.2},
    "steps": {"causal": True, "softcap": 1.5, "alibi_slopes": SLOPES},
    "alibi of sequences": {"causal": True, "alibi_slopes": SLOPES * torch.arange(1, 4)[:, None]},
}


@dataclass(frozen=True)
class Case:
    """One call for three sequences."""

    arrangement: str = "rows"  # rows, picked, leftpad, picked leftpad, or a page size
    queries: int = 1
    added: int | None = 1
    rotary: str = "none"  # none, half, interleaved
    options: str = "causal"
    dtype: str = "f32"
    lengths: tuple[int, int, int] = (40, 3, 21)

    def __str__(self) -> str:
        words = (self.arrangement, self.queries, self.added, self.rotary, self.options, self.dtype)
        return "-".join(str(word).replace(" ", "_") for word in words)


class Call:
    """The tensors of a case, in the library's arguments and as a list of sequences."""

    def __init__(self, case: Case) -> None:
        d, dtype = 24, case.dtype
        self.case, self.q = case, normal(dtype, 3, case.queries, HEADS, d)
        self.new = [normal(dtype, 3, case.added or 0, HEADS_K, d) for _ in "kv"]
        self.rotary = angles(ROOM, 16, DTYPES.get(dtype, torch.float64))
        self.leftpad = torch.tensor([5, 0, 2], dtype=torch.int32)
        self.arguments: dict[str, Any] = {**OPTIONS[case.options]}
        shape, self.where = (3, ROOM), torch.arange(3)[:, None] * ROOM + torch.arange(ROOM)
        if "picked" in case.arrangement:
            picked = torch.tensor([4, 0, 2], dtype=torch.int32)
            shape, self.where = (5, ROOM), picked[:, None].long() * ROOM + torch.arange(ROOM)
            self.arguments["cache_batch_idx"] = picked
        elif case.arrangement.isdigit():
            size = int(case.arrangement)
            table = torch.randperm(3 * ROOM // size).reshape(3, -1).int()
            shape, j = (table.numel(), size), torch.arange(ROOM)
            self.where = table[:, j // size].long() * size + j % size
            self.arguments["block_table"] = table
        if "leftpad" in case.arrangement:
            self.arguments["cache_leftpad"] = self.leftpad
        else:
            self.leftpad = torch.zeros_like(self.leftpad)
        self.caches = [normal(dtype, *shape, HEADS_K, d) for _ in "kv"]
        self.before = [cache.clone() for cache in self.caches]
        if case.added is not None:
            self.arguments |= {"k": self.new[0], "v": self.new[1]}
        if case.rotary != "none":
            self.arguments |= {"rotary_cos": self.rotary[0], "rotary_sin": self.rotary[1]}
            self.arguments["rotary_interleaved"] = case.rotary == "interleaved"
        self.arguments["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)

    def run(self) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(
            self.q, *self.caches, return_softmax_lse=True, **self.arguments
        )

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        """out, lse and the caches afterwards, computed in that dtype sequence by sequence."""
        q, (k, v) = self.q.to(dtype), (x.to(dtype) for x in self.new)
        caches = [x.to(dtype, copy=True) for x in self.before]
        flat = [x.flatten(0, 1) for x in caches]
        turns = self.case.rotary != "none"
        aligned = self.arguments.get("causal") or "window_size" in self.arguments
        outs, lses = [], []
        for b, length in enumerate(self.case.lengths):
            own_q, own_k, end = q[b], k[b], length + k.shape[1]
            if turns:
                places = length + torch.arange(q.shape[1]) * bool(aligned)
                own_q = self._turned(own_q, places)
                own_k = self._turned(own_k, torch.arange(length, end))
            rows = self.where[b]
            flat[0][rows[length:end]], flat[1][rows[length:end]] = own_k, v[b]
            seen = rows[int(self.leftpad[b]) : end]
            options = dict(OPTIONS[self.case.options])
            slopes = options.get("alibi_slopes")
            if slopes is not None and slopes.dim() == 2:
                options["alibi_slopes"] = slopes[b]
            out, lse = reference(own_q[None], flat[0][seen][None], flat[1][seen][None], **options)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses), caches

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (table[places] for table in self.rotary)
        heads_first = turned(x.transpose(0, 1), cos, sin, self.case.rotary == "interleaved")
        return heads_first.transpose(0, 1)


ARRANGEMENTS = ["rows", "picked", "leftpad", "picked leftpad", "1", "16"]
CASES = [
    *(Case(a, options=o, dtype=t) for a in ARRANGEMENTS for o in OPTIONS for t in ("f32", "bf16")),
    *(Case(a, 3, 3, r, o) for a in ARRANGEMENTS for r in ("half", "interleaved") for o in ("full", "causal", "window")),
    *(Case(a, m, s, r) for a in ARRANGEMENTS for m, s, r in ((1, None, "none"), (3, 1, "half"), (2, 5, "half"))),
    *(Case(a, 3, 3, r, "steps", t) for a in ("rows", "16") for r in ("half", "none") for t in DTYPES),
    *(Case(a, 9, None, lengths=(0, 4, 48)) for a in ("rows", "picked", "16")),
    *(Case(a, 3, None, options=o) for a in ARRANGEMENTS for o in ("window", "alibi of sequences")),
    *(Case(a, 2, 2, lengths=(0, 46, 1)) for a in ("rows", "picked", "16")),
    *(Case(a, 2, 0) for a in ("rows", "leftpad", "16")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_the_cache_afterwards(case: Case) -> None:
    call = Call(case)
    actual, lse = call.run()
    exact, eager = call.expected(torch.float64), call.expected(actual.dtype)
    numerics.check(actual, exact[0], eager[0], "out")
    numerics.check(lse, exact[1], eager[1], "lse")
    for i, name in enumerate(("k_cache", "v_cache")):
        cache, before, after = call.caches[i], call.before[i], eager[2][i]
        written = (after != before).flatten(2).any(-1)
        numerics.assert_bitwise_equal(cache[~written], before[~written], f"{name} elsewhere")
        if case.rotary == "none" or name == "v_cache":
            numerics.assert_bitwise_equal(cache, after, name)
        numerics.check(cache, exact[2][i], after, name)
        assert int(written.sum()) == 3 * (case.added or 0)


def test_token_by_token_is_causal_attention_of_all() -> None:
    """With rotary as a whole sequence has it, over a cache that is NaN where nothing was written."""
    q, k, v = (torch.randn(2, 20, h, 16) for h in (4, 2, 2))
    cos, sin = angles(32, 8)
    caches = [torch.full((2, 32, 2, 16), torch.nan) for _ in "kv"]
    steps = []
    for i in range(20):
        new = (x[:, i : i + 1] for x in (q, k, v))
        step_q, step_k, step_v = new
        steps.append(
            flash_attn_with_kvcache(
                step_q, *caches, step_k, step_v, cos, sin, cache_seqlens=i, causal=True, rotary_interleaved=False,
            )
        )  # fmt: skip
    turned_q, turned_k = (
        turned(x.transpose(1, 2), cos[:20], sin[:20], False).transpose(1, 2) for x in (q, k)
    )
    torch.testing.assert_close(
        torch.cat(steps, 1), reference(turned_q, turned_k, v, causal=True)[0]
    )


def test_lengths_by_default_and_as_an_int() -> None:
    q, cache = torch.randn(2, 3, 4, 16), torch.randn(2, 9, 2, 16)
    all_keys = flash_attn_with_kvcache(q, cache, cache, causal=True)
    torch.testing.assert_close(all_keys, reference(q, cache, cache, causal=True)[0])
    for lengths in (9, torch.tensor([9, 9]), torch.tensor([9, 9], dtype=torch.int32)):
        actual = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, causal=True)
        numerics.assert_bitwise_equal(actual, all_keys, str(lengths))
    for splits in (0, 1, 7):
        actual = flash_attn_with_kvcache(q, cache, cache, causal=True, num_splits=splits)
        numerics.assert_bitwise_equal(actual, all_keys, f"{splits} splits")
    assert all_keys.is_contiguous()


def test_it_has_no_gradient() -> None:
    """As the library's; neither does the cache get one."""
    tensors = [
        torch.randn(2, n, h, 8, requires_grad=True)
        for n, h in ((1, 2), (9, 2), (9, 2), (1, 2), (1, 2))
    ]
    with torch.no_grad():
        expected = flash_attn_with_kvcache(*(x.clone() for x in tensors), cache_seqlens=4)
    out = flash_attn_with_kvcache(*tensors, cache_seqlens=4)
    assert not out.requires_grad and torch.equal(out, expected)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_batch_of_none(arrangement: str) -> None:
    call = Call(Case(arrangement, 2, 2, options="full"))
    for name in ("k", "v", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        if name in call.arguments:
            call.arguments[name] = call.arguments[name][:0]
    if arrangement in ("rows", "leftpad"):
        call.caches = [cache[:0] for cache in call.caches]
    call.q = call.q[:0]
    out, lse = call.run()
    assert out.shape == (0, 2, 4, 24) and lse.shape == (0, 4, 2)
    for cache, before in zip(call.caches, call.before, strict=True):
        assert torch.equal(cache, before[: cache.shape[0]])


def good(**change: Any) -> dict[str, Any]:
    call = Call(Case("rows", 2, 2, "half"))
    names = ("q", "k_cache", "v_cache")
    return dict(zip(names, (call.q, *call.caches), strict=True)) | call.arguments | change


TABLE = torch.arange(9).reshape(3, 3)
THREE = torch.zeros(3, dtype=torch.int32)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": torch.zeros(3, 4, 24)}, ValueError, "q: expected 4 dimensions [B, M, Hq, D]"),
    "rows": ({"k_cache": torch.zeros(2, 48, 2, 24)}, ValueError, "k_cache: B is 2, but q has B = 3"),
    "heads": ({"q": torch.zeros(3, 2, 3, 24)}, ValueError, "k_cache: Hk is 2, but q has Hq = 3"),
    "dtype": ({"v": torch.zeros(3, 2, 2, 24).half()}, TypeError, "v: dtype torch.float16, but q has torch.float32"),
    "stride": ({"k_cache": torch.zeros(3, 48, 24, 2).mT}, ValueError, "k_cache: stride 2 in the last dimension"),
    "no v": ({"v": None}, ValueError, "v: got None, but k is given"),
    "no k": ({"k": None}, ValueError, "k: got None, but v is given"),
    "new": ({"k": torch.zeros(3, 3, 2, 24)}, ValueError, "v: S is 2, but k has S = 3"),
    "no lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens: got None, needs the lengths to append"),
    "lengths": ({"cache_seqlens": torch.zeros(2).int()}, ValueError, "cache_seqlens: expected shape (3,), got (2,)"),
    "floats": ({"cache_seqlens": torch.zeros(3)}, TypeError, "cache_seqlens: dtype torch.float32, needs"),
    "full": ({"cache_seqlens": 47}, ValueError, "cache_seqlens: got 47, needs 0 to 46, what the cache has room for"),
    "negative": ({"cache_seqlens": -1}, ValueError, "cache_seqlens: got -1, needs 0 to 46"),
    "picked": ({"cache_batch_idx": THREE + 3}, ValueError, "cache_batch_idx: got 3, needs 0 to 2, a row of the cache"),
    "picked by floats": ({"cache_batch_idx": torch.zeros(3)}, TypeError, "cache_batch_idx: dtype torch.float32"),
    "leftpad": ({"cache_leftpad": THREE + 24}, ValueError, "cache_leftpad: got -19, needs 0 to 48"),
    "leftpad shape": ({"cache_leftpad": THREE[:2]}, ValueError, "cache_leftpad: expected shape (3,), got (2,)"),
    "pages and rows": (
        {"block_table": TABLE, "cache_batch_idx": THREE}, ValueError, "cache_batch_idx: given beside block_table",
    ),
    "pages and padding": (
        {"block_table": TABLE, "cache_leftpad": THREE}, ValueError, "cache_leftpad: given beside block_table",
    ),
    "pages": ({"block_table": TABLE[:2]}, ValueError, "block_table: expected shape (3, 3), got (2, 3)"),
    "list": ({"block_table": [[0]]}, ValueError, "block_table: expected a tensor [B, pages_per_sequence]"),
    "no sin": ({"rotary_sin": None}, ValueError, "rotary_sin: got None, needs both"),
    "no cos": ({"rotary_cos": None}, ValueError, "rotary_cos: got None, needs both"),
    "rotary alone": ({"k": None, "v": None}, ValueError, "rotary_cos: given without k and v"),
    "rotary size": ({n: torch.zeros(48, 13) for n in ("rotary_cos", "rotary_sin")}, ValueError, "13 columns rotate"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits: got -1, needs an int of 0 or more"),
    "slopes": ({"alibi_slopes": torch.zeros(2, 4)}, ValueError, "alibi_slopes: expected [Hq] = (4,) or [B, Hq]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    change, error, message = WRONG[name]
    call = good(**change)
    before = call["k_cache"].clone()
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_with_kvcache(**call)
    assert torch.equal(call["k_cache"], before), "written to before it was refused"
    assert flash_attn_with_kvcache(**good()).shape == (3, 2, 4, 24)


def test_cases_differ() -> None:
    """A case whose parts had no effect would test nothing."""
    base = Case("rows", 3, 3, "half")
    outs = [
        Call(c) for c in (base, replace(base, rotary="interleaved"), replace(base, options="full"))
    ]
    for call in outs:
        call.q, call.new = outs[0].q, outs[0].new
        call.caches = [x.clone() for x in outs[0].before]
        call.arguments |= {"k": call.new[0], "v": call.new[1]}
    results = [call.run()[0] for call in outs]
    assert not torch.allclose(results[0], results[1]) and not torch.allclose(results[0], results[2])
