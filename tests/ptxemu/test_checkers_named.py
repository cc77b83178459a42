"""Named barriers, barriers that only arrive or reduce, and a sum over a block: what they order."""

from __future__ import annotations

import pytest
import torch

from ptxemu.checkers import OUT, each_seed, legal, run, words

# What the next warp wrote.
NEXT = """
add.u32 r1, tid, 32;
rem.u32 r1, r1, n;
mov.u32 r0, buffer;
mad.lo.u32 r1, r1, 4, r0;
"""

NAMED = (
    NEXT
    + f"""
// Warps 0 and 1 share barrier 1, warps 2 and 3 barrier 2.
shr.u32 r8, warp, 1;
add.u32 r8, r8, 1;
xor.b32 r1, tid, PARTNER;
mad.lo.u32 r1, r1, 4, r0;
st.shared.u32 [own], tid;
bar.sync r8, 64;
ld.shared.u32 r2, [r1];
{OUT}
"""
)


def test_named_barrier_orders_its_warps_only() -> None:
    for result in legal(NAMED.replace("PARTNER", "32")):
        assert result.x.tolist() == [i ^ 32 for i in range(128)]
    for result in each_seed(NAMED.replace("PARTNER", "64")):
        assert "race" in result.report.kinds()


PRODUCER = """
mov.u32 r4, 0;
setp.ne.u32 p0, warp, 0;
@p0 bra CONSUMER;
PRODUCE:
EMPTY_SYNC
add.u32 r5, r4, lane;
st.shared.u32 [own], r5;
FULL_ARRIVE
add.u32 r4, r4, 1;
setp.lt.u32 p1, r4, 4;
@p1 bra PRODUCE;
ret;
CONSUMER:
EMPTY_ARRIVE
FULL_SYNC
ld.shared.u32 r2, [own+-128];
mad.lo.u32 r6, r4, 32, lane;
mul.wide.u32 d0, r6, 4;
add.s64 d0, x, d0;
st.global.u32 [d0], r2;
add.u32 r4, r4, 1;
setp.lt.u32 p1, r4, 4;
@p1 bra CONSUMER;
"""


@pytest.mark.parametrize("lost", ["", "EMPTY", "FULL"])
def test_producer_and_consumer(lost: str) -> None:
    """Each waits for the other by one bar.sync, and tells it by one bar.arrive."""
    body = PRODUCER
    for name, number in (("EMPTY", 1), ("FULL", 2)):
        sync, arrive = f"bar.sync {number}, 64;", f"bar.arrive {number}, 64;"
        body = body.replace(f"{name}_SYNC", "" if name == lost else sync)
        body = body.replace(f"{name}_ARRIVE", "" if name == lost else arrive)
    for result in [run(body, words(128), n=64, block=64, seed=s) for s in range(8)]:
        if lost:
            assert result.report.findings
        else:
            expected = [turn + i for turn in range(4) for i in range(32)]
            assert result.clean().x.tolist() == expected


def test_arriving_does_not_wait() -> None:
    """After bar.arrive a warp is not ordered after the others: only after bar.sync."""
    body = (
        NEXT
        + f"""
    xor.b32 r1, tid, 32;
    mad.lo.u32 r1, r1, 4, r0;
    st.shared.u32 [own], tid;
    setp.eq.u32 p0, warp, 0;
    @p0 bra FIRST;
    bar.sync 1, 64;
    ld.shared.u32 r2, [r1];
    {OUT}
    ret;
    FIRST:
    bar.HOW 1, 64;
    ld.shared.u32 r2, [r1];
    {OUT}
    """
    )
    legal(body.replace("HOW", "sync"), block=64)
    assert any(
        "race" in r.report.kinds() for r in each_seed(body.replace("HOW", "arrive"), block=64)
    )


def test_barrier_with_a_reduction_orders_too() -> None:
    body = (
        NEXT
        + f"""
    st.shared.u32 [own], tid;
    setp.eq.u32 p0, tid, 5;
    bar.red.or.pred p1, 0, p0;
    ld.shared.u32 r2, [r1];
    @!p1 mov.u32 r2, 0;
    bar.red.popc.u32 r3, 0, p0;
    add.u32 r2, r2, r3;
    {OUT}
    """
    )
    for result in legal(body):
        assert result.x.tolist() == [1 + (i + 32) % 128 for i in range(128)]


def test_block_sum_of_two_levels() -> None:
    """Every warp sums by shuffles and writes one word, and all read the words; twice in a row."""
    sum_ = """
    cvt.rn.f32.u32 f0, tid;
    mov.f32 f1, f0;
    """
    for step in (16, 8, 4, 2, 1):
        sum_ += f"mov.b32 r2, f1;\nshfl.sync.bfly.b32 r3, r2, {step}, 31, -1;\n"
        sum_ += "mov.b32 f2, r3;\nadd.f32 f1, f1, f2;\n"
    sum_ += """
    BEFORE
    setp.eq.u32 p0, lane, 0;
    mov.u32 r0, buffer;
    mad.lo.u32 r1, warp, 4, r0;
    @p0 st.shared.f32 [r1], f1;
    bar.sync 0;
    setp.lt.u32 p1, lane, 4;
    mad.lo.u32 r4, lane, 4, r0;
    mov.f32 f3, 0f00000000;
    @p1 ld.shared.f32 f3, [r4];
    """
    twice = sum_ + sum_.replace("f0, tid", "f0, lane")
    body = twice + "mov.b32 r2, f3;\n" + OUT
    legal(body.replace("BEFORE", "bar.sync 0;"))
    bad = body.replace("BEFORE", "")
    assert all("race" in result.report.kinds() for result in each_seed(bad))
    assert torch.equal(legal(body.replace("BEFORE", "bar.sync 0;"))[0].x[4:32], words(28))
