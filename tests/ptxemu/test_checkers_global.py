"""Races in global memory: between blocks, which a lock, a flag or a counter may order, and within one."""

from __future__ import annotations

import re

import pytest
import torch

from ptxemu.checkers import run, words

SEEDS = range(5)
OWN = "mul.wide.u32 d0, tid, 4;\nadd.s64 d0, x, d0;\n"


def test_two_blocks_write_different_values() -> None:
    body = OWN + "st.global.u32 [d0], VALUE; // here"
    for seed in SEEDS:
        run(body.replace("VALUE", "tid"), words(64), block=64, grid=3, seed=seed).clean()
        run(body.replace("VALUE", "block"), words(64), block=64, grid=3, seed=seed).only(
            "race",
            r"writes byte \d+ of x, which block \(\d, 0, 0\), warp \d wrote at @here with no synch",
        )


def test_what_every_block_writes_may_be_read_back() -> None:
    body = OWN + "st.global.u32 [d0], 7;\nld.global.u32 r0, [d0];\nst.global.u32 [y], r0;"
    for seed in SEEDS:
        run(body, words(64), words(1), block=64, grid=3, seed=seed).clean()


def test_elements_next_to_each_other_are_apart() -> None:
    """Blocks that write neighbouring halves of a word, or the same."""
    body = """
    mul.wide.u32 d0, tid, 4;
    mul.wide.u32 d1, block, STEP;
    add.s64 d0, d0, d1;
    add.s64 d0, x, d0;
    cvt.u16.u32 h0, block;
    st.global.u16 [d0], h0;
    """
    run(body.replace("STEP", "2"), words(32), grid=2).clean()
    assert run(body.replace("STEP", "0"), words(32), grid=2).report.kinds() == {"race"}


ADD = OWN + "ld.global.u32 r0, [d0]; // here\nadd.u32 r0, r0, 1;\nst.global.u32 [d0], r0; // other"


def test_sum_of_all_blocks_without_atomics() -> None:
    """The numbers are right as long as blocks run one after the other: only the order is missing."""
    for seed in SEEDS:
        run(ADD, words(32), seed=seed).clean()
        found = run(ADD, words(32), grid=3, seed=seed).report
        assert found.kinds() == {"race"}
        assert re.search(
            r"byte \d+ of x, which block \(\d, 0, 0\), warp 0 wro", found.findings[0].message
        )
    atomic = OWN + "red.global.add.u32 [d0], 1;"
    assert run(atomic, words(32), grid=3).clean().x.eq(3).all()


LOCK = """
setp.ne.u32 p0, tid, 0;
@p0 bra LOCKED;
SPIN:
TAKE
setp.ne.u32 p1, r0, 0;
@p1 bra SPIN;
AFTER
LOCKED:
bar.sync 0;
mul.wide.u32 d0, tid, 4;
add.s64 d0, y, d0;
ld.global.u32 r1, [d0];
add.u32 r1, r1, 1;
st.global.u32 [d0], r1;
BEFORE
BARRIER
@p0 bra END;
OPEN
END:
"""
FENCED = {
    "TAKE": "atom.global.cas.b32 r0, [x], 0, 1;",
    "AFTER": "membar.gl;",
    "BEFORE": "membar.gl;",
    "BARRIER": "bar.sync 0;",
    "OPEN": "atom.global.exch.b32 r2, [x], 0;",
}
ACQUIRED = {
    "TAKE": "atom.global.acquire.gpu.cas.b32 r0, [x], 0, 1;",
    "AFTER": "",
    "BEFORE": "",
    "BARRIER": "bar.sync 0;",
    "OPEN": "st.release.gpu.global.u32 [x], 0;",
}


@pytest.mark.parametrize("parts", [FENCED, ACQUIRED], ids=["fences", "acquire and release"])
@pytest.mark.parametrize("lost", ["", "TAKE", "BARRIER"])
def test_lock(parts: dict[str, str], lost: str) -> None:
    """What is added under a lock needs the lock, and all threads of the block behind it before it opens."""
    body = LOCK
    for name, text in parts.items():
        body = body.replace(
            name, text if name != lost else {"TAKE": "mov.u32 r0, 0;"}.get(name, "")
        )
    for seed in SEEDS:
        result = run(body, words(1), words(64), block=64, grid=5, seed=seed)
        if lost:
            assert "race" in result.report.kinds()
        else:
            assert result.clean().y.eq(5).all()


def test_lock_without_any_fence() -> None:
    """Relaxed atomics alone hand nothing over."""
    body = LOCK
    for name, text in FENCED.items():
        body = body.replace(name, "" if text == "membar.gl;" else text)
    for seed in SEEDS:
        assert run(body, words(1), words(64), block=64, grid=5, seed=seed).report.kinds() == {
            "race"
        }


LAST = """
// Each block leaves a sum; the one that counts last adds them up.
mul.wide.u32 d0, block, 4;
add.s64 d0, y, d0;
setp.ne.u32 p0, tid, 0;
@!p0 st.global.u32 [d0], block;
FENCE
bar.sync 0;
@p0 bra COUNTED;
atom.global.add.u32 r0, [x], 1;
st.shared.u32 [buffer], r0;
COUNTED:
bar.sync 0;
ld.shared.u32 r0, [buffer];
add.u32 r0, r0, 1;
setp.ne.u32 p1, r0, n;
@p1 bra END;
mul.wide.u32 d1, lane, 4;
add.s64 d1, y, d1;
ld.global.u32 r1, [d1];
bar.sync 0;
add.u32 r1, r1, 100;
st.global.u32 [d1+1024], r1;
END:
"""


def test_last_block_reads_what_all_have_written() -> None:
    for seed in SEEDS:
        good = LAST.replace("FENCE", "membar.gl;")
        result = run(good, words(1), words(512), 32, grid=32, seed=seed).clean()
        assert result.y[256:288].tolist() == list(range(100, 132))
        bad = run(LAST.replace("FENCE", ""), words(1), words(512), 32, grid=32, seed=seed)
        assert bad.report.kinds() == {"race"}


FLAG = """
setp.eq.u32 p0, block, 1;
@!p0 bra READ;
st.global.u32 [y], 5; // other
bar.warp.sync -1;
RAISE
ret;
READ:
POLL
setp.eq.u32 p1, r0, 0;
@p1 bra READ;
ld.global.u32 r1, [y]; // here
add.s64 d0, y, 4;
st.global.u32 [d0], r1;
"""


@pytest.mark.parametrize(
    ("raise_", "poll", "legal"),
    [
        (
            "membar.gl;\nst.volatile.global.u32 [x], 1;",
            "ld.volatile.global.u32 r0, [x];\nmembar.gl;",
            True,
        ),
        ("st.release.gpu.global.u32 [x], 1;", "ld.acquire.gpu.global.u32 r0, [x];", True),
        ("red.release.gpu.global.add.u32 [x], 1;", "ld.acquire.gpu.global.u32 r0, [x];", True),
        ("st.relaxed.gpu.global.u32 [x], 1;", "ld.relaxed.gpu.global.u32 r0, [x];", False),
    ],
)
def test_flag_between_blocks(raise_: str, poll: str, legal: bool) -> None:
    body = FLAG.replace("RAISE", raise_).replace("POLL", poll)
    for seed in SEEDS:
        result = run(body, words(1), words(2), grid=2, seed=seed)
        if legal:
            assert result.clean().y.tolist() == [5, 5]
        else:
            result.only(
                "race", r"reads byte 0 of y, which block \(1, 0, 0\), warp 0 wrote at @other"
            )


def test_sums_of_floats_are_no_flags() -> None:
    """Atomics may meet atomics; reading the sum needs an order that they do not make."""
    body = "red.global.add.f32 [x], 0f3F800000;\nREAD"
    for seed in SEEDS:
        assert (
            run(body.replace("READ", ""), torch.zeros(1), grid=4, seed=seed).clean().x.item() == 128
        )
        read = "ld.global.f32 f0, [x];\nst.global.f32 [y], f0;"
        result = run(body.replace("READ", read), torch.zeros(1), torch.zeros(1), grid=4, seed=seed)
        assert result.report.kinds() == {"race"}


def test_plain_store_among_atomics() -> None:
    body = "setp.eq.u32 p0, block, 0;\n@p0 st.global.u32 [x], 0;\n@!p0 red.global.add.u32 [x], 1;"
    found = [run(body, words(1), grid=4, block=1, seed=seed).report.kinds() for seed in SEEDS]
    assert {"race"} in found


WITHIN = """
mul.wide.u32 d0, tid, 4;
add.s64 d0, x, d0;
st.global.u32 [d0], tid; // other
SYNC
xor.b32 r1, tid, 33;
mul.wide.u32 d1, r1, 4;
add.s64 d1, x, d1;
ld.global.u32 r0, [d1]; // here
USE
"""


def test_warps_of_a_block() -> None:
    use = "add.s64 d2, y, d0;\nsub.s64 d2, d2, x;\nst.global.u32 [d2], r0;"
    for seed in SEEDS:
        body = WITHIN.replace("USE", use)
        good = run(body.replace("SYNC", "bar.sync 0;"), words(64), words(64), block=64, seed=seed)
        assert good.clean().y.tolist() == [i ^ 33 for i in range(64)]
        bad = run(body.replace("SYNC", ""), words(64), words(64), block=64, seed=seed)
        bad.only(
            "race", r"reads byte \d+ of x, which warp \d wrote at @other", "used as what it stores"
        )


def test_race_whose_value_is_not_used() -> None:
    """Lanes that hold a copy of another's element load it as well, and drop it."""
    run(WITHIN.replace("USE", "").replace("SYNC", ""), words(64), block=64).clean()


def test_lanes_of_a_warp() -> None:
    body = WITHIN.replace("33", "1").replace(
        "USE", "st.shared.u32 [own], r0;\nst.global.u32 [y], r0;"
    )
    body = body.replace(
        "st.global.u32 [y], r0;", "add.s64 d2, y, d0;\nsub.s64 d2, d2, x;\nst.global.u32 [d2], r0;"
    )
    run(body.replace("SYNC", "bar.warp.sync -1;"), words(32), words(32)).clean()
    run(body.replace("SYNC", ""), words(32), words(32)).only("race", "of the same warp wrote")
    same = OWN + "st.global.u32 [x], VALUE; // here"
    run(same.replace("VALUE", "n"), words(1)).clean()
    run(same.replace("VALUE", "tid"), words(1)).only(
        "race", "writes byte 0 of x, which lane 0 of the"
    )


def test_launches_are_ordered() -> None:
    x = words(32)
    for _ in range(3):
        run(ADD, x).clean()
    assert x.eq(3).all()
