"""Barriers that not all reach, and programs that never end; and what looks like it but ends."""

from __future__ import annotations

import re

import pytest
import torch

from ptxemu.checkers import run, words

SEEDS = range(6)


def test_barrier_in_a_branch_of_half_a_warp() -> None:
    body = "setp.lt.u32 p0, lane, LANES;\n@p0 bra IN;\nbra OUT;\nIN:\nbar.sync 0; // here\nOUT:"
    run(body.replace("LANES", "32"), block=64).clean()
    result = run(body.replace("LANES", "16"), block=64)
    result.only(
        "divergent-barrier", "only 16 of the warp's 32 lanes come to the barrier", "lane 16"
    )


def test_predicated_barrier() -> None:
    """A barrier under a predicate is the same fault, unless the predicate is the whole warp's."""
    body = "setp.lt.u32 p0, tid, LIMIT;\n@p0 bar.sync 0; // here\n@!p0 bar.sync 0;"
    run(body.replace("LIMIT", "32"), block=64).clean()
    result = run(body.replace("LIMIT", "16"), block=64)
    assert result.report.kinds() == {"divergent-barrier"}
    assert result.report.findings[0].line in (result.line("here"), result.line("here") + 1)


def test_lanes_that_have_exited_are_not_missed() -> None:
    """Those of a ragged last warp never were."""
    body = "setp.ge.u32 p0, tid, n;\n@p0 ret;\nbar.sync 0; // here\nbar.warp.sync -1;"
    for seed in SEEDS:
        run(body, n=40, block=64, seed=seed).clean()
    run("bar.sync 0;\nst.shared.u32 [own], tid;\nbar.sync 0;", block=40).clean()


def test_warp_that_has_exited() -> None:
    """The barrier is for all threads of the block; those of warp 1 never come."""
    body = "setp.ge.u32 p0, tid, n;\n@p0 ret;\nbar.sync 0; // here"
    for seed in SEEDS:
        run(body, n=32, block=64, seed=seed).only(
            "divergent-barrier",
            "no warp can go on",
            r"warp 0: 32 lanes at @here",
            "warp 1: has exited",
        )
    run(body.replace("bar.sync 0;", "bar.sync 0, 32;"), n=32, block=64).clean()


def test_warps_wait_at_different_barriers() -> None:
    body = "setp.eq.u32 p0, warp, 0;\n@p0 bra ONE;\nbar.sync 2; // other\nbar.sync 1;\nret;\n"
    body += "ONE: bar.sync FIRST; // here\nbar.sync SECOND;"
    for seed in SEEDS:
        run(body.replace("FIRST", "2").replace("SECOND", "1"), block=64, seed=seed).clean()
        run(body.replace("FIRST", "1").replace("SECOND", "2"), block=64, seed=seed).only(
            "deadlock",
            "no warp can go on",
            "warp 0: 32 lanes at @here",
            "warp 1: 32 lanes at @other",
        )


def test_one_barrier_reached_from_two_places() -> None:
    """Warps may meet at one barrier from different instructions."""
    body = "setp.eq.u32 p0, warp, 0;\n@p0 bra ONE;\nbar.sync 0;\nret;\nONE: bar.sync 0;"
    run(body, block=64).clean()


@pytest.mark.parametrize(
    ("barrier", "kind", "message"),
    [
        ("bar.sync 1, 96;", "invalid", "a barrier of 96 threads, the block has 64"),
        ("bar.sync 1, 40;", "invalid", "a barrier of 40 threads"),
        ("bar.sync 1, 0;", "invalid", "a barrier of 0 threads"),
        ("bar.sync 16;", "invalid", "barrier 16 of 16"),
    ],
)
def test_barrier_that_cannot_be(barrier: str, kind: str, message: str) -> None:
    run(barrier + " // here", block=64).only(kind, message)
    run("bar.sync 15, 64; // here", block=64).clean()


def test_warps_that_expect_different_numbers() -> None:
    body = "setp.eq.u32 p0, warp, 0;\n@p0 bra ONE;\nbar.sync 1, 64;\nret;\nONE: bar.sync 1, COUNT; // here"
    run(body.replace("COUNT", "64"), block=64).clean()
    body = body.replace("bar.sync 1, 64;", "bar.sync 1, 96;")
    run(body.replace("COUNT", "96"), block=96).clean()
    for seed in SEEDS:
        first = run(body.replace("COUNT", "64"), block=96, seed=seed).report.findings[0]
        assert first.kind == "invalid"
        assert re.match(r"barrier 1 for \d\d threads, others expect \d\d", first.message)


def test_spin_on_a_flag_that_nobody_sets() -> None:
    body = """
    POLL:
    ld.volatile.global.u32 r0, [x];
    setp.eq.u32 p0, r0, 0;
    @p0 bra POLL;
    """
    run(body, torch.ones(1, dtype=torch.int32)).clean()
    result = run(body, words(1), block=64, grid=2, max_instructions=10**8)
    assert [f.kind for f in result.report.findings] == ["deadlock"]
    assert "every warp polls in vain" in result.report.findings[0].message
    assert "block (1, 0, 0)" in result.report.findings[0].message


def test_loop_that_never_ends() -> None:
    body = "mov.u32 r0, 0;\nLOOP:\nadd.u32 r0, r0, STEP; // here\nsetp.lt.u32 p0, r0, 100;\n@p0 bra LOOP;"
    run(body.replace("STEP", "1")).clean()
    result = run(body.replace("STEP", "0"), max_instructions=50_000)
    assert [f.kind for f in result.report.findings] == ["deadlock"]
    assert "it has not ended after 50" in result.report.findings[0].message


def test_blocks_that_wait_for_a_later_one() -> None:
    """All blocks wait for the flag that block 1 raises, wherever it comes in the order."""
    body = """
    setp.eq.u32 p0, block, 1;
    setp.eq.u32 p1, tid, 0;
    membar.gl;
    @!p0 bra POLL;
    @p1 st.volatile.global.u32 [x], 1;
    ret;
    POLL:
    ld.volatile.global.u32 r0, [x];
    setp.eq.u32 p2, r0, 0;
    @p2 bra POLL;
    """
    for seed in SEEDS:
        run(body, words(1), block=64, grid=5, seed=seed, max_instructions=10**8).clean()


def test_grid_wide_barrier() -> None:
    """Every block counts itself in, then waits for all."""
    body = """
    setp.ne.u32 p0, tid, 0;
    @p0 bra WAITED;
    mul.wide.u32 d0, block, 4;
    add.s64 d0, y, d0;
    st.global.u32 [d0], block;
    membar.gl;
    atom.global.add.u32 r0, [x], 1;
    POLL:
    ld.volatile.global.u32 r0, [x];
    setp.lt.u32 p1, r0, n;
    @p1 bra POLL;
    membar.gl;
    WAITED:
    bar.sync 0;
    """
    for seed in SEEDS:
        assert run(body, words(1), words(4), 4, block=64, grid=4, seed=seed).clean().x.item() == 4


LOCK = """
setp.ne.u32 p0, tid, 0;
@p0 bra LOCKED;
SPIN:
atom.global.cas.b32 r0, [x], 0, 1;
setp.ne.u32 p1, r0, 0;
@p1 bra SPIN;
membar.gl;
LOCKED:
bar.sync 0;
mul.wide.u32 d0, tid, 4;
add.s64 d0, y, d0;
ld.global.u32 r1, [d0];
add.u32 r1, r1, 1;
st.global.u32 [d0], r1;
membar.gl;
bar.sync 0;
@!p0 atom.global.exch.b32 r2, [x], 0;
"""


def test_lock_between_blocks() -> None:
    for seed in SEEDS:
        result = run(LOCK, words(1), words(64), block=64, grid=7, seed=seed).clean()
        assert result.y.eq(7).all()


def test_lock_that_is_not_opened() -> None:
    body = "\n".join(LOCK.strip().splitlines()[:-1])
    result = run(body, words(1), words(64), block=64, grid=3, max_instructions=10**8)
    assert [f.kind for f in result.report.findings] == ["deadlock"]


def test_lock_among_the_lanes_of_a_warp() -> None:
    """Since sm_70 each lane goes on for itself: the lane that holds the lock gets to open it."""
    body = """
    SPIN:
    atom.global.cas.b32 r0, [x], 0, 1;
    setp.ne.u32 p1, r0, 0;
    @p1 bra SPIN;
    ld.volatile.global.u32 r1, [y];
    add.u32 r1, r1, 1;
    st.volatile.global.u32 [y], r1;
    membar.gl;
    atom.global.exch.b32 r2, [x], 0;
    """
    for seed in SEEDS:
        assert run(body, words(1), words(1), seed=seed).clean().y.item() == 32
