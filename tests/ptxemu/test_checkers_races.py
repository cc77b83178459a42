"""Races in shared memory between warps: reported whatever the order that the launch happens to run them in."""

from __future__ import annotations

import re

import pytest

from ptxemu.checkers import OUT, each_seed, legal, run, words

SEEDS = range(4)
# What the next warp wrote.
NEXT = """
add.u32 r1, tid, 32;
rem.u32 r1, r1, n;
mov.u32 r0, buffer;
mad.lo.u32 r1, r1, 4, r0;
"""

READ_AFTER_WRITE = (
    NEXT + f"st.shared.u32 [own], tid; // other\nSYNC\nld.shared.u32 r2, [r1]; // here\n{OUT}"
)


def test_read_after_write() -> None:
    """Either the write comes first, or the read (of what nobody wrote yet) and then the write."""
    first = {"here": False, "other": False}
    for result in each_seed(READ_AFTER_WRITE.replace("SYNC", "")):
        result.report.findings[:] = [f for f in result.report.findings if f.kind == "race"]
        for mark in first:
            for finding in (f for f in result.report.findings if f.line == result.line(mark)):
                first[mark] = True
                assert re.match(
                    r"reads shared byte \d+, which warp \d wrote at PTX line \d+ with no synch"
                    if mark == "here"
                    else r"writes shared byte \d+, which warp \d reads or has read with no synch",
                    finding.message,
                )
    assert all(first.values())
    for result in legal(READ_AFTER_WRITE.replace("SYNC", "bar.sync 0;")):
        assert result.x.tolist() == [(i + 32) % 128 for i in range(128)]


def test_the_other_party_is_named() -> None:
    """Warp 1 writes and tells warp 0 by a flag that orders nothing, as it is no strong access to shared memory."""
    body = """
    setp.eq.u32 p0, warp, 1;
    @p0 bra WRITE;
    POLL:
    ld.volatile.global.u32 r0, [x];
    setp.eq.u32 p1, r0, 0;
    @p1 bra POLL;
    .loc 1 20 3
    ld.shared.u32 r2, [own+128]; // here
    ret;
    WRITE:
    .loc 1 10 3
    st.shared.u32 [own], tid; // other
    bar.warp.sync -1;
    st.volatile.global.u32 [x], 1;
    """
    message = (
        r"reads shared byte 128, which warp 1 wrote at @other \(kernel.cu:10\) with no synch.*"
    )
    for seed in SEEDS:
        finding = run(body, words(1), block=64, seed=seed).only(
            "race", message + r"warp 0, lane 0\]"
        )
        assert (finding.source, finding.count) == ("kernel.cu:20", 32)


def test_write_after_read() -> None:
    body = (
        NEXT
        + f"""
    st.shared.u32 [own], tid;
    bar.sync 0;
    ld.shared.u32 r2, [r1]; // other
    SYNC
    add.u32 r3, tid, 1000;
    st.shared.u32 [own], r3; // here
    {OUT}
    """
    )
    for result in each_seed(body.replace("SYNC", "")):
        assert {f.kind for f in result.report.findings} == {"race"}
        lines = {f.line for f in result.report.findings}
        assert lines <= {result.line("here"), result.line("other")}
    legal(body.replace("SYNC", "bar.sync 0;"))


def test_write_after_write() -> None:
    body = """
    mov.u32 r0, buffer;
    mad.lo.u32 r0, lane, 4, r0;
    setp.eq.u32 p0, warp, 0;
    @p0 st.shared.u32 [r0], warp;
    SYNC
    setp.eq.u32 p1, warp, 1;
    @p1 st.shared.u32 [r0], warp;
    """
    for result in each_seed(body.replace("SYNC", ""), block=64):
        assert [f.kind for f in result.report.findings] == ["race"]
        assert "wrote at PTX line" in result.report.findings[0].message
    legal(body.replace("SYNC", "bar.sync 0;"), block=64)


def test_identical_values_may_be_written_twice() -> None:
    """As Triton does where a layout is replicated over warps; each may read it back, others after a barrier."""
    body = f"""
    mov.u32 r0, buffer;
    mad.lo.u32 r0, lane, 4, r0;
    VALUE
    st.shared.u32 [r0], r3; // here
    bar.warp.sync -1;
    xor.b32 r1, lane, 1;
    mov.u32 r4, buffer;
    mad.lo.u32 r1, r1, 4, r4;
    ld.shared.u32 r5, [r1];
    bar.sync 0;
    ld.shared.u32 r2, [r1];
    {OUT}
    """
    legal(body.replace("VALUE", "add.u32 r3, lane, 7;"))
    for result in each_seed(body.replace("VALUE", "add.u32 r3, tid, 7;")):
        assert result.report.kinds() == {"race"}


def test_barrier_orders_only_what_came_before_it() -> None:
    """The classic loop with one barrier: the next write meets this turn's readers."""
    body = (
        NEXT
        + f"""
    mov.u32 r4, 0;
    LOOP:
    add.u32 r5, r4, tid;
    st.shared.u32 [own], r5;
    bar.sync 0;
    ld.shared.u32 r2, [r1];
    SECOND
    add.u32 r4, r4, 1;
    setp.lt.u32 p0, r4, 3;
    @p0 bra LOOP;
    {OUT}
    """
    )
    for result in each_seed(body.replace("SECOND", "")):
        assert result.report.kinds() == {"race"}
    for result in legal(body.replace("SECOND", "bar.sync 0;")):
        assert result.x.tolist() == [2 + (i + 32) % 128 for i in range(128)]


def test_two_buffers_need_one_barrier_a_turn() -> None:
    """The legal twin of the loop above with one barrier."""
    body = (
        NEXT
        + f"""
    mov.u32 r4, 0;
    LOOP:
    and.b32 r5, r4, 1;
    mul.lo.u32 r5, r5, 512;
    add.u32 r6, own, r5;
    add.u32 r7, r1, r5;
    add.u32 r8, r4, tid;
    st.shared.u32 [r6], r8;
    bar.sync 0;
    ld.shared.u32 r2, [r7];
    add.u32 r4, r4, 1;
    setp.lt.u32 p0, r4, 5;
    @p0 bra LOOP;
    {OUT}
    """
    )
    legal(body)


def test_bytes_next_to_each_other_are_apart() -> None:
    """Warps that write and read neighbouring halves of a word do not meet."""
    body = """
    mov.u32 r0, buffer;
    mad.lo.u32 r0, lane, 4, r0;
    mad.lo.u32 r0, warp, STEP, r0;
    cvt.u16.u32 h0, tid;
    st.shared.u16 [r0], h0; // here
    ld.shared.u16 h1, [r0];
    """
    legal(body.replace("STEP", "2"), block=64)
    for result in each_seed(body.replace("STEP", "0"), block=64):
        assert result.report.kinds() == {"race"}


def test_vector_access_meets_each_of_its_words() -> None:
    body = """
    setp.eq.u32 p0, warp, 0;
    @p0 st.shared.u32 [own], tid;
    SYNC
    mov.u32 r0, buffer;
    mad.lo.u32 r0, lane, 16, r0;
    setp.lt.u32 p1, lane, 8;
    setp.ne.and.u32 p1, warp, 0, p1;
    @p1 ld.shared.v4.u32 {r1, r2, r3, r4}, [r0];
    """
    for result in each_seed(body.replace("SYNC", ""), block=64):
        assert result.report.kinds() == {"race"}
    legal(body.replace("SYNC", "bar.sync 0;"), block=64)


@pytest.mark.parametrize("matrix", [False, True])
def test_matrix_loads_are_reads(matrix: bool) -> None:
    """ldmatrix of rows that another warp wrote."""
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r1];"
    body = (
        NEXT.replace("r1, 4, r0", "r1, 16, r0")
        + f"""
    mad.lo.u32 r6, tid, 16, r0;
    st.shared.v4.u32 [r6], {{tid, tid, tid, tid}};
    SYNC
    {load if matrix else "ld.shared.v4.u32 {r2, r3, r4, r5}, [r1];"}
    {OUT}
    """
    )
    legal(body.replace("SYNC", "bar.sync 0;"))
    for result in each_seed(body.replace("SYNC", "")):
        assert "race" in result.report.kinds()


def test_matrix_stores_are_writes() -> None:
    body = (
        NEXT.replace("r1, 4, r0", "r1, 16, r0")
        + f"""
    mad.lo.u32 r6, tid, 16, r0;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [r6], {{tid, tid, tid, tid}};
    SYNC
    ld.shared.v4.u32 {{r2, r3, r4, r5}}, [r1];
    {OUT}
    """
    )
    for seed in SEEDS:
        good = body.replace("SYNC", "bar.sync 0;")
        run(good, words(128), n=128, block=128, seed=seed, target="sm_90").clean()
        bad = run(body.replace("SYNC", ""), words(128), n=128, block=128, seed=seed, target="sm_90")
        assert "race" in bad.report.kinds()
