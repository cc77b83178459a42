"""Counters: wavefronts of shared memory and sectors of global memory, of patterns whose figures are known."""

from __future__ import annotations

import pytest
import torch

from ptxemu.checkers import Result, run, words

SHARED = """
mul.lo.u32 r0, tid, STEP;
add.u32 r0, r0, START;
mov.u32 r1, buffer;
add.u32 r0, r0, r1;
mov.u32 r2, 0;
mov.u32 r3, 0;
mov.u32 r4, 0;
mov.u32 r5, 0;
ACCESS; // here
"""


def shared(access: str, step: int, start: int = 0) -> Result:
    body = SHARED.replace("ACCESS", access).replace("STEP", str(step)).replace("START", str(start))
    return run(body, shared=8192)


@pytest.mark.parametrize(
    ("access", "step", "start", "actual", "ideal"),
    [
        ("ld.shared.u32 r2, [r0]", 4, 0, 1, 1),
        ("ld.shared.u32 r2, [r0]", 4, 64, 1, 1),  # wherever it starts
        ("ld.shared.u32 r2, [r0]", 8, 0, 2, 1),
        ("ld.shared.u32 r2, [r0]", 16, 0, 4, 1),
        ("ld.shared.u32 r2, [r0]", 128, 0, 32, 1),
        ("ld.shared.u32 r2, [r0]", 132, 0, 1, 1),  # a column of padded rows
        ("ld.shared.u32 r2, [r0]", 0, 0, 1, 1),  # one word for all
        ("ld.shared.u8 r2, [r0]", 1, 0, 1, 1),
        ("ld.shared.u16 h0, [r0]", 2, 0, 1, 1),
        ("ld.shared.u16 h0, [r0]", 128, 0, 32, 1),
        ("ld.shared.v2.u32 {r2, r3}, [r0]", 8, 0, 2, 2),
        ("ld.shared.v2.u32 {r2, r3}, [r0]", 16, 0, 4, 2),
        ("ld.shared.v2.u32 {r2, r3}, [r0]", 128, 0, 32, 2),
        ("ld.shared.u64 d0, [r0]", 8, 0, 2, 2),
        ("ld.shared.v4.u32 {r2, r3, r4, r5}, [r0]", 16, 0, 4, 4),
        ("ld.shared.v4.u32 {r2, r3, r4, r5}, [r0]", 128, 0, 32, 4),
        ("ld.shared.v4.u32 {r2, r3, r4, r5}, [r0]", 144, 0, 4, 4),
        ("st.shared.u32 [r0], r2", 4, 0, 1, 1),
        ("st.shared.u32 [r0], r2", 128, 0, 32, 1),
        ("st.shared.v4.u32 [r0], {r2, r3, r4, r5}", 16, 0, 4, 4),
        ("st.shared.v4.u32 [r0], {r2, r3, r4, r5}", 32, 0, 8, 4),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r0]", 16, 0, 4, 4),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r0]", 128, 0, 32, 4),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r0]", 144, 0, 4, 4),
        ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {r2, r3, r4, r5}, [r0]", 64, 0, 16, 4),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {r2, r3}, [r0]", 128, 0, 16, 2),
    ],
)
def test_wavefronts(access: str, step: int, start: int, actual: int, ideal: int) -> None:
    """32 banks of a word; 8 and 16 bytes a lane go in halves and quarters of a warp."""
    result = shared(access, step, start)
    report = result.report
    assert (report.counters["shared_wavefronts"], report.counters["shared_wavefronts_ideal"]) == (
        actual,
        ideal,
    )
    conflicts = [(a.line, a.executed, a.actual, a.ideal) for a in report.conflicts()]
    assert conflicts == ([(result.line("here"), 1, actual, ideal)] if actual > ideal else [])


@pytest.mark.parametrize(
    ("swizzle", "actual"), [("and.b32 r6, lane, 7;", 4), ("mov.u32 r6, 0;", 32)]
)
@pytest.mark.parametrize("access", ["ldmatrix", "cp.async"])
def test_swizzle(access: str, swizzle: str, actual: int) -> None:
    """Rows of 128 bytes, chunk c of row r at place c ^ (r mod 8): a column of eight rows takes each bank once."""
    instruction = {
        "ldmatrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r0];",
        "cp.async": "cp.async.cg.shared.global [r0], [x], 16;",
    }[access]
    body = f"""
    {swizzle}
    xor.b32 r6, r6, 3;
    mov.u32 r1, buffer;
    mad.lo.u32 r0, lane, 128, r1;
    mad.lo.u32 r0, r6, 16, r0;
    {instruction}
    """
    report = run(body, words(4)).report
    assert report.counters["shared_wavefronts"] == actual
    assert report.counters["shared_wavefronts_ideal"] == 4


GLOBAL = """
mul.wide.u32 d0, tid, STEP;
add.s64 d0, d0, START;
add.s64 d0, x, d0;
mov.u32 r2, 0;
mov.u32 r3, 0;
mov.u32 r4, 0;
mov.u32 r5, 0;
ACCESS; // here
"""


@pytest.mark.parametrize(
    ("access", "step", "start", "actual", "ideal"),
    [
        ("ld.global.u32 r2, [d0]", 4, 0, 4, 4),
        ("ld.global.u32 r2, [d0]", 4, 4, 5, 4),  # misaligned by a word
        ("ld.global.u32 r2, [d0]", 4, 64, 4, 4),
        ("ld.global.u32 r2, [d0]", 8, 0, 8, 4),
        ("ld.global.u32 r2, [d0]", 128, 0, 32, 4),
        ("ld.global.u32 r2, [d0]", 0, 0, 1, 1),
        ("ld.global.u16 h0, [d0]", 2, 0, 2, 2),
        ("ld.global.u8 r2, [d0]", 1, 0, 1, 1),
        ("ld.global.v4.u32 {r2, r3, r4, r5}, [d0]", 16, 0, 16, 16),
        ("ld.global.v2.u32 {r2, r3}, [d0]", 16, 0, 16, 8),
        ("st.global.u32 [d0], r2", 4, 0, 4, 4),
        ("st.global.u32 [d0], r2", 64, 0, 32, 4),
        ("st.global.v4.u32 [d0], {r2, r3, r4, r5}", 16, 16, 17, 16),
    ],
)
def test_sectors(access: str, step: int, start: int, actual: int, ideal: int) -> None:
    """Sectors of 32 bytes that a warp touches, against the fewest that could hold its bytes."""
    body = GLOBAL.replace("ACCESS", access).replace("STEP", str(step)).replace("START", str(start))
    memory = torch.zeros(2048)
    memory = memory[(-memory.data_ptr() // 4) % 8 :]
    result = run(body, memory).clean()
    counters = result.report.counters
    assert (counters["sectors"], counters["sectors_ideal"]) == (actual, ideal)
    wasteful = [a.line for a in result.report.conflicts(shared=False)]
    assert wasteful == ([result.line("here")] if actual > ideal else [])


def test_lanes_in_any_order_touch_the_same_sectors() -> None:
    body = (
        "xor.b32 r0, tid, 21;\nmul.wide.u32 d0, r0, 4;\nadd.s64 d0, x, d0;\nld.global.u32 r1, [d0];"
    )
    counters = run(body, words(32)).clean().report.counters
    assert (counters["sectors"], counters["sectors_ideal"]) == (4, 4)


def test_only_lanes_that_take_part_are_counted() -> None:
    body = "setp.lt.u32 p0, tid, 8;\nmul.wide.u32 d0, tid, 4;\nadd.s64 d0, x, d0;\n"
    body += (
        "@p0 ld.global.u32 r1, [d0];\nmad.lo.u32 r2, tid, 124, own;\n@p0 st.shared.u32 [r2], tid;"
    )
    counters = run(body, words(8)).clean().report.counters
    assert (counters["sectors"], counters["shared_wavefronts"]) == (1, 8)


def test_instructions_are_counted_by_class() -> None:
    """Once for each warp that executes them, not at all where no lane does."""
    body = """
    setp.eq.u32 p0, warp, 0;
    mov.f32 f0, 0f3F800000;
    fma.rn.f32 f1, f0, f0, f0;
    @p0 ex2.approx.ftz.f32 f2, f0;
    @!p0 mul.f32 f2, f0, f0;
    st.shared.u32 [own], tid;
    bar.sync 0;
    ld.shared.u32 r0, [own];
    mov.u32 r1, 0;
    LOOP:
    shfl.sync.bfly.b32 r2, r0, 1, 31, -1;
    add.u32 r1, r1, 1;
    setp.lt.u32 p1, r1, 3;
    @p1 bra LOOP;
    """
    report = run(body, block=64, grid=2).clean().report
    got = {name: report.counters[name] for name in ("mufu", "sts", "lds", "bar", "shfl", "mma")}
    assert got == {"mufu": 2, "sts": 4, "lds": 4, "bar": 4, "shfl": 12, "mma": 0}
    assert report.counters["fp32"] == 4 + 2
    assert report.instructions >= sum(got.values())


@pytest.mark.parametrize(
    ("access", "step", "start", "actual", "ideal"),
    [
        ("cp.async.cg.shared.global [r0], [d0], 16", 16, 0, 16, 16),
        ("cp.async.cg.shared.global [r0], [d0], 16", 16, 16, 17, 16),
        ("cp.async.cg.shared.global [r0], [d0], 16", 32, 0, 32, 16),
        ("cp.async.cg.shared.global [r0], [d0], 16, 0", 32, 0, 0, 0),  # writes zeros
    ],
)
def test_copied_sectors(access: str, step: int, start: int, actual: int, ideal: int) -> None:
    """Of copies apart from those of loads and stores."""
    body = "mov.u32 r1, buffer;\nmad.lo.u32 r0, tid, 16, r1;\n" + GLOBAL
    body = body.replace("ACCESS", access).replace("STEP", str(step)).replace("START", str(start))
    memory = torch.zeros(2048)
    memory = memory[(-memory.data_ptr() // 4) % 8 :]
    counters = run(body + "cp.async.wait_all;", memory, shared=512).clean().report.counters
    assert (counters["copied_sectors"], counters["copied_sectors_ideal"]) == (actual, ideal)
    assert counters["sectors"] == 0
