"""Shared memory among the lanes of one warp; atomics; flags in shared memory that hand data over."""

from __future__ import annotations

import pytest

from ptxemu.checkers import OUT, run, words

SEEDS = range(4)
EXCHANGE = f"""
xor.b32 r0, lane, 1;
mov.u32 r1, buffer;
mad.lo.u32 r1, r0, 4, r1;
st.shared.u32 [own], tid; // other
SYNC
ld.shared.u32 r2, [r1]; // here
{OUT}
"""


@pytest.mark.parametrize(
    "nothing",
    [
        "",
        "shfl.sync.idx.b32 r5, tid, 0, 31, -1;",
        "vote.sync.ballot.b32 r5, p0, -1;",
        "membar.cta;",
    ],
)
def test_lanes_of_a_warp_are_ordered_by_its_barrier_only(nothing: str) -> None:
    """Not by running in step, which nothing promises, nor by a shuffle, which is no barrier for memory."""
    body = "setp.eq.u32 p0, tid, 0;\n" + EXCHANGE
    run(body.replace("SYNC", nothing), words(32)).only(
        "race", "reads shared byte 4, which lane 1 of the same warp wrote at @other", "lane 0"
    )
    for sync in ("bar.warp.sync -1;", "bar.sync 0;", "barrier.sync 0;"):
        good = run(body.replace("SYNC", sync), words(32)).clean()
        assert good.x.tolist() == [i ^ 1 for i in range(32)]


def test_own_bytes_need_no_barrier() -> None:
    run(
        f"st.shared.u32 [own], tid;\nld.shared.u32 r2, [own];\nst.shared.u32 [own], r2;\n{OUT}",
        words(32),
    ).clean()


def test_write_after_read_within_a_warp() -> None:
    """A reduction through shared memory, as in a loop that forgets the barrier between reading and writing."""
    body = f"""
    mov.u32 r2, tid;
    st.shared.u32 [own+128], 0;
    st.shared.u32 [own], r2;
    bar.warp.sync -1;
    mov.u32 r3, 16;
    LOOP:
    mad.lo.u32 r4, r3, 4, own;
    ld.shared.u32 r5, [r4];
    SYNC
    add.u32 r2, r2, r5;
    st.shared.u32 [own], r2; // here
    bar.warp.sync -1;
    shr.u32 r3, r3, 1;
    setp.ne.u32 p0, r3, 0;
    @p0 bra LOOP;
    {OUT}
    """
    found = run(body.replace("SYNC", ""), words(32))
    found.only("race", "writes shared byte 32, which lane 0 of the same warp reads or has read")
    assert run(body.replace("SYNC", "bar.warp.sync -1;"), words(32)).clean().x[0] == 496


def test_two_lanes_write_different_values() -> None:
    body = """
    mov.u32 r0, buffer;
    shr.u32 r1, tid, 1;
    mad.lo.u32 r0, r1, 4, r0;
    st.shared.u32 [r0], VALUE; // here
    """
    run(body.replace("VALUE", "r1")).clean()
    run(body.replace("VALUE", "tid")).only(
        "race", "writes shared byte 0, which lane 0 of the same warp wrote", "lane 1"
    )


def test_barrier_of_some_lanes_orders_them() -> None:
    """Both halves of the warp exchange on their own, apart."""
    body = f"""
    xor.b32 r0, lane, 1;
    mov.u32 r1, buffer;
    mad.lo.u32 r1, r0, 4, r1;
    setp.lt.u32 p0, lane, 16;
    @p0 bra LOW;
    st.shared.u32 [own], tid;
    bar.warp.sync 0xffff0000;
    ld.shared.u32 r2, [r1];
    bra JOIN;
    LOW:
    st.shared.u32 [own], tid;
    bar.warp.sync 0x0000ffff;
    ld.shared.u32 r2, [r1];
    JOIN:
    {OUT}
    """
    assert run(body, words(32)).clean().x.tolist() == [i ^ 1 for i in range(32)]


def test_transposing_through_shared_memory() -> None:
    """A warp's own patch used again and again, two barriers of the warp a turn: what converters of layouts do."""
    body = f"""
    mov.u32 r0, buffer;
    mad.lo.u32 r0, warp, 128, r0;
    xor.b32 r1, lane, 21;
    mad.lo.u32 r1, r1, 4, r0;
    mov.u32 r2, tid;
    mov.u32 r3, 0;
    LOOP:
    bar.warp.sync -1;
    st.shared.u32 [own], r2;
    bar.warp.sync -1;
    ld.shared.u32 r2, [r1];
    add.u32 r3, r3, 1;
    setp.lt.u32 p0, r3, 4;
    @p0 bra LOOP;
    {OUT}
    """
    for seed in SEEDS:
        assert run(body, words(64), block=64, seed=seed).clean().x.tolist() == list(range(64))
    once = body.replace("LOOP:\n    bar.warp.sync -1;", "LOOP:")
    assert run(once, words(64), block=64).report.kinds() == {"race"}


COUNTER = """
setp.eq.u32 p0, tid, 0;
@p0 st.shared.u32 [buffer], 0;
bar.sync 0;
ADD
AFTER
ld.shared.u32 r2, [buffer];
setp.eq.u32 p1, tid, 0;
@p1 st.global.u32 [x], r2;
"""


@pytest.mark.parametrize(
    ("add", "legal"),
    [
        ("red.shared.add.u32 [buffer], 1;", True),
        ("atom.shared.add.u32 r5, [buffer], 1;", True),
        ("ld.shared.u32 r5, [buffer];\nadd.u32 r5, r5, 1;\nst.shared.u32 [buffer], r5;", False),
        ("red.shared.add.u32 [buffer], 1;\nld.shared.u32 r5, [buffer];", False),
        ("red.shared.add.u32 [buffer], 1;\nld.volatile.shared.u32 r5, [buffer];", True),
    ],
)
def test_atomics_among_themselves(add: str, legal: bool) -> None:
    """They may meet each other and volatile reads; a plain access that they meet is a race."""
    for seed in SEEDS:
        text = COUNTER.replace("ADD", add).replace("AFTER", "bar.sync 0;")
        result = run(text, words(1), block=128, seed=seed)
        if legal:
            assert result.clean().x.item() == 128
        else:
            assert result.report.kinds() == {"race"}


def test_reading_a_counter_needs_the_barrier() -> None:
    for seed in SEEDS:
        text = COUNTER.replace("ADD", "red.shared.add.u32 [buffer], 1;").replace("AFTER", "")
        assert run(text, words(1), block=128, seed=seed).report.kinds() == {"race"}


FLAG = """
setp.eq.u32 p0, warp, 0;
setp.eq.u32 p1, tid, 0;
@p1 st.shared.u32 [buffer+2048], 0;
bar.sync 0;
@!p0 bra CONSUME;
st.shared.u32 [own], tid;
bar.warp.sync -1;
@p1 RELEASE
ret;
CONSUME:
setp.ne.u32 p2, lane, 0;
@p2 bra WAITED;
POLL:
ACQUIRE
setp.eq.u32 p3, r3, 0;
@p3 bra POLL;
WAITED:
bar.warp.sync -1;
ld.shared.u32 r2, [own+-128]; // here
mul.wide.u32 d0, lane, 4;
add.s64 d0, x, d0;
st.global.u32 [d0], r2;
"""


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        (
            "st.release.cta.shared.u32 [buffer+2048], 1;",
            "ld.acquire.cta.shared.u32 r3, [buffer+2048];",
        ),
        ("st.volatile.shared.u32 [buffer+2048], 1;", "ld.volatile.shared.u32 r3, [buffer+2048];"),
        ("atom.shared.exch.b32 r4, [buffer+2048], 1;", "atom.shared.or.b32 r3, [buffer+2048], 0;"),
        (
            "red.release.cta.shared.add.u32 [buffer+2048], 1;",
            "ld.acquire.cta.shared.u32 r3, [buffer+2048];",
        ),
    ],
)
def test_flag_in_shared_memory_hands_data_over(release: str, acquire: str) -> None:
    body = FLAG.replace("RELEASE", release).replace("ACQUIRE", acquire)
    for seed in SEEDS:
        assert run(body, words(32), block=64, seed=seed).clean().x.tolist() == list(range(32))


def test_flag_that_is_raised_too_early() -> None:
    """Warps 1 and 2 write, warp 0 raises the flag for both: not before it has met them at a barrier."""
    body = """
    setp.eq.u32 p1, tid, 0;
    setp.eq.u32 p0, warp, 3;
    @p1 st.shared.u32 [buffer+2048], 0;
    bar.sync 0;
    @p0 bra POLL;
    st.shared.u32 [own], tid; // other
    SYNC
    @p1 st.release.cta.shared.u32 [buffer+2048], 1;
    ret;
    POLL:
    ld.acquire.cta.shared.u32 r3, [buffer+2048];
    setp.eq.u32 p3, r3, 0;
    @p3 bra POLL;
    ld.shared.u32 r2, [own+-128]; // here
    """
    early = 0
    for seed in range(12):
        run(body.replace("SYNC", "bar.sync 1, 96;"), block=128, seed=seed).clean()
        early += bool(run(body.replace("SYNC", ""), block=128, seed=seed).report.findings)
    assert early == 12


def test_plain_flag_is_a_race_itself() -> None:
    body = FLAG.replace("RELEASE", "st.shared.u32 [buffer+2048], 1;")
    body = body.replace("ACQUIRE", "ld.shared.u32 r3, [buffer+2048];")
    result = run(body, words(32), block=64, seed=3, max_instructions=20000)
    assert "race" in result.report.kinds()
