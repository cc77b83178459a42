"""Copies that run on their own (cp.async): what is touched before they have been waited for."""

from __future__ import annotations

import pytest
import torch

import ptxemu
from ptxemu.checkers import run, words

SEEDS = range(4)
COMMIT, BARRIER = "cp.async.commit_group;", "bar.sync 0;"
# Each thread copies 16 bytes of x, and reads what the thread opposite has copied.
COPY = """
mul.wide.u32 d0, tid, 16;
add.s64 d1, x, d0;
add.s64 d2, y, d0;
mov.u32 r0, buffer;
mad.lo.u32 r1, tid, 16, r0;
xor.b32 r2, tid, 63;
mad.lo.u32 r2, r2, 16, r0;
cp.async.cg.shared.global [r1], [d1], 16; // other
COMMIT
WAIT
BARRIER
ld.shared.v4.u32 {r4, r5, r6, r7}, [r2]; // here
st.global.v4.u32 [d2], {r4, r5, r6, r7};
"""
SOURCE = torch.arange(256, dtype=torch.int32)


def copy(commit: str = COMMIT, wait: str = "cp.async.wait_group 0;", barrier: str = BARRIER) -> str:
    return COPY.replace("COMMIT", commit).replace("WAIT", wait).replace("BARRIER", barrier)


@pytest.mark.parametrize(
    ("commit", "wait"),
    [
        (COMMIT, "cp.async.wait_group 0;"),
        (COMMIT, "cp.async.wait_all;"),
        ("", "cp.async.wait_all;"),
        (COMMIT * 2, "cp.async.wait_group 1;"),  # the second group is empty
    ],
)
def test_waited_for(commit: str, wait: str) -> None:
    for seed in SEEDS:
        result = run(copy(commit, wait), SOURCE, words(256), block=64, seed=seed).clean()
        assert torch.equal(result.y.view(64, 4).flip(0), SOURCE.view(64, 4))


@pytest.mark.parametrize(
    ("commit", "wait"),
    [
        (COMMIT, ""),
        (COMMIT, "cp.async.wait_group 1;"),  # one group too many is left
        ("", "cp.async.wait_group 0;"),  # never committed
        ("", "cp.async.wait_group 0;\n" + COMMIT),
    ],
)
def test_not_waited_for(commit: str, wait: str) -> None:
    for seed in SEEDS:
        run(copy(commit, wait), SOURCE, words(256), block=64, seed=seed).only(
            "async-unwaited",
            r"touches shared byte \d+, to which an asynchronous copy at @other is under way, not waited for",
        )


def test_waiting_is_each_threads_own() -> None:
    """Without a barrier after it, what other threads copied is not there for certain."""
    for seed in SEEDS:
        result = run(copy(barrier=""), SOURCE, words(256), block=64, seed=seed)
        assert result.report.kinds() & {"race", "async-unwaited"}
        late = copy(wait="bar.sync 0;\ncp.async.wait_group 0;", barrier="")
        result = run(late, SOURCE, words(256), block=64, seed=seed)
        assert result.report.kinds() == {"race", "async-unwaited"}
    own = copy(barrier="").replace("xor.b32 r2, tid, 63;", "mov.u32 r2, tid;")
    run(own, SOURCE, words(256), block=64).clean()


PIPELINE = """
// Turn i computes with stage i mod STAGES while the copies of the next turns are under way.
mul.wide.u32 d0, tid, 16;
add.s64 d1, x, d0;
add.s64 d2, y, d0;
mov.u32 r0, buffer;
mad.lo.u32 r1, tid, 16, r0; // where it copies to, in stage 0
xor.b32 r2, tid, 63;
mad.lo.u32 r2, r2, 16, r0; // where it reads
mov.u32 r10, 0; // turn
mov.u32 r11, 0; // stage of the turn
mov.u32 r12, 0; // turn and stage of the next copy
mov.u32 r13, 0;
PROLOGUE
LOOP:
cp.async.wait_group LEFT;
bar.sync 0;
setp.ge.u32 p0, r12, n;
@p0 bra COPIED;
ISSUE
COPIED:
cp.async.commit_group;
mad.lo.u32 r15, r11, 1024, r2;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r15];
st.global.v4.u32 [d2], {r4, r5, r6, r7};
LAST
add.s64 d2, d2, 1024;
add.u32 r11, r11, 1;
setp.eq.u32 p1, r11, STAGES;
@p1 mov.u32 r11, 0;
add.u32 r10, r10, 1;
setp.lt.u32 p2, r10, n;
@p2 bra LOOP;
"""
ISSUE = """
mad.lo.u32 r14, r13, 1024, r1;
cp.async.cg.shared.global [r14], [d1], 16;
add.s64 d1, d1, 1024;
add.u32 r12, r12, 1;
add.u32 r13, r13, 1;
setp.eq.u32 p3, r13, STAGES;
@p3 mov.u32 r13, 0;
"""


def pipeline(stages: int, left: int, ahead: int, last: str = "") -> str:
    """`ahead` copies are issued before the loop, in which all but `left` groups are waited for."""
    body = PIPELINE.replace("PROLOGUE", (ISSUE + COMMIT) * ahead).replace("ISSUE", ISSUE)
    return body.replace("LEFT", str(left)).replace("LAST", last).replace("STAGES", str(stages))


def run_pipeline(body: str, seed: int) -> tuple[set[str], bool]:
    """The kinds found, and whether the numbers are right; in six turns."""
    source = torch.arange(6 * 256, dtype=torch.int32)
    result = run(body, source, words(6 * 256), n=6, block=64, seed=seed, shared=3072)
    right = torch.equal(result.y.view(6, 64, 4).flip(1), source.view(6, 64, 4))
    return result.report.kinds(), right


@pytest.mark.parametrize(("stages", "left", "ahead"), [(2, 0, 1), (3, 1, 2), (3, 0, 1), (3, 0, 2)])
def test_pipeline(stages: int, left: int, ahead: int) -> None:
    for seed in SEEDS:
        assert run_pipeline(pipeline(stages, left, ahead), seed) == (set(), True)


def test_pipeline_with_a_barrier_at_the_end_of_a_turn() -> None:
    """Two stages, of which both are filled ahead, need a second barrier before the next copy: there is one."""
    for seed in SEEDS:
        assert run_pipeline(pipeline(2, 0, 1, "bar.sync 0;"), seed) == (set(), True)


def test_pipeline_that_waits_for_one_group_too_few() -> None:
    for seed in SEEDS:
        assert "async-unwaited" in run_pipeline(pipeline(3, 2, 2), seed)[0]
        assert "async-unwaited" in run_pipeline(pipeline(2, 1, 1), seed)[0]


def test_pipeline_that_fills_the_stage_being_read() -> None:
    """Two stages and two copies ahead: the third goes to the stage of this very turn."""
    for seed in SEEDS:
        kinds, _ = run_pipeline(pipeline(2, 1, 2), seed)
        assert kinds & {"race", "async-unwaited"}


def test_pipeline_without_its_barrier() -> None:
    """Each thread waits for its own copies, and reads another's."""
    body = pipeline(3, 1, 2).replace("bar.sync 0;", "")
    for seed in SEEDS:
        assert run_pipeline(body, seed)[0] & {"race", "async-unwaited"}


OVERWRITE = (
    COPY.replace("COMMIT", COMMIT).replace("BARRIER", BARRIER)
    + """
AFTER
cp.async.cg.shared.global [r1], [d1], 16;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
"""
)


def test_copy_over_what_is_still_read() -> None:
    body = OVERWRITE.replace("WAIT", "cp.async.wait_group 0;")
    for seed in SEEDS:
        run(body.replace("AFTER", BARRIER), SOURCE, words(256), block=64, seed=seed).clean()
        found = run(body.replace("AFTER", ""), SOURCE, words(256), block=64, seed=seed)
        assert found.report.kinds() & {"race", "async-unwaited"}


def test_writing_where_a_copy_is_under_way() -> None:
    body = COPY.replace("COMMIT", COMMIT).replace(
        "ld.shared.v4.u32 {r4, r5, r6, r7}, [r2]; // here", ""
    )
    body = body.replace("WAIT", "ONE\nst.shared.u32 [r1], tid; // here\nTWO").replace(
        "BARRIER", BARRIER
    )
    body = body.replace("{r4, r5, r6, r7}", "{tid, tid, tid, tid}")
    wait = "cp.async.wait_all;"
    run(body.replace("ONE", wait).replace("TWO", ""), SOURCE, words(256), block=64).clean()
    run(body.replace("ONE", "").replace("TWO", wait), SOURCE, words(256), block=64).only(
        "async-unwaited", "at @other"
    )


def test_zeros_in_place_of_what_is_not_there() -> None:
    """A source size of 0 reads nothing: its address may be out of bounds; the rest of a part is zero."""
    body = copy().replace("16; // other", "16, r20; // other")
    size = "setp.lt.u32 p0, tid, 20;\nselp.u32 r20, SIZE, 0, p0;\n"
    short = SOURCE[:80].clone()
    result = run(size.replace("SIZE", "16") + body, short, words(256), block=64).clean()
    assert result.y.view(64, 4).flip(0).flatten()[:80].equal(short)
    assert not result.y.view(64, 4).flip(0).flatten()[80:].any()
    result = run(size.replace("SIZE", "4") + body, short, words(256), block=64).clean()
    assert result.y.view(64, 4).flip(0)[:20].equal(torch.stack([short[::4], *[words(20)] * 3], 1))


def test_copy_out_of_bounds() -> None:
    bad = run(copy(), SOURCE[:252].clone(), words(256), block=64)
    first = bad.report.findings[0]
    assert (first.kind, first.line) == (
        "out-of-bounds",
        bad.line("other"),
    )
    body = copy().replace("[r1], [d1], 16", "[r1+3088], [d1], 16").replace("// here", "")
    body = body.replace("// other", "// here").replace("ld.shared", "// ld.shared")
    body = body.replace("st.global", "// st.global")
    run(body, SOURCE, block=64, shared=4112).clean()
    run(body, SOURCE, block=64).only("out-of-bounds", "writes shared bytes 4096 to 4111")


def test_misaligned_source() -> None:
    body = copy().replace("// here", "").replace("// other", "// here")
    body = body.replace("bar.sync 0;", "bar.sync 0;\nret;")
    run(body, SOURCE[4:], block=32).clean()
    run(body, SOURCE[1:], block=32).only("misaligned", "the source is not a multiple of 16")


def test_copy_of_an_output() -> None:
    """What is copied counts as written, so the fault is reported where it was copied."""
    body = copy().replace("// here", "").replace("// other", "// here")
    run(body, ptxemu.Output(SOURCE.clone()), words(256), block=64).only(
        "uninitialised", "copies global memory that was never written"
    )
