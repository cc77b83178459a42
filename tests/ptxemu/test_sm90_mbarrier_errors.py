"""mbarriers that are used wrongly."""

from __future__ import annotations

import pytest

from ptxemu import PtxError, sm90
from ptxemu.checkers import words
from ptxemu.sm90 import init, wait

SEEDS = range(4)
ONE = "mbarrier.init.shared::cta.b64 [bars], 1;\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [bars];"
STATE = "mbarrier.arrive.shared::cta.b64 q0, [bars];\n"
TEST = "mbarrier.test_wait.shared::cta.b64 p1, [bars], q0; // here"
MEET = "bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{ARRIVE} // here", "no mbarrier was initialised at shared byte 4096"),
        (f"{ONE}mbarrier.inval.shared::cta.b64 [bars];\n{ARRIVE} // here", "no mbarrier was initialised"),
        ("mbarrier.test_wait.parity.shared::cta.b64 p1, [bars], 0; // here", "no mbarrier was initialised"),
        (f"{ONE}{ONE.strip()} // here", "initialises an mbarrier that is already there"),
        ("mbarrier.init.shared::cta.b64 [bars], 0; // here", "an mbarrier for 0 arrivals"),
        ("mbarrier.init.shared::cta.b64 [bars], 1048576; // here", "an mbarrier for 1048576 arrivals"),
        (f"{ONE}mbarrier.arrive.shared::cta.b64 _, [bars], 2; // here", "2 arrivals at an mbarrier that expects 1"),
        (f"{ONE}mov.u32 r1, 0;\nmbarrier.arrive.shared::cta.b64 _, [bars], r1; // here", "0 arrivals at an mbarrier"),
        (f"{ONE}mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 16;\n{ARRIVE} // here", "1 arrivals .* expects 0"),
        (f"{ONE}mbarrier.expect_tx.shared::cta.b64 [bars], 1048576; // here", "waits for 1048576 bytes"),
        (f"{ONE}mbarrier.complete_tx.shared::cta.b64 [bars], 1048576; // here", "waits for -1048576 bytes"),
        (f"{ONE}mov.u32 r1, 2;\nmbarrier.test_wait.parity.shared::cta.b64 p1, [bars], r1; // here", "a parity of 2"),
        (f"{ONE}mov.b64 q0, 1;\n{TEST}", "the state is of neither the current nor the last phase"),
        (f"{ONE}{STATE}{ARRIVE}\n{ARRIVE}\n{TEST}", "the state is of neither the current nor the last phase"),
        ("mbarrier.init.b64 [y], 1; // here", "not in the block's own shared memory"),
    ],
)  # fmt: skip
def test_wrong_use(body: str, message: str) -> None:
    sm90.run(body, y=words(64), block=1).first("invalid", message)


def test_places() -> None:
    init_ = "mbarrier.init.shared::cta.b64 [bars+{}], 1; // here"
    sm90.run(init_.format(4), block=1).only("misaligned", "is not a multiple of 8")
    sm90.run(init_.format(64), block=1).only("out-of-bounds", "shared bytes 4160 to 4167")


def test_initialisation_is_seen_without_synchronisation() -> None:
    body = f"{init(64)}\n{ARRIVE}\n{wait()}"
    for seed in range(8):
        sm90.run(body, block=64, seed=seed).clean()
        result = sm90.run(body.replace(MEET, ""), block=64, seed=seed)
        assert result.report.kinds() & {"race", "invalid"}


def test_another_thread_initialises_while_it_is_in_use() -> None:
    body = f"""{init(1)}
    @first {ARRIVE}
    {wait()}
    {MEET}
    @first mbarrier.inval.shared::cta.b64 [bars];
    {MEET}
    setp.eq.u32 p1, tid, 32;
    @p1 mbarrier.init.shared::cta.b64 [bars], 1;
    """
    for seed in SEEDS:
        sm90.run(body, block=64, seed=seed).clean()
        for first, second in (("", MEET), (MEET, "")):
            before, between, after = body.rsplit(MEET, 2)
            text = before + first + between + second + after
            assert sm90.run(text, block=64, seed=seed).report.kinds() & {"race", "invalid"}


@pytest.mark.parametrize("expected", [16, 48])
def test_deadlock_of_a_wrong_number_of_bytes(expected: int) -> None:
    """32 bytes come."""
    body = f"""{init(1)}
    mov.u32 r0, buffer;
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 32;
    @first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [r0], [x], 32, [bars];
    {wait().replace("AGAIN;", "AGAIN; // loop")}
    """
    for seed in SEEDS:
        sm90.run(body, words(8), block=64, seed=seed).clean()
        result = sm90.run(body.replace("], 32;", f"], {expected};"), words(8), block=64, seed=seed)
        (finding,) = result.report.findings
        assert finding.kind == "deadlock" and finding.message.startswith("every warp polls in vain")
        places = [
            f"32 lanes at PTX line {result.line('loop') + i}" for i in (-1, 0)
        ]  # the wait, the branch
        for warp in (0, 1):
            assert any(f"warp {warp}: {place}" in finding.message for place in places)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("mbarrier.init.shared::cluster.b64 [bars], 1", "the block's own"),
        ("mbarrier.arrive.shared::cluster.b64 q0, [bars]", "the block's own"),
        ("mbarrier.test_wait.shared::cluster.b64 p1, [bars], q0", "the block's own"),
        ("mbarrier.arrive.shared::cta.b64 [bars]", "needs a result"),
        ("mbarrier.test_wait.shared::cta.b64 _, [bars], q0", "needs a predicate"),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars]", "operands"),
        ("mbarrier.test_wait.shared::cta.b64 p1, [bars], q0, 5", "operands"),
        ("mbarrier.init.shared::cta.b32 [bars], 1", "needs .b64"),
        ("mbarrier.pending_count.b64 r0, q0", "needs one of"),
    ],
)
def test_refused(instruction: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        sm90.run(instruction + ";")
