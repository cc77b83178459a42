"""Exchange between the lanes of a warp, all of them and some (PTX ISA: vote, match, redux, elect, activemask)."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from .opcode_case import carry
from .opcode_exchange import FULL, Exchange, Reference, Results, check
from .opcode_formats import F32
from .opcode_reference import chosen


def to_all(result: Callable[..., int]) -> Reference:
    """The same number in every member."""
    return lambda members, *sources: dict.fromkeys(members, (result(members, *sources),))


def to_predicate(result: Callable[..., bool]) -> Reference:
    return lambda members, *sources: dict.fromkeys(members, (None, result(members, *sources)))


def bits(generator: random.Random, members: list[int]) -> Sequence[Sequence[int]]:
    """Mostly random; all and none often enough."""
    kind = generator.randrange(4)
    return ([kind if kind < 2 else generator.getrandbits(32) for _ in range(32)],)


def votes() -> Iterator[Exchange]:
    for negated, flip in (("", 0), ("!", 1)):

        def truths(members: list[int], a: list[int], flip: int = flip) -> list[bool]:
            return [bool((a[lane] & 1) ^ flip) for lane in members]

        form = f"{{p}}, {negated}{{q}}, {{m}}"
        yield Exchange(
            "vote.sync.all.pred", form, to_predicate(lambda m, a, t=truths: all(t(m, a))), bits
        )
        yield Exchange(
            "vote.sync.any.pred", form, to_predicate(lambda m, a, t=truths: any(t(m, a))), bits
        )
        yield Exchange(
            "vote.sync.uni.pred",
            form,
            to_predicate(lambda m, a, t=truths: len(set(t(m, a))) == 1),
            bits,
        )
        yield Exchange("vote.sync.ballot.b32", f"{{d}}, {negated}{{q}}, {{m}}",
                       to_all(lambda m, a, t=truths: sum(v << lane for lane, v in zip(m, t(m, a), strict=True))),
                       bits)  # fmt: skip


def matches() -> Iterator[Exchange]:
    for n in (32, 64):

        def values(
            generator: random.Random, members: list[int], n: int = n
        ) -> Sequence[Sequence[int]]:
            some = [generator.getrandbits(n) for _ in range(generator.choice((1, 1, 2, 5, 32)))]
            return ([generator.choice(some) for _ in range(32)],)

        def anyone(members: list[int], a: list[int]) -> Results:
            return {
                lane: (sum(1 << other for other in members if a[other] == a[lane]),)
                for lane in members
            }

        def everyone(members: list[int], a: list[int]) -> Results:
            same = len({a[lane] for lane in members}) == 1
            return dict.fromkeys(members, (sum(1 << lane for lane in members) * same, same))

        yield Exchange(f"match.any.sync.b{n}", "{d}, {a}, {m}", anyone, values, n)
        yield Exchange(f"match.all.sync.b{n}", "{d}|{p}, {a}, {m}", everyone, values, n)
        yield Exchange(f"match.all.sync.b{n}", "{d}, {a}, {m}",
                       lambda *v, f=everyone: {lane: r[:1] for lane, r in f(*v).items()}, values, n)  # fmt: skip


def reductions() -> Iterator[Exchange]:
    def signed(v: int) -> int:
        return v - (1 << 32) if v >> 31 else v

    def words(generator: random.Random, members: list[int]) -> Sequence[Sequence[int]]:
        return (
            [
                generator.choice((generator.getrandbits(32), generator.getrandbits(5)))
                for _ in range(32)
            ],
        )

    def floats(generator: random.Random, members: list[int]) -> Sequence[Sequence[int]]:
        edges = (
            0,
            1 << 31,
            1,
            F32.infinity,
            F32.infinity | F32.sign,
            F32.nan,
            0xFFC00000,
            0x7F800001,
            0x3F800000,
        )
        wild = generator.random() < 0.5
        return (
            [generator.choice(edges) if wild else generator.getrandbits(30) for _ in range(32)],
        )

    def over(f: Callable[[int, int], int], decode: Callable[[int], int] = lambda v: v) -> Reference:
        return to_all(lambda members, a: functools.reduce(f, (decode(a[lane]) for lane in members)))

    for t, decode in (("u32", lambda v: v), ("s32", signed)):
        yield Exchange(
            f"redux.sync.add.{t}", "{d}, {a}, {m}", over(lambda x, y: x + y, decode), words
        )
        yield Exchange(f"redux.sync.min.{t}", "{d}, {a}, {m}", over(min, decode), words)
        yield Exchange(f"redux.sync.max.{t}", "{d}, {a}, {m}", over(max, decode), words)
    for name, f in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        yield Exchange(f"redux.sync.{name}.b32", "{d}, {a}, {m}", over(f), words)
    for name in ("min", "max"):
        for absolute in ("", ".abs"):
            for nan in ("", ".NaN"):
                size = (1 << 31) - 1 if absolute else FULL
                yield Exchange(f"redux.sync.{name}{absolute}{nan}.f32", "{d}, {a}, {m}",
                               to_all(lambda m, a, n=name, k=bool(nan), z=size:
                                      chosen(n, F32, k, *(a[i] & z for i in m))),
                               floats, target="sm_100a")  # fmt: skip


def elections() -> Iterator[Exchange]:
    def elect(members: list[int], a: list[int]) -> Results:
        return {lane: (members[0], lane == members[0]) for lane in members}

    yield Exchange("elect.sync", "{d}|{p}, {m}", elect, bits)
    yield Exchange("activemask.b32", "{d}", to_all(lambda m, a: sum(1 << lane for lane in m)), bits)


ROWS = [*votes(), *matches(), *reductions(), *elections()]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_members(row: Exchange) -> None:
    check(row)


carry(test_members, lambda: [row.ptx() for row in ROWS])
