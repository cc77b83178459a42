"""mbarriers: their phases, and what they order."""

from __future__ import annotations

import pytest
import torch

from ptxemu import sm90
from ptxemu.checkers import words
from ptxemu.sm90 import init, wait

SEEDS = range(4)
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [bars];"
# y[4 tid] = r2
OUT = "mul.wide.u32 d0, tid, 4;\nadd.s64 d0, y, d0;\nst.global.u32 [d0], r2;\n"
# r2 = what thread tid + 32 wrote, modulo 64
OPPOSITE = "xor.b32 r1, tid, 32;\nmov.u32 r0, buffer;\nmad.lo.u32 r1, r1, 4, r0;\nld.shared.u32 r2, [r1]; // here\n"


def observed(actions: str, count: int) -> list[int]:
    """One thread does the actions on a barrier for `count` arrivals. Each TEST appends whether the phase is over
    whose state is q0; each PARITY whether the current phase is odd."""
    lines, tests = [], 0
    for action in actions.replace("\n", "").split(";"):
        action = action.strip()
        if action == "TEST":
            lines.append("mbarrier.test_wait.shared::cta.b64 p1, [bars], q0")
        elif action == "PARITY":
            lines.append("mbarrier.test_wait.parity.shared::cta.b64 p1, [bars], 0")
        else:
            lines.append(action)
            continue
        lines += ["selp.u32 r2, 1, 0, p1", f"st.global.u32 [y+{4 * tests}], r2"]
        tests += 1
    body = f"mbarrier.init.shared::cta.b64 [bars], {count};\n" + "".join(
        f"{line};\n" for line in lines
    )
    return sm90.run(body, y=words(tests), block=1).clean().y.tolist()


A = "mbarrier.arrive.shared::cta.b64 q0, [bars]"
SINK = "mbarrier.arrive.shared::cta.b64 _, [bars]"


@pytest.mark.parametrize(
    ("actions", "count", "expected"),
    [
        (f"{A}; TEST", 1, [1]),
        (f"{A}; TEST; {SINK}; TEST; {SINK}; TEST", 3, [0, 0, 1]),
        (f"{A}, 2; TEST; {SINK}, 1; TEST", 3, [0, 1]),
        (f"PARITY; {SINK}; PARITY; {SINK}; PARITY; {SINK}; PARITY", 1, [0, 1, 0, 1]),
        (f"{A}; TEST; {A}; TEST", 1, [1, 1]),
        (f"{A}; {SINK}; TEST; {SINK}; TEST", 2, [1, 1]),
        # Arrivals that drop leave fewer for the phases to come.
        (f"{A}; mbarrier.arrive_drop.shared::cta.b64 _, [bars]; TEST; {A}; TEST", 2, [1, 1]),
        (f"mbarrier.arrive_drop.shared::cta.b64 q0, [bars], 2; TEST; {A}, 2; TEST; {A}; TEST; {SINK}; TEST", 4,
         [0, 1, 0, 1]),
        ("mbarrier.arrive_drop.expect_tx.shared::cta.b64 q0, [bars], 8; TEST; "
         f"mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bars], 8; TEST; {SINK}; TEST", 2, [0, 0, 1]),
        # Bytes: the phase waits for as many as were announced, in whatever order they come.
        (f"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bars], 48; {A}; TEST; "
         "mbarrier.complete_tx.shared::cta.b64 [bars], 16; TEST; "
         "mbarrier.complete_tx.shared::cta.b64 [bars], 32; TEST", 1, [0, 0, 1]),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 q0, [bars], 48; TEST; "
         "mbarrier.complete_tx.shared::cta.b64 [bars], 48; TEST", 1, [0, 1]),
        ("mbarrier.complete_tx.shared::cta.b64 [bars], 48; mbarrier.arrive.expect_tx.shared::cta.b64 q0, [bars], 32; "
         "TEST; mbarrier.expect_tx.shared::cta.b64 [bars], 16; TEST", 1, [0, 0]),
        # An invalidated barrier may be initialised again, for another number.
        (f"{A}; TEST; mbarrier.inval.shared::cta.b64 [bars]; mbarrier.init.shared::cta.b64 [bars], 2; {A}; TEST; "
         f"{SINK}; TEST", 1, [1, 0, 1]),
    ],
)  # fmt: skip
def test_phases(actions: str, count: int, expected: list[int]) -> None:
    assert observed(actions, count) == expected
    generic = actions.replace(".shared::cta", "").replace("[bars]", "[q3]")
    convert = "mov.u32 r3, barriers; cvt.u64.u32 q2, r3; cvta.shared.u64 q3, q2;"
    assert observed(convert + generic, count) == expected


def test_try_wait_takes_states_and_times() -> None:
    body = (
        init(1)
        + """
    mov.u32 r2, 0;
    @!first bra END;
    mbarrier.arrive.shared::cta.b64 q0, [bars];
    mbarrier.try_wait.shared::cta.b64 p1, [bars], q0;
    selp.u32 r2, 1, 0, p1;
    mbarrier.try_wait.acquire.cluster.shared::cta.b64 p1, [bars], q0, 1000;
    @p1 add.u32 r2, r2, 10;
    mbarrier.try_wait.parity.shared::cta.b64 p1, [bars], 0, 1000;
    @p1 add.u32 r2, r2, 100;
    mbarrier.try_wait.parity.shared::cta.b64 p1, [bars], 1;
    @p1 add.u32 r2, r2, 1000;
    END:
    """
        + OUT
    )
    assert sm90.run(body, y=words(32)).clean().y[0] == 111


# ---- order


@pytest.mark.parametrize(
    "arrivals", [f"{ARRIVE}\n", "mbarrier.arrive.release.cta.shared::cta.b64 q0, [bars];\n"]
)
def test_what_was_written_before_arrivals_is_seen_after_the_wait(arrivals: str) -> None:
    body = init(64) + "st.shared.u32 [own], tid; // other\n" + arrivals + wait() + OPPOSITE + OUT
    for seed in SEEDS:
        result = sm90.run(body, y=words(64), block=64, seed=seed).clean()
        assert result.y.tolist() == [i ^ 32 for i in range(64)]
        # Without a wait, or with that for another phase, the order is chance.
        for other in ("", wait(1)):
            bad = sm90.run(body.replace(wait(), other), y=words(64), block=64, seed=seed)
            assert bad.report.kinds() & {"race", "uninitialised"}
        after = body.replace(arrivals, "").replace("st.shared", arrivals + "st.shared")
        assert "race" in sm90.run(after, y=words(64), block=64, seed=seed).report.kinds()


PIPELINE = """
// Warp 0 fills the stages of a ring with turn + lane, warp 1 adds up what it finds there.
mov.u32 r9, 0;
mov.u32 r10, 0; // turn
mov.u32 r11, buffer;
mad.lo.u32 r11, lane, 4, r11;
LOOP:
and.b32 r3, r10, 1; // stage
mad.lo.u32 r4, r3, 128, r11;
mad.lo.u32 r5, r3, 8, bars; // full, at + 16: empty
shr.u32 r6, r10, 1;
and.b32 r6, r6, 1; // parity
setp.eq.u32 p1, warp, 1;
@p1 bra CONSUME;
xor.b32 r7, r6, 1;
WAIT_EMPTY
add.u32 r8, r10, lane;
st.shared.u32 [r4], r8; // write
mbarrier.arrive.shared::cta.b64 _, [r5];
bra NEXT;
CONSUME:
WAIT_FULL
ld.shared.u32 r8, [r4]; // read
add.u32 r9, r9, r8;
mbarrier.arrive.shared::cta.b64 _, [r5+16];
NEXT:
add.u32 r10, r10, 1;
setp.lt.u32 p2, r10, n;
@p2 bra LOOP;
mov.u32 r2, r9;
"""
RING = init(32, 32, 32, 32) + PIPELINE + OUT
WAITS = {"WAIT_EMPTY": wait("r7", "r5+16"), "WAIT_FULL": wait("r6", "r5")}


def ring(**replaced: str) -> str:
    body = RING
    for name, text in (WAITS | replaced).items():
        body = body.replace(name, text)
    return body


def test_producer_and_consumer_over_many_phases() -> None:
    for seed in SEEDS:
        result = sm90.run(ring(), y=words(64), n=25, block=64, seed=seed).clean()
        assert result.y[32:].tolist() == [sum(range(25)) + 25 * lane for lane in range(32)]


@pytest.mark.parametrize(
    ("missing", "parity"), [("WAIT_FULL", ""), ("WAIT_EMPTY", ""), ("WAIT_EMPTY", "r6")]
)
def test_producer_and_consumer_that_do_not_wait(missing: str, parity: str) -> None:
    kinds: set[str] = set()
    for seed in SEEDS:
        text = wait(parity, "r5+16") if parity else ""
        result = sm90.run(ring(**{missing: text}), y=words(64), n=25, block=64, seed=seed)
        assert result.report.findings
        kinds |= result.report.kinds()
    assert kinds & {"race", "deadlock"}


# ---- cp.async that arrives

COPY = f"""
mul.wide.u32 d1, tid, 16;
add.s64 d1, x, d1;
mov.u32 r0, buffer;
mad.lo.u32 r1, tid, 16, r0;
cp.async.cg.shared.global [r1], [d1], 16; // copy
ARRIVAL
WAIT
xor.b32 r1, tid, 63;
mad.lo.u32 r1, r1, 16, r0;
ld.shared.u32 r2, [r1]; // here
{OUT}"""
NO_INCREMENT = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [bars];"
SOURCE = torch.arange(256, dtype=torch.int32)


@pytest.mark.parametrize(
    ("count", "arrival"),
    [
        (64, NO_INCREMENT),
        (64, "cp.async.mbarrier.arrive.shared.b64 [bars];\n" + ARRIVE),
    ],
)
def test_copies_that_arrive(count: int, arrival: str) -> None:
    body = init(count) + COPY.replace("ARRIVAL", arrival)
    for seed in SEEDS:
        result = sm90.run(
            body.replace("WAIT", wait()), SOURCE, words(64), block=64, seed=seed
        ).clean()
        assert result.y.tolist() == [4 * (i ^ 63) for i in range(64)]


def test_arriving_with_no_copies() -> None:
    """There is nothing to wait for: the arrival comes at once."""
    body = f"{init(64)}{NO_INCREMENT}\n"
    for text in (body, body + wait(), body.replace(".noinc", "") + ARRIVE + wait()):
        sm90.run(text, block=64).clean()


def test_copies_that_arrive_are_not_waited_for() -> None:
    body = init(64) + COPY.replace("ARRIVAL", NO_INCREMENT)
    own = body.replace("xor.b32 r1, tid, 63;", "mov.u32 r1, tid;")
    for seed in SEEDS:
        bad = sm90.run(body.replace("WAIT", "bar.sync 0;"), SOURCE, words(64), block=64, seed=seed)
        assert bad.report.kinds() <= {"race", "async-unwaited"} and bad.report.findings
        bad = sm90.run(own.replace("WAIT", ""), SOURCE, words(64), block=64, seed=seed)
        assert bad.report.kinds() == {"async-unwaited"}
        # The thread's own wait is as good for what it reads itself.
        good = own.replace("WAIT", "cp.async.wait_all;") + wait()
        sm90.run(good, SOURCE, words(64), block=64, seed=seed).clean()
