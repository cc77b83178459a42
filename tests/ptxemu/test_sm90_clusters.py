"""Clusters: who is where, other blocks' shared memory, and barriers of all of a cluster's threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptxemu import PtxError, sm90
from ptxemu.checkers import Result, words

SEEDS = range(4)
ARRIVE, WAIT = "barrier.cluster.arrive.aligned;\n", "barrier.cluster.wait.aligned;\n"
SYNC = ARRIVE + WAIT
# y[32 block + lane] = r2
OUT = """
mad.lo.u32 r1, block, 32, lane;
mul.wide.u32 d0, r1, 4;
add.s64 d0, y, d0;
st.global.u32 [d0], r2;
"""


def each_seed(body: str, size: int = 4, max_instructions: int = 1_000_000) -> list[Result]:
    """One cluster of `size` blocks of 32 threads."""
    return [
        sm90.run(
            body,
            y=words(32 * size),
            grid=size,
            cluster=size,
            seed=seed,
            max_instructions=max_instructions,
        )
        for seed in SEEDS
    ]


def of_blocks(*values: int) -> torch.Tensor:
    """What y holds if all threads of a block write the same."""
    return torch.tensor(values, dtype=torch.int32)[:, None].expand(-1, 32).flatten()


PLACES = ("ctaid", "cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid")
NAMES = [f"%{name}.{axis}" for name in PLACES for axis in "xyz"]
NAMES += ["%cluster_ctarank", "%cluster_nctarank"]


@pytest.mark.parametrize(
    ("grid", "cluster"),
    [
        ((6, 1, 1), (2, 1, 1)),
        ((6, 1, 1), (1, 1, 1)),
        ((4, 6, 1), (2, 3, 1)),
        ((2, 4, 6), (1, 2, 2)),
    ],
)
def test_special_registers(grid: tuple[int, int, int], cluster: tuple[int, int, int]) -> None:
    moves = "".join(f"mov.u32 r{i}, {name};\n" for i, name in enumerate(NAMES, 10))
    stores = "".join(f"st.global.u32 [d0+{4 * i}], r{i + 10};\n" for i in range(len(NAMES)))
    body = f"""{moves}
    mov.u32 r1, %nctaid.x;
    mov.u32 r2, %nctaid.y;
    mad.lo.u32 r3, r2, r12, r11;
    mad.lo.u32 r3, r1, r3, r10;
    mul.wide.u32 d0, r3, {4 * len(NAMES)};
    add.s64 d0, y, d0;
    {stores}"""
    blocks = int(np.prod(grid))
    y = words(blocks * len(NAMES))
    rows = sm90.run(body, y=y, block=1, grid=grid, cluster=cluster).clean().y.view(blocks, -1)
    places = itertools.product(*map(range, reversed(grid)))
    for row, place in zip(rows.tolist(), places, strict=True):
        at = place[::-1]
        inside = [a % c for a, c in zip(at, cluster, strict=True)]
        rank = inside[0] + cluster[0] * (inside[1] + cluster[1] * inside[2])
        which = [a // c for a, c in zip(at, cluster, strict=True)]
        count = [g // c for g, c in zip(grid, cluster, strict=True)]
        assert row == [*at, *inside, *cluster, *which, *count, rank, int(np.prod(cluster))]


# ---- addresses: of the buffer of block r4 in r5 or q1, whose rank is then r6

ADDRESSES = {
    "u32": "mov.u32 r0, buffer;\nmapa.shared::cluster.u32 r5, r0, r4;\ngetctarank.shared::cluster.u32 r6, r5;\n",
    "symbol": "mapa.shared::cluster.u32 r5, buffer, r4;\ngetctarank.shared::cluster.u32 r6, r5;\n",
    "u64": "mov.u64 q0, buffer;\nmapa.shared::cluster.u64 q1, q0, r4;\ngetctarank.shared::cluster.u64 r6, q1;\n",
    "generic": "mov.u64 q0, buffer;\ncvta.shared.u64 q0, q0;\nmapa.u64 q1, q0, r4;\ngetctarank.u64 r6, q1;\n",
}  # fmt: skip
SPACE = {
    "u32": ".shared::cluster",
    "symbol": ".shared::cluster",
    "u64": ".shared::cluster",
    "generic": "",
}
REGISTER = {"u32": "r5", "symbol": "r5", "u64": "q1", "generic": "q1"}
NEXT = "add.u32 r4, rank, 1;\nmov.u32 r3, %cluster_nctarank;\nrem.u32 r4, r4, r3;\n"
RANK = "st.shared.u32 [own], rank; // other\n"


@pytest.mark.parametrize("form", ADDRESSES)
def test_loads_from_another_block(form: str) -> None:
    body = f"""{RANK}{NEXT}{SYNC}{ADDRESSES[form]}
    ld{SPACE[form]}.u32 r2, [{REGISTER[form]}];
    mad.lo.u32 r2, r6, 100, r2;
    {OUT}{SYNC}"""
    for size in (2, 4):
        for result in each_seed(body, size):
            expected = of_blocks(*(101 * ((b + 1) % size) for b in range(size)))
            assert torch.equal(result.clean().y, expected)


@pytest.mark.parametrize("form", ADDRESSES)
def test_stores_and_atomics_to_another_block(form: str) -> None:
    """Each lane stores to its place in the next block, then all add to the first word of block 0."""
    if REGISTER[form] == "r5":
        place, offset = "r7", "mad.lo.u32 r7, lane, 4, r5;"
    else:
        place, offset = "q2", "mul.wide.u32 d1, lane, 4;\nadd.u64 q2, q1, d1;"
    body = f"""{NEXT}{ADDRESSES[form]}{offset}
    st{SPACE[form]}.u32 [{place}], rank;
    {SYNC}
    mov.u32 r4, 0;
    {ADDRESSES[form]}
    atom{SPACE[form]}.add.u32 r8, [{REGISTER[form]}], 1000;
    {SYNC}
    ld.shared.u32 r2, [own];
    {OUT}"""
    expected = of_blocks(3, 0, 1, 2)
    expected[0] += 1000 * 4 * 32
    for result in each_seed(body):
        assert torch.equal(result.clean().y, expected)


def test_own_addresses() -> None:
    """An address that mapa did not make is of the block itself; mapa of the own rank is the same place."""
    body = f"""{RANK}
    mov.u32 r0, buffer;
    bar.warp.sync -1;
    mapa.shared::cluster.u32 r5, r0, rank;
    getctarank.shared::cluster.u32 r6, r0;
    ld.shared::cluster.u32 r2, [r0];
    ld.shared::cluster.u32 r3, [r5];
    mad.lo.u32 r2, r2, 10, r3;
    mad.lo.u32 r2, r6, 100, r2;
    {OUT}"""
    for result in each_seed(body):
        assert torch.equal(result.clean().y, of_blocks(0, 111, 222, 333))


def test_blocks_that_are_not_there() -> None:
    for size in (1, 2):
        body = f"mapa.shared::cluster.u32 r5, bars, {size}; // here"
        result = sm90.run(body, grid=size, cluster=size)
        result.only("invalid", f"block {size} of a cluster of {size}")


# ---- barrier.cluster

READ = "ld.shared::cluster.u32 r2, [r5]; // here\n"


def test_missing_barrier() -> None:
    """Whether the write comes first or the read."""
    after = NEXT + ADDRESSES["u32"] + READ + OUT
    for result in each_seed(RANK + SYNC + after + SYNC):
        result.clean()
    for before, end in (("", SYNC), ("bar.sync 0;\n", SYNC), (ARRIVE, WAIT)):
        for result in each_seed(RANK + before + after + end):
            races = {f.line for f in result.report.findings if f.kind == "race"}
            assert races and races <= {result.line("here"), result.line("other")}


def test_what_comes_between_arrive_and_wait_is_not_ordered() -> None:
    after = NEXT + ADDRESSES["u32"] + READ + SYNC
    for result in each_seed(RANK + ARRIVE + WAIT + after):
        result.clean()
    for result in each_seed(ARRIVE + RANK + WAIT + after):
        assert result.report.kinds() == {"race"}


def test_many_phases() -> None:
    """A value goes round the cluster: each turn every block takes its neighbour's and adds 10."""
    body = f"""{RANK}{NEXT}{ADDRESSES["u32"]}
    mad.lo.u32 r7, lane, 4, r5;
    mov.u32 r9, 0;
    LOOP:
    {SYNC}
    ld.shared::cluster.u32 r2, [r7];
    add.u32 r2, r2, 10;
    BARRIER
    st.shared.u32 [own], r2;
    add.u32 r9, r9, 1;
    setp.lt.u32 p1, r9, 9;
    @p1 bra LOOP;
    {OUT}"""
    for result in each_seed(body.replace("BARRIER", SYNC)):
        assert torch.equal(result.clean().y, of_blocks(*(90 + (b + 9) % 4 for b in range(4))))
    for result in each_seed(body.replace("BARRIER", "")):
        assert "race" in result.report.kinds()


def test_deadlock_of_a_block_that_does_not_arrive() -> None:
    """Block 1 runs for ever."""
    body = f"setp.eq.u32 p1, rank, 1;\nLOOP:\n@p1 bra LOOP;\n{SYNC}"
    for result in each_seed(body, 2, max_instructions=10_000):
        (finding,) = result.report.findings
        assert finding.kind == "deadlock" and "block (1, 0, 0)" in finding.message


@pytest.mark.parametrize(
    "instruction",
    [
        "mapa.shared::cluster.u16 h0, h0, r1",
        "mapa.u64 q0, q0",
        "getctarank.u64 q0, q0",
        "barrier.cluster.sync",
    ],
)
def test_refused(instruction: str) -> None:
    with pytest.raises(PtxError):
        sm90.load(sm90.ptx(instruction + ";"))
