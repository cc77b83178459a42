"""shfl, for all lanes and for some, and lanes of a warp that have parted (PTX ISA, "shfl.sync", "bar.warp.sync")."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

import ptxemu

from .opcode_case import carry, program
from .opcode_exchange import FULL, Exchange, Results, check


def shuffles() -> Iterator[Exchange]:
    modes: dict[str, tuple[Callable[[int, int, int], int], Callable[[int, int], bool]]] = {
        "up": (lambda lane, b, low: lane - b, lambda j, limit: j >= limit),
        "down": (lambda lane, b, low: lane + b, lambda j, limit: j <= limit),
        "bfly": (lambda lane, b, low: lane ^ b, lambda j, limit: j <= limit),
        "idx": (lambda lane, b, low: low | b, lambda j, limit: j <= limit),
    }
    for mode, (source, inside) in modes.items():

        def shuffle(
            members: list[int], a: list[int], b: list[int], c: list[int], mode: str = mode,
            source: Callable[[int, int, int], int] = source, inside: Callable[[int, int], bool] = inside,
        ) -> Results:  # fmt: skip
            results: Results = {}
            for lane in members:
                clamp, segment, by = c[lane] & 31, c[lane] >> 8 & 31, b[lane] & 31
                low, limit = lane & segment, (lane & segment) | (clamp & ~segment)
                j = source(lane, by & ~segment if mode == "idx" else by, low)
                p = inside(j, limit)
                results[lane] = (a[j if p else lane], p)
            return results

        def values(
            generator: random.Random, members: list[int], mode: str = mode
        ) -> Sequence[Sequence[int]]:
            a = [generator.getrandbits(32) for _ in range(32)]
            same = generator.random() < 0.5
            edge = 0 if mode == "up" else 31
            b, c = (
                generator.getrandbits(6),
                generator.choice((edge, edge, edge | 0x1000, edge | 0x1800, edge | 0x1C00)),
            )
            clamps = [
                c if same else (generator.getrandbits(5) << 8 | generator.getrandbits(5))
                for _ in range(32)
            ]
            return a, [b if same else generator.getrandbits(7) for _ in range(32)], clamps

        yield Exchange(f"shfl.sync.{mode}.b32", "{d}|{p}, {a}, {b}, {c}, {m}", shuffle, values)
        plain = functools.partial(lambda f, *v: {lane: r[:1] for lane, r in f(*v).items()}, shuffle)
        yield Exchange(f"shfl.sync.{mode}.b32", "{d}, {a}, {b}, {c}, {m}", plain, values)


def among_members(row: Exchange) -> Exchange:
    """The same with sources that take part: another lane has nothing to give."""

    def values(generator: random.Random, members: list[int]) -> Sequence[Sequence[int]]:
        by = []
        for lane in range(32):
            source = generator.choice(members)
            if ".idx." in row.op:
                by.append(source)
            elif ".bfly." in row.op:
                by.append(lane ^ source)
            else:
                by.append(max(lane - source if ".up." in row.op else source - lane, 0))
        return (
            [generator.getrandbits(32) for _ in range(32)],
            by,
            [0 if ".up." in row.op else 31] * 32,
        )

    return row._replace(values=values)


SOME = [among_members(row) for row in shuffles()]
WHOLE = list(shuffles())


@pytest.mark.parametrize("row", SOME, ids=str)
def test_members(row: Exchange) -> None:
    check(row)


@pytest.mark.parametrize("row", WHOLE, ids=str)
def test_shuffle(row: Exchange) -> None:
    """Any distance, clamp and segment, with all lanes."""
    check(row, (FULL,))


carry(test_members, lambda: [row.ptx() for row in SOME])
carry(test_shuffle, lambda: [row.ptx() for row in WHOLE])


@program(
    """
.visible .entry test(.param .u64 out)
{
.shared .align 4 .b32 tile[32];
.reg .b64 %out; .reg .b32 %i, %v, %w, %s; .reg .pred %p;
ld.param.u64 %out, [out];
mov.u32 %i, %tid.x; mad.wide.u32 %out, %i, 4, %out;
mov.u32 %s, tile; mad.lo.u32 %s, %i, 4, %s;
mul.lo.u32 %v, %i, 3; st.shared.b32 [%s], %v;
bar.warp.sync 0xffffffff;
xor.b32 %w, %i, 9; mov.u32 %s, tile; mad.lo.u32 %s, %w, 4, %s; ld.shared.b32 %v, [%s];
setp.lt.u32 %p, %i, 16;
@%p bra LOW;
bar.warp.sync 0xffff0000;
shfl.sync.bfly.b32 %v, %v, 1, 0x1f, 0xffff0000;
bra DONE;
LOW:
shfl.sync.bfly.b32 %v, %v, 2, 0x1f, 0xffff;
DONE:
st.global.b32 [%out], %v;
ret;
}
"""
)
def test_warp_barrier_and_parted_lanes(module: ptxemu.Module) -> None:
    """Shared memory is exchanged within the warp; each half of it goes on by itself."""
    out = np.zeros(32, np.uint32)
    for seed in range(4):
        module.launch(block=32, args=[out], seed=seed).check()
        assert out.tolist() == [3 * ((i ^ (2 if i < 16 else 1)) ^ 9) for i in range(32)]
