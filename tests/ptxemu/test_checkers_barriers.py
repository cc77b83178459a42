"""Barriers that not all reach, programs that never end, exchanges with absent lanes; and what looks like it but ends."""

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
    result.only("divergent-barrier", "only 16 of the warp's 32 lanes come to the barrier", "lane 16")


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
            "divergent-barrier", "no warp can go on", r"warp 0: 32 lanes at @here", "warp 1: has exited"
        )
    run(body.replace("bar.sync 0;", "bar.sync 0, 32;"), n=32, block=64).clean()


def test_warps_wait_at_different_barriers() -> None:
    body = "setp.eq.u32 p0, warp, 0;\n@p0 bra ONE;\nbar.sync 2; // other\nbar.sync 1;\nret;\n"
    body += "ONE: bar.sync FIRST; // here\nbar.sync SECOND;"
    for seed in SEEDS:
        run(body.replace("FIRST", "2").replace("SECOND", "1"), block=64, seed=seed).clean()
        run(body.replace("FIRST", "1").replace("SECOND", "2"), block=64, seed=seed).only(
            "deadlock", "no warp can go on", "warp 0: 32 lanes at @here", "warp 1: 32 lanes at @other"
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


def test_shuffle_from_a_lane_that_is_not_there() -> None:
    """The members are named rightly, but the source is not among them."""
    body = """
    setp.lt.u32 p0, lane, 16;
    @!p0 bra OUT;
    mov.u32 r1, tid;
    shfl.sync.idx.b32 r0, r1, FROM, 31, 0x0000ffff; // here
    OUT:
    """
    run(body.replace("FROM", "3")).clean()
    run(body.replace("FROM", "20")).only("invalid", "shuffles from a lane that does not take part")


def test_members_that_never_come() -> None:
    body = """
    setp.lt.u32 p0, lane, 16;
    @!p0 bra OUT;
    shfl.sync.bfly.b32 r0, tid, 1, 31, MEMBERS; // here
    OUT:
    bar.warp.sync -1; // other
    """
    run(body.replace("MEMBERS", "0xffff")).clean()
    run(body.replace("MEMBERS", "-1")).first(
        "divergent-barrier", "lanes wait here while others of their warp wait at @other"
    )


def test_members_that_come_by_another_way() -> None:
    """Lanes of both sides of a branch are named, and meet at two shuffles: a fault on its own."""
    body = """
    setp.lt.u32 p0, lane, 16;
    @p0 bra LOW;
    shfl.sync.bfly.b32 r0, tid, 1, 31, 0xffff0000;
    bra JOIN;
    LOW:
    shfl.sync.bfly.b32 r0, tid, 1, 31, LOWER; // here
    JOIN:
    bar.warp.sync -1; // other
    """
    run(body.replace("LOWER", "0x0000ffff")).clean()
    run(body.replace("LOWER", "0xffffffff")).first(
        "divergent-barrier", "lanes wait here while others of their warp wait at @other"
    )


def test_members_that_are_switched_off() -> None:
    body = "setp.lt.u32 p0, lane, n;\n@p0 shfl.sync.bfly.b32 r0, tid, 1, 31, -1; // here"
    run(body, n=32).clean()
    run(body, n=0).clean()
    run(body, n=16).first("divergent-barrier", "are switched off by its predicate", "lane 16")


def test_members_that_have_exited() -> None:
    """What exited lanes would have brought is undefined, yet waiting for them is no fault."""
    body = """
    setp.ge.u32 p0, lane, n;
    @p0 ret;
    shfl.sync.bfly.b32 r0, tid, 1, 31, -1; // here
    """
    run(body, n=16).clean()
    run(body, n=15).only("invalid", "shuffles from a lane that does not take part", "lane 14")


def test_warp_that_parts_and_meets() -> None:
    """Loops of different length, a switch, nested branches: at the end all lanes are together again."""
    body = """
    mov.u32 r0, 0;
    LOOP:
    add.u32 r0, r0, 1;
    setp.lt.u32 p0, r0, lane;
    @p0 bra LOOP;
    and.b32 r1, lane, 1;
    setp.eq.u32 p1, r1, 0;
    @p1 bra EVEN;
    setp.lt.u32 p2, lane, 7;
    @p2 bra DEEP;
    add.u32 r0, r0, 10;
    DEEP:
    add.u32 r0, r0, 100;
    bra JOIN;
    EVEN:
    add.u32 r0, r0, 1000;
    JOIN:
    shfl.sync.idx.b32 r2, r0, 9, 31, -1;
    bar.sync 0;
    mul.wide.u32 d0, lane, 4;
    add.s64 d0, x, d0;
    st.global.u32 [d0], r2;
    """
    for seed in SEEDS:
        assert run(body, words(32), seed=seed).clean().x.eq(9 + 10 + 100).all()


def test_trap_ends_the_launch() -> None:
    body = "setp.eq.u32 p0, tid, n;\n@p0 trap; // here\nst.global.u32 [x], n;"
    run(body, words(1), n=99, block=64, grid=3).clean()
    result = run(body, words(1), n=5, block=64, grid=3)
    result.only("trap", "^trap", "lane 5")


ASSERT = """
.extern .func __assertfail(
  .param .b64 message, .param .b64 file, .param .b32 line, .param .b64 function, .param .b64 size);
.global .align 1 .b8 message[6] = {110, 32, 60, 32, 51, 0};
.global .align 1 .b8 file[5] = {97, 46, 99, 117, 0};
.global .align 1 .b8 function[2] = {102, 0};
"""


def test_assertion() -> None:
    body = """
    setp.lt.u32 p0, n, 3;
    @p0 bra GOOD;
    { // as nvcc calls it
    .param .b64 a0;
    .param .b64 a1;
    .param .b32 a2;
    .param .b64 a3;
    .param .b64 a4;
    mov.u64 d0, message;
    cvta.global.u64 d0, d0;
    st.param.b64 [a0], d0;
    mov.u64 d0, file;
    cvta.global.u64 d0, d0;
    st.param.b64 [a1], d0;
    st.param.b32 [a2], 12;
    mov.u64 d0, function;
    cvta.global.u64 d0, d0;
    st.param.b64 [a3], d0;
    mov.u64 d0, 1;
    st.param.b64 [a4], d0;
    call.uni __assertfail, (a0, a1, a2, a3, a4); // here
    }
    GOOD:
    """
    run(body, n=2, module=ASSERT).clean()
    run(body, n=3, module=ASSERT).only("trap", "assertion failed: n < 3, in f at a.cu:12")
