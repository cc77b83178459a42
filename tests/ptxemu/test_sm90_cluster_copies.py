"""mbarriers of other blocks of a cluster, and copies into their shared memory."""

from __future__ import annotations

import pytest
import torch

from ptxemu import sm90
from ptxemu.checkers import words
from ptxemu.sm90 import BUFFER, END, bulk_load, bulk_store, init, wait
from ptxemu.test_sm90_clusters import NEXT, OUT, SEEDS, SYNC, each_seed


@pytest.mark.parametrize("size", [2, 4])
def test_arrivals_from_other_blocks(size: int) -> None:
    """Block 0 waits for a thread of every block, after which it sees what each stored with it."""
    sums = "".join(
        f"ld.shared.u32 r3, [own+{128 * b}];\nadd.u32 r2, r2, r3;\n" for b in range(size)
    )
    body = f"""{init(32 * size)}{SYNC}{BUFFER}
    mov.u32 r4, 0;
    mapa.shared::cluster.u32 r5, r0, r4;
    mapa.shared::cluster.u32 r6, bars, r4;
    mad.lo.u32 r7, rank, 128, r5;
    mad.lo.u32 r7, lane, 4, r7;
    add.u32 r8, rank, 5;
    st.shared::cluster.u32 [r7], r8;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r6];
    mov.u32 r2, 0;
    setp.ne.u32 p1, rank, 0;
    @p1 bra END;
    WAIT
    {sums}
    END:
    {OUT}{SYNC}"""
    for result in each_seed(body.replace("WAIT", wait()), size):
        assert result.clean().y[0] == sum(range(5, 5 + size))
    found = [result.report.kinds() for result in each_seed(body.replace("WAIT", ""), size)]
    assert set().union(*found) & {"race", "uninitialised"}


# r6, q1: the mbarriers of the other block of two
OTHER = f"""{init(1)}{SYNC}
xor.b32 r4, rank, 1;
mapa.shared::cluster.u32 r6, bars, r4;
cvt.u64.u32 q0, bars;
cvta.shared.u64 q0, q0;
mapa.u64 q1, q0, r4;
"""


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("mbarrier.test_wait.parity.b64 p1, [q1], 0", "not in the block's own shared memory"),
        ("mbarrier.init.b64 [q1], 1", "not in the block's own shared memory"),
        ("mbarrier.inval.b64 [q1]", "not in the block's own shared memory"),
        ("mbarrier.arrive.b64 q2, [q1]", "not in the block's own shared memory"),
        ("mbarrier.arrive.shared::cluster.b64 _, [r6+8]", "no mbarrier was initialised"),
    ],
)
def test_what_other_blocks_barriers_do_not_do(instruction: str, message: str) -> None:
    for result in each_seed(f"{OTHER}@first {instruction}; // here\n{SYNC}", 2):
        result.only("invalid", message)


def test_arrivals_without_a_state_and_by_generic_address() -> None:
    for instruction in (
        "mbarrier.arrive.b64 _, [q1]",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r6], 1",
        "mbarrier.arrive_drop.shared::cluster.b64 _, [r6]",
        "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [r6], 8;\n"
        "@first mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [r6], 8;\n"
        "@first mbarrier.arrive.expect_tx.shared::cluster.b64 _, [r6], 0",
    ):
        for result in each_seed(f"{OTHER}@first {instruction};\n{wait()}{SYNC}", 2):
            result.clean()


def test_barrier_of_a_block_that_has_exited() -> None:
    """The block is gone by chance when the arrival comes: some seed shows it."""
    body = f"""{OTHER}
    setp.eq.u32 p1, rank, 1;
    @p1 bra END;
    mov.u32 r9, 0;
    LATE:
    add.u32 r9, r9, 1;
    setp.lt.u32 p2, r9, 200;
    @p2 bra LATE;
    @first mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r6]; // here
    END:
    """
    for result in each_seed(body + SYNC, 2):
        result.clean()
    for seed in range(30):
        result = sm90.run(body, grid=2, cluster=2, seed=seed)
        if result.report.findings:
            (finding,) = result.report.findings
            assert finding.line == result.line("here") and "has exited" in finding.message
            return
    pytest.fail("no seed lets the block exit first")


def test_copies_into_another_block() -> None:
    """The copy and its barrier are in one block, whoever starts it."""
    body = f"""{init(1)}
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 128;
    {SYNC}{NEXT}{BUFFER}
    mapa.shared::cluster.u32 r5, r0, r4;
    mapa.shared::cluster.u32 r6, bars, r4;
    mul.wide.u32 d1, rank, 128;
    add.s64 d1, x, d1;
    {bulk_load(128, "r5", "d1", " // here").replace("[bars]", "[r6]")}
    {wait()}
    ld.shared.u32 r2, [own];
    {OUT}{SYNC}"""
    x = torch.arange(64, dtype=torch.int32)
    for seed in SEEDS:
        result = sm90.run(body, x, words(64), grid=2, cluster=2, seed=seed)
        assert torch.equal(result.clean().y, x.view(2, 32).flip(0).flatten())
        wrong = body.replace("128, [r6]", "128, [bars]")
        result = sm90.run(wrong, x, words(64), grid=2, cluster=2, seed=seed)
        result.first("invalid", "the mbarrier is in another block than the data")


def test_stores_come_from_the_own_block() -> None:
    body = f"""{SYNC}{NEXT}{BUFFER}
    mapa.shared::cluster.u32 r5, r0, r4;
    {bulk_store(128, of="r5", mark=" // here")}{END}{SYNC}"""
    for result in each_seed(body, 2):
        result.only("invalid", "copies from the block's own shared memory only")
