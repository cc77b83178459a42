"""Clusters: blocks and warps that exit, and barriers and addresses that are used wrongly."""

from __future__ import annotations

import pytest

from ptxemu import sm90
from ptxemu.sm90 import BUFFER
from ptxemu.test_sm90_clusters import (
    ADDRESSES,
    ARRIVE,
    NEXT,
    OUT,
    RANK,
    READ,
    SYNC,
    WAIT,
    each_seed,
)

HERE = " // here"


@pytest.mark.parametrize("who", ["warp, 1", "rank, 1", "tid, 5"])
def test_threads_that_have_exited_need_not_arrive(who: str) -> None:
    """PTX ISA, "barrier.cluster": the wait is for all threads that have not exited."""
    body = f"setp.eq.u32 p1, {who};\n@p1 ret;\n{SYNC}{SYNC}"
    for seed in range(6):
        sm90.run(body, block=64, grid=2, cluster=2, seed=seed).clean()


def test_arriving_and_exiting() -> None:
    for result in each_seed(ARRIVE):
        result.clean()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ARRIVE + ARRIVE.replace("\n", HERE + "\n") + WAIT, "arrives at the barrier of the cluster again"),
        (WAIT.replace("\n", HERE + "\n"), "waits for a barrier of the cluster at which it has not arrived"),
        (SYNC + WAIT.replace("\n", HERE + "\n"), "waits for a barrier of the cluster at which it has not arrived"),
    ],
)  # fmt: skip
def test_wrong_use(body: str, message: str) -> None:
    for result in each_seed(body):
        result.only("invalid", message)


RELAXED = "barrier.cluster.arrive.relaxed.aligned;\n"


def test_relaxed_arrivals_hand_over_what_was_fenced() -> None:
    after = WAIT + NEXT + ADDRESSES["u32"] + READ + OUT + SYNC
    for result in each_seed(f"{RANK}fence.acq_rel.cluster;\n{RELAXED}{after}"):
        result.clean()
    for result in each_seed(RANK + RELAXED + after):
        assert "race" in result.report.kinds()


@pytest.mark.parametrize(
    "instruction",
    ["ld.shared.u32 r2, [r5]", "st.shared.u32 [r5], r2", "atom.shared.add.u32 r2, [r5], r2"],
)
def test_only_shared_cluster_reaches_other_blocks(instruction: str) -> None:
    body = f"{RANK}mov.u32 r2, 1;\n{SYNC}{NEXT}{ADDRESSES['u32']}{instruction}; // here\n{SYNC}"
    for result in each_seed(body, 2):
        result.only("out-of-bounds", "which only .shared::cluster is for")
    good = body.replace("shared.", "shared::cluster.").replace(
        "st.shared::cluster.u32 [own]", "st.shared.u32 [own]"
    )
    for result in each_seed(good.replace(", r2;", ", rank;") if "st." in instruction else good, 2):
        assert "out-of-bounds" not in result.report.kinds()


def test_block_that_exits_while_others_read_it() -> None:
    """The block is gone by chance when the access comes: some seed shows it."""
    body = f"""{RANK}{SYNC}{NEXT}{BUFFER}
    mapa.shared::cluster.u32 r5, r0, r4;
    setp.eq.u32 p1, rank, 1;
    @p1 bra END;
    mov.u32 r9, 0;
    LATE:
    add.u32 r9, r9, 1;
    setp.lt.u32 p2, r9, 200;
    @p2 bra LATE;
    {READ}
    END:
    """
    for result in each_seed(body + SYNC, 2):
        result.clean()
    for seed in range(30):
        result = sm90.run(body, grid=2, cluster=2, seed=seed)
        if result.report.findings:
            result.only(
                "out-of-bounds", "shared memory of block 1 of the cluster, which has exited"
            )
            return
    pytest.fail("no seed lets the block exit first")
