"""decode_attention: caches in one piece and in pages, appending, every backend held to eager in float64."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from zlib import crc32

import numerics
import pytest
import torch
from cases import DTYPES, covering
from conftest import Target
from torch import Tensor

import pyfuse

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One call; capacity and lengths are in keys."""

    dtype: str = "f32"
    heads: tuple[int, int] = (4, 2)  # Hq, Hk
    m: int = 1
    head_sizes: tuple[int, int] = (64, 64)  # D, Dv
    page_size: int | None = None  # None: contiguous
    lengths: tuple[int, ...] = (300, 0, 1, 129)
    layout: str = "BHND"
    append: bool = False
    causal: bool = True
    window: int | tuple[int, int] | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    index: str = "int64"  # of seqlens_k and block_table

    def __str__(self) -> str:
        """The id in pytest: whatever is not the default."""
        words = []
        for name, default in vars(Case()).items():
            value = getattr(self, name)
            if value != default:
                text = re.sub(r"[(), ]+", "/", str(value)).strip("/")
                words.append(text if isinstance(value, str) else f"{name}{text}")
        return "-".join(words) or "plain"


@dataclass
class Call:
    """Arguments of decode_attention. The cache is NaN wherever no key lies."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        """o and lse, on a copy of the cache, which holds the appended keys afterwards."""
        for name in ("k_cache", "v_cache"):
            self.tensors[name] = copy_of(self.tensors[name])
        options = {**self.options, "return_lse": True, "backend": backend} | options
        o, lse = pyfuse.decode_attention(**self.tensors, **options)
        return o, lse

    def double(self) -> Call:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        tensors = {name: wide(x) for name, x in self.tensors.items()}
        return Call(tensors, {name: wide(x) for name, x in self.options.items()})

    def caches(self) -> tuple[Tensor, Tensor]:
        return self.tensors["k_cache"], self.tensors["v_cache"]


def copy_of(x: Tensor) -> Tensor:
    """The same numbers and strides in memory of its own."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return copy.copy_(x)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "BHND":
        return x
    if layout == "BNHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    assert layout == "wide", layout  # rows with a gap between them, of an odd size
    wide = x.new_full((*x.shape[:3], x.shape[3] + 3), NAN)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


def paged(cache: Tensor, lengths: tuple[int, ...], page_size: int, table: Tensor) -> Tensor:
    """The same keys in pages; whatever the table does not name stays NaN."""
    _, heads, _, d = cache.shape
    pages = cache.new_full((table.numel() + 2, heads, page_size, d), NAN)
    for b, length in enumerate(lengths):
        for key in range(0, length, page_size):
            end = min(key + page_size, length)
            pages[table[b, key // page_size], :, : end - key] = cache[b, :, key:end]
    return pages


def build(case: Case) -> Call:
    """The tensors of a case: a function of the case, but the same numbers for every page size."""
    seed = crc32(str(replace(case, page_size=None, append=False, layout="BHND")).encode())
    generator = torch.Generator().manual_seed(seed)
    dtype, (hq, hk), (d, dv) = DTYPES[case.dtype], case.heads, case.head_sizes
    batch, lengths = len(case.lengths), case.lengths
    page_size = case.page_size or max(*lengths, 1) + 5
    width = -(-max(lengths) // page_size) + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"q": normal(batch, case.m, hq, d).transpose(1, 2)}
    options: dict[str, Any] = {"causal": case.causal, "window": case.window}
    options |= {"softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.randn(hq, generator=generator)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, hq + 1)
    integer = {"int32": torch.int32, "int64": torch.int64}[case.index]
    options["seqlens_k"] = torch.tensor(lengths, dtype=integer)
    table = torch.arange(batch * width)
    if case.page_size is not None:
        table = torch.tensor(random.Random(seed).sample(range(batch * width + 2), batch * width))
    table = table.reshape(batch, width)
    for name, size in (("k", d), ("v", dv)):
        cache = normal(batch, hk, max(*lengths, 1), size)
        new = normal(batch, case.m, hk, size).transpose(1, 2)
        for b, length in enumerate(lengths):
            last = slice(max(length - case.m, 0), length)
            new[b, :, : case.m - (last.stop - last.start)] = NAN
            new[b, :, case.m - (last.stop - last.start) :] = cache[b, :, last]
            if case.append:
                cache[b, :, last] = NAN
            cache[b, :, length:] = NAN
        if case.page_size is not None:
            cache = paged(cache, lengths, page_size, table)
        else:
            cache = torch.nn.functional.pad(cache, (0, 0, 0, 5), value=NAN)
        tensors[f"{name}_cache"] = laid_out(cache, case.layout)
        if case.append:
            tensors[f"{name}_new"] = new
    if case.page_size is not None:
        used = torch.arange(width) * page_size < options["seqlens_k"][:, None]
        options["block_table"] = torch.where(used, table, 10**6).to(integer)
    return Call(tensors, options)


FACTORS: dict[str, Any] = {
    "dtype": tuple(DTYPES),
    "heads": ((4, 4), (4, 2), (9, 3), (6, 1), (20, 1)),
    "m": (1, 2, 5, 16),
    "head_sizes": ((64, 64), (128, 128), (40, 33), (65, 96), (1, 1), (80, 80), (256, 32)),
    "page_size": (None, 1, 7, 16, 48, 128),
    "lengths": ((300, 0, 1, 129), (257, 255), (16,), (63, 64, 65), (700,)),
    "layout": ("BHND", "BNHD", "wide"),
    "causal": (True, False),
    "window": (None, 1, 16, (7, 9), (-1, 4), (300, -1)),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "alibi": (False, True),
    "index": ("int32", "int64"),
}
CASES: list[Case] = covering(3, FACTORS, Case)
APPENDED = [
    replace(case, append=True) for case in CASES if min(case.lengths) >= case.m
]  # seqlens_k counts what is appended


@cache
def by_eager(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(in float64, in its own dtype) of o and of lse: the same for every target."""
    return list(zip(build(case).double().run("eager"), build(case).run("eager"), strict=True))


def check_values(target: Target, case: Case) -> Tensor:
    results = build(case).run(target.backend)
    for name, actual, (exact, eager) in zip(("o", "lse"), results, by_eager(case), strict=True):
        numerics.check(actual, exact, eager, name)
    return results[0]


@pytest.mark.parametrize("case", CASES + APPENDED, ids=str)
def test_values(target: Target, case: Case) -> None:
    o = check_values(target, case)
    assert o.transpose(1, 2).is_contiguous()  # in q's memory order


PAGES = (1, 2, 3, 16, 17, 32, 64, 128, 256, 1000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_pages_change_no_bit(target: Target, dtype: str, m: int) -> None:
    case = Case(dtype=dtype, m=m, lengths=(600, 5, 0, 256), head_sizes=(72, 48))
    expected = build(case).run(target.backend)
    for page_size in PAGES:
        actual = build(replace(case, page_size=page_size)).run(target.backend)
        for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
            numerics.assert_bitwise_equal(x, y, f"{name}, pages of {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("page_size", [None, 1, 7, 64])
def test_append_is_copy_then_attend(
    target: Target, dtype: str, window: int | None, page_size: int | None
) -> None:
    for m in (1, 5):
        case = Case(dtype, m=m, page_size=page_size, window=window, lengths=(300, m, 257, 66))
        there, given = build(case), build(replace(case, append=True, layout="BNHD"))
        expected, actual = there.run(target.backend), given.run(target.backend)
        for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
            numerics.assert_bitwise_equal(x, y, name)
        for x, y in zip(given.caches(), there.caches(), strict=True):
            numerics.assert_bitwise_equal(x, y, "the cache afterwards")


def test_a_cache_that_is_appended_to_again_and_again(target: Target) -> None:
    """Token by token from nothing, as generation does it, is causal attention of all at once."""
    q, k, v = (torch.randn(2, heads, 70, 16) for heads in (4, 2, 2))
    k_cache, v_cache = torch.full((12, 2, 8, 16), NAN), torch.full((12, 2, 8, 16), NAN)
    table = torch.tensor([[3, 1, 4, 0, 5, 2, 6, 7, 8], [9, 10, 11, 0, 0, 0, 0, 0, 0]])
    steps = []
    for i in range(70):
        now = slice(i, i + 1)
        # The second sequence stops at 24 keys: it has three pages.
        lengths = torch.tensor([i + 1, min(i + 1, 24)])
        last = [now, slice(int(lengths[1]) - 1, int(lengths[1]))]
        new = [torch.stack([x[b, :, last[b]] for b in (0, 1)]) for x in (q, k, v)]
        steps.append(
            pyfuse.decode_attention(
                new[0], k_cache, v_cache, seqlens_k=lengths, block_table=table,
                k_new=new[1], v_new=new[2], backend=target.backend,
            )
        )  # fmt: skip
    expected = pyfuse.attention(q, k, v, causal=True, backend="eager")
    torch.testing.assert_close(torch.cat(steps, 2)[0], expected[0])
    torch.testing.assert_close(torch.cat(steps, 2)[1, :, :24], expected[1, :, :24])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_halves_of_the_keys_merge(target: Target, dtype: str) -> None:
    call = build(Case(dtype, lengths=(700, 700), causal=False, sinks=False))
    q, (k, v) = call.tensors["q"], call.caches()
    whole, lse = call.run(target.backend)
    parts = []
    for lo, hi in ((0, 333), (333, 700)):
        lengths = torch.tensor([hi - lo] * 2)
        half = Call({"q": q, "k_cache": k[:, :, lo:hi], "v_cache": v[:, :, lo:hi]}, {})
        parts.append(half.run(target.backend, seqlens_k=lengths, causal=False))
    both = torch.stack([part[1] for part in parts])
    torch.testing.assert_close(both.logsumexp(0), lse)
    weights = (both - lse).exp()[..., None]
    merged = sum(w * part[0].float() for w, part in zip(weights, parts, strict=True))
    ulps = 4 + lse.abs().max().item()  # that lse is rounded makes the weights wrong by its ulp
    atol = ulps * torch.finfo(whole.dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(merged, whole.float(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_does_not_depend_on_its_neighbours(target: Target, dtype: str) -> None:
    """Nor on other sequences and heads: what is sampled must not change with the batch."""
    call = build(Case(dtype, m=5, heads=(6, 2), lengths=(600, 17, 301)))
    expected, _ = call.run(target.backend)
    for b, hk in ((0, 1), (2, 0)):
        one = {name: x[b : b + 1] for name, x in call.tensors.items()}
        one = {name: x[:, hk : hk + 1] for name, x in one.items() if name != "q"} | {
            "q": one["q"][:, 3 * hk + 1 : 3 * hk + 2, -1:]
        }
        lengths = call.options["seqlens_k"][b : b + 1]
        alone, _ = Call(one, {}).run(target.backend, seqlens_k=lengths)
        numerics.assert_bitwise_equal(
            alone, expected[b : b + 1, 3 * hk + 1 : 3 * hk + 2, -1:], f"sequence {b}"
        )


@pytest.fixture
def restore_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


STEADY = [
    Case(lengths=(1500, 3, 700), heads=(6, 2)),
    Case("bf16", m=3, lengths=(1500,), heads=(3, 1), page_size=16),
    Case("f16", m=2, lengths=(513, 0, 900), window=300, page_size=7, append=False),
    Case("bf16", lengths=(700, 1, 256), heads=(32, 32), append=True),
]


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", STEADY, ids=str)
def test_same_bits_for_every_thread_count_and_run(target: Target, case: Case) -> None:
    torch.set_num_threads(1)
    expected = build(case).run(target.backend)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(3):
            actual = build(case).run(target.backend)
            for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
                numerics.assert_bitwise_equal(x, y, f"{name}, {threads} threads")


@pytest.mark.parametrize("page_size", [None, 16])
def test_more_queries_than_one_pass_takes(target: Target, page_size: int | None) -> None:
    for heads, m in (((8, 2), 100), ((96, 1), 3)):
        lengths = (130, 300)
        case = Case(heads=heads, m=m, lengths=lengths, page_size=page_size, window=(90, 0))
        check_values(target, case)


# What is never read -------------------------------------------------------------------------------


def test_pages_before_the_window_may_be_gone(target: Target) -> None:
    case = Case(lengths=(200, 90), page_size=16, window=20, m=2)
    call = build(case)
    expected = call.run(target.backend)
    table = call.options["block_table"]
    for b, length in enumerate(case.lengths):
        gone = (length - 2 - 19) // 16  # whole pages that no query sees
        for entry in table[b, :gone]:
            for pages in call.caches():
                pages[entry] = NAN
        table[b, :gone] = -1
    for x, y in zip(call.run(target.backend), expected, strict=True):
        numerics.assert_bitwise_equal(x, y, "with the pages before the window gone")


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_key_in_the_midst(target: Target, dtype: str, bad: float) -> None:
    """Keys that some queries see and others do not: the others keep every bit."""
    call = build(Case(dtype, m=4, lengths=(300, 70)))
    expected, _ = call.run(target.backend)
    k, v = call.caches()
    for b, last in ((0, 299), (1, 69)):
        k[b, :, last], v[b, :, last] = bad, bad
    actual, _ = call.run(target.backend)
    numerics.assert_bitwise_equal(actual[:, :, :3], expected[:, :, :3], "queries before that key")
    if bad != bad:
        assert actual[:, :, 3].isnan().all()


def test_explain_writes_nothing(target: Target) -> None:
    call = build(Case(append=True, lengths=(5, 9)))
    before = [x.clone() for x in call.caches()]
    pyfuse.explain("decode_attention", **call.tensors, **call.options, backend=target.backend)
    for x, y in zip(call.caches(), before, strict=True):
        numerics.assert_bitwise_equal(x, y, "the cache")


# Sizes of zero, refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("batch, m, n", [(0, 2, 7), (2, 0, 7), (2, 3, 0), (0, 0, 0)])
def test_sizes_of_zero(target: Target, batch: int, m: int, n: int, paged: bool) -> None:
    for heads in ((4, 2), (0, 0)):
        q = torch.randn(batch, heads[0], m, 8)
        k, v = torch.randn(batch, heads[1], n, 8), torch.randn(batch, heads[1], n, 6)
        options: dict[str, Any] = {"seqlens_k": torch.zeros(batch, dtype=torch.int64)}
        if paged:
            options["block_table"] = torch.zeros((batch, 3), dtype=torch.int32)
        o, lse = pyfuse.decode_attention(
            q, k, v, **options, return_lse=True, backend=target.backend
        )
        assert o.shape == (batch, heads[0], m, 6) and (o == 0).all()
        assert lse.shape == (batch, heads[0], m) and (lse == -float("inf")).all()


def appending(**change: Any) -> dict[str, Any]:
    """A good call of two sequences that appends three tokens; then changed."""
    good = {
        "q": torch.randn(2, 4, 3, 8),
        "k_cache": torch.randn(2, 2, 7, 8),
        "v_cache": torch.randn(2, 2, 7, 6),
        "k_new": torch.randn(2, 2, 3, 8),
        "v_new": torch.randn(2, 2, 3, 6),
        "seqlens_k": torch.tensor([3, 7]),
    }
    return good | change


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no v_new": ({"v_new": None}, ValueError, "v_new: got None, but k_new is given"),
    "no k_new": ({"k_new": None}, ValueError, "k_new: got None, but v_new is given"),
    "rows": ({"k_new": torch.zeros(2, 2, 2, 8)}, ValueError, "k_new: M is 2, but q has M = 3"),
    "heads": ({"v_new": torch.zeros(2, 4, 3, 6)}, ValueError, "v_new: Hk is 4, but k_cache has"),
    "size": ({"v_new": torch.zeros(2, 2, 3, 8)}, ValueError, "v_new: Dv is 8, but v_cache has"),
    "rank": ({"k_new": torch.zeros(2, 2, 8)}, ValueError, "k_new: expected 4 dimensions"),
    "list": ({"k_new": [1.0]}, TypeError, "k_new: expected a torch.Tensor, got list"),
    "dtype": (
        {"k_new": torch.zeros(2, 2, 3, 8, dtype=torch.bfloat16)},
        TypeError,
        "k_new: dtype torch.bfloat16, but q has torch.float32",
    ),
    "stride": (
        {"v_new": torch.zeros(2, 2, 6, 3).transpose(2, 3)},
        ValueError,
        "v_new: stride 3 in the last dimension",
    ),
    "too short": (
        {"seqlens_k": torch.tensor([2, 7])},
        ValueError,
        "seqlens_k: a sequence has 2 keys, needs 3 or more, the 3 of k_new included",
    ),
    "expanded": (
        {"v_cache": torch.zeros(2, 1, 7, 6).expand(2, 2, 7, 6)},
        ValueError,
        "v_cache: strides (42, 0, 6, 1) share memory between elements",
    ),
    "gradient of the cache": (
        {"k_cache": torch.zeros(2, 2, 7, 8, requires_grad=True)},
        ValueError,
        "k_cache: requires grad, but appending",
    ),
    "gradient of what is new": (
        {"v_new": torch.zeros(2, 2, 3, 6, requires_grad=True)},
        ValueError,
        "v_new: requires grad, but appending",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_appended(backend: str, name: str) -> None:
    change, error, message = WRONG[name]
    call = appending(**change)
    before = call["k_cache"].detach().clone()
    with pytest.raises(error, match=re.escape(message)):
        pyfuse.decode_attention(**call, backend=backend)
    assert torch.equal(call["k_cache"], before), "written to before it was refused"
    assert pyfuse.decode_attention(**appending(), backend=backend).shape == (2, 4, 3, 6)


def test_gradients_beside_an_append() -> None:
    """q has one; a graph that needs what was overwritten notices it."""
    call = appending(q=torch.randn(2, 4, 3, 8, requires_grad=True))
    pyfuse.decode_attention(**call).sum().backward()
    assert call["q"].grad.isfinite().all() and call["q"].grad.any()
    weight = torch.ones(8, requires_grad=True)
    call = appending()
    loss = (call["k_cache"] * weight).sum()
    pyfuse.decode_attention(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    call = appending(k_cache=torch.zeros(2, 2, 7, 8, requires_grad=True))
    with torch.no_grad():
        pyfuse.decode_attention(**call)
    assert torch.equal(call["k_cache"][:, :, :3][0], call["k_new"][0])


def test_an_entry_that_is_no_page(target: Target) -> None:
    if target.backend != "cpu":
        pytest.skip("only where the table can be read without a sync")
    for entry in (-1, 4):
        call = build(Case(page_size=16, lengths=(20, 40), append=True))
        call.options["block_table"][1, 2] = entry
        pages = call.tensors["k_cache"].shape[0]
        entry = pages if entry > 0 else entry
        call.options["block_table"][1, 2] = entry
        with pytest.raises(
            ValueError, match=rf"block_table: entry \[1, 2\] is {entry}, .* {pages}"
        ):
            call.run(target.backend)


def test_appending_compiles_as_one_graph() -> None:
    compiled = torch.compile(pyfuse.decode_attention, fullgraph=True, backend="aot_eager")
    call, other = appending(), appending()
    for name in call:
        other[name] = call[name].clone()
    torch.testing.assert_close(compiled(**call), pyfuse.decode_attention(**other))
    assert torch.equal(call["k_cache"], other["k_cache"])
    assert torch.equal(call["v_cache"], other["v_cache"])
