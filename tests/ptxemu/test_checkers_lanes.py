"""Exchanges between the lanes of a warp with some of them absent; traps and assertions."""

from __future__ import annotations

from ptxemu.checkers import OUT, run, words


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
    for seed in range(4):
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


def test_sums_of_nans_agree() -> None:
    """A GPU makes one NaN of all: lanes that add up NaNs in different order may all store the sum."""
    body = """
    mov.b32 f0, 0f7fc00001;
    mov.b32 f1, 0fffc00002;
    setp.eq.u32 p0, lane, 0;
    @p0 mov.b32 f2, f0;
    @!p0 mov.b32 f2, f1;
    @p0 mov.b32 f3, f1;
    @!p0 mov.b32 f3, f0;
    add.f32 f4, f2, f3;
    mov.b32 r0, buffer;
    st.shared.f32 [r0], f4;
    bar.sync 0;
    ld.shared.u32 r2, [r0];
    """
    memory = words(32)
    run(body + OUT, memory).clean()
    assert memory.tolist() == [0x7FFFFFFF] * 32
