"""Bulk copies without a tensor map (cp.async.bulk), to and from global memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptxemu import Output, sm90
from ptxemu.checkers import Result, words
from ptxemu.sm90 import BUFFER, COMMIT, END, FENCE, READ_ALL, bulk_load, bulk_store, init, wait

SEEDS = range(4)
# Thread i: y[i] = word i of the buffer.
OUT = """
ld.shared.u32 r2, [own]; // read
mul.wide.u32 d0, tid, 4;
add.s64 d0, y, d0;
st.global.u32 [d0], r2;
"""
HERE = " // here"


def expect(bytes_: int | str) -> str:
    return f"@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {bytes_};\n"


def load(bytes_: int | str, to: str = "r0", of: str = "x", mark: str = "") -> str:
    return expect(bytes_) + bulk_load(bytes_, to, of, mark)


def source(count: int = 256) -> torch.Tensor:
    return torch.arange(100, 100 + count, dtype=torch.int32)


@pytest.mark.parametrize("count", [4, 8, 60, 256])
def test_load(count: int) -> None:
    """Of `count` words and no more, to the places of the threads."""
    body = f"""{init(1)}{BUFFER}
    st.shared.u32 [own], 7;
    {FENCE}
    bar.sync 0;
    mul.lo.u32 r3, n, 4;
    {load("r3")}{wait()}{OUT}
    """
    for seed in SEEDS:
        result = sm90.run(body, source(), words(256), n=count, block=256, seed=seed).clean()
        assert result.y.tolist() == [*range(100, 100 + count), *[7] * (256 - count)]


def test_loads_of_nothing_and_in_parts() -> None:
    """Two copies on one barrier; the bytes may be announced after they have come."""
    parts = bulk_load(64) + bulk_load(64, "r0+64", "x+64")
    nothing = bulk_load(0)
    for order in (expect(128) + parts, parts + expect(128), nothing + parts + expect(128)):
        body = init(1) + BUFFER + order + wait() + OUT
        for seed in SEEDS:
            result = sm90.run(body, source(), words(32), seed=seed).clean()
            assert torch.equal(result.y, source()[:32])


def fails(
    body: str, kind: str, message: str, x: torch.Tensor | Output | None = None, **options: Any
) -> None:
    for seed in SEEDS:
        given = source() if x is None else x
        sm90.run(body, given, words(256), seed=seed, **options).first(kind, message)


MULTIPLES = "bulk copies are of multiples of 16 bytes, at such addresses"
ODD = "mov.u32 r5, 24;\n"


@pytest.mark.parametrize(
    ("copy", "kind", "message"),
    [
        (ODD + load("r5", mark=HERE), "misaligned", MULTIPLES),
        (load(32, of="x+8", mark=HERE), "misaligned", MULTIPLES),
        (load(32, to="r0+8", mark=HERE), "misaligned", "is not a multiple of 16"),
        (load(32, of="x+1008", mark=HERE), "out-of-bounds", "that end 16 bytes past the end of x"),
        (load(32, to="r0+4144", mark=HERE), "out-of-bounds", "writes shared bytes 4144 to 4175, the block has 4160"),
        (ODD + bulk_store("r5", mark=HERE), "misaligned", MULTIPLES),
        (bulk_store(32, to="y+8", mark=HERE), "misaligned", MULTIPLES),
        (bulk_store(32, of="r0+8", mark=HERE), "misaligned", "is not a multiple of 16"),
        (bulk_store(32, to="y+1008", mark=HERE), "out-of-bounds", "that end 16 bytes past the end of y"),
        (bulk_store(32, of="r0+4144", mark=HERE), "out-of-bounds", "reads shared bytes 4144 to 4175"),
        (bulk_store(32, mark=HERE), "uninitialised", "copies shared memory that was never written, from byte 0"),
    ],
)  # fmt: skip
def test_wrong_places(copy: str, kind: str, message: str) -> None:
    fails(init(1) + BUFFER + copy, kind, message)


def test_barrier_of_a_load() -> None:
    no_barrier = BUFFER + bulk_load(32, mark=HERE)
    fails(no_barrier, "invalid", "no mbarrier was initialised at shared byte 4096")
    unwritten = init(1) + BUFFER + load(32, mark=HERE) + wait()
    message = "copies global memory that was never written"
    fails(unwritten, "uninitialised", message, Output(source()))


def test_exit_without_waiting_for_a_load() -> None:
    """A copy that comes to its end in time is not seen: some seed shows it."""
    body = init(1) + BUFFER + load(32, mark=HERE)
    for seed in range(30):
        result = sm90.run(body, source(), seed=seed)
        if result.report.findings:
            message = "the block exits while this copy to its shared memory is under way"
            result.only("async-unwaited", message)
            return
    pytest.fail("no seed lets the block exit first")


def test_barrier_that_is_gone_when_the_copy_ends() -> None:
    body = f"{init(1)}{BUFFER}{load(32, mark=HERE)}@first mbarrier.inval.shared::cta.b64 [bars];\n"
    spin = "mov.u32 r9, 0;\nLOOP:\nadd.u32 r9, r9, 1;\nsetp.lt.u32 p0, r9, 9000;\n@p0 bra LOOP;\n"
    message = "its mbarrier has been invalidated when the copy ends"
    fails(body + spin, "invalid", message)


# ---- what loads order


def test_read_before_the_wait() -> None:
    body = init(1) + BUFFER + load(128) + "WAIT\n" + OUT.replace("// read", "// here")
    for seed in SEEDS:
        good = sm90.run(body.replace("WAIT", wait()), source(), words(32), seed=seed)
        assert torch.equal(good.clean().y, source()[:32])
        for instead in ("", "bar.sync 0;", wait(1)):
            bad = sm90.run(body.replace("WAIT", instead), source(), words(32), seed=seed)
            finding = next(f for f in bad.report.findings if f.line == bad.line("here"))
            # Under way, or finished without anybody knowing.
            assert finding.kind in ("async-unwaited", "race")


def test_write_before_the_wait() -> None:
    write = "st.shared.u32 [own], 1; // here\n"
    before, after = init(1) + BUFFER + load(128), wait() + "\n"
    sm90.run(before + after + write, source(), words(32)).clean()
    for seed in SEEDS:
        result = sm90.run(before + write + after, source(), words(32), seed=seed)
        finding = result.report.findings[0]
        assert finding.kind in ("async-unwaited", "race") and finding.line == result.line("here")


STAGE = f"""{init(1)}{BUFFER}
// One stage, filled n times; all threads read it.
mov.u32 r9, 0; // turn
mov.u32 r10, 0; // parity
mov.u32 r3, 0;
mov.b64 d1, x;
LOOP:
{load(256, of="d1")}{wait("r10")}
ld.shared.u32 r2, [own]; // read
add.u32 r3, r3, r2;
RELEASE
add.s64 d1, d1, 256;
add.u32 r9, r9, 1;
xor.b32 r10, r10, 1;
setp.lt.u32 p2, r9, n;
@p2 bra LOOP;
mul.wide.u32 d0, tid, 4;
add.s64 d0, y, d0;
st.global.u32 [d0], r3;
"""


def test_stage_is_filled_while_it_is_read() -> None:
    """Between the last read of a turn and the next copy all threads have to meet."""
    found: set[str] = set()
    x = source(320)
    for seed in SEEDS:
        good = STAGE.replace("RELEASE", "bar.sync 0;")
        result = sm90.run(good, x, words(64), n=5, block=64, seed=seed).clean()
        assert torch.equal(result.y, x.view(5, 64).sum(0, dtype=torch.int32))
        bad = sm90.run(STAGE.replace("RELEASE", ""), x, words(64), n=5, block=64, seed=seed)
        assert bad.report.findings  # a warp that misses a phase may wait for it for ever
        found |= bad.report.kinds()
    assert found & {"race", "async-unwaited"}


# ---- stores

FILL = BUFFER + "add.u32 r3, tid, 5;\nst.shared.u32 [own], r3; // write\n"
READY = f"{FILL}{FENCE}\nbar.sync 0;\n"


@pytest.mark.parametrize("wait_", [READ_ALL, "cp.async.bulk.wait_group 0;"])
def test_store(wait_: str) -> None:
    body = READY + bulk_store(192) + COMMIT + wait_
    for seed in SEEDS:
        result = sm90.run(body, y=words(64), block=64, seed=seed).clean()
        assert result.y.tolist() == [*range(5, 53), *[0] * 16]


def test_store_without_a_fence() -> None:
    """The writers may fence before the barrier, or who stores after it."""
    store = bulk_store(192, mark=HERE) + END
    message = (
        r"reads shared byte \d+ through the asynchronous proxy; .*no fence.proxy.async between"
    )
    for seed in SEEDS:
        late = FILL + "bar.sync 0;\n" + FENCE + "\n" + store
        sm90.run(late, y=words(64), block=64, seed=seed).clean()
        missing = sm90.run(late.replace(FENCE, ""), y=words(64), block=64, seed=seed)
        missing.only("async-unwaited", message)
        alone = sm90.run(late.replace("bar.sync 0;", ""), y=words(64), block=64, seed=seed)
        assert alone.report.kinds() & {"race", "uninitialised"}


@pytest.mark.parametrize(
    "end", ["", COMMIT, READ_ALL, READ_ALL + COMMIT, COMMIT + "cp.async.bulk.wait_group.read 1;"]
)
def test_exit_without_waiting_for_a_store(end: str) -> None:
    body = READY + bulk_store(192) + end + "\nret; // here\n"
    message = "exits while a bulk copy from shared memory is under way, not waited for"
    fails(body, "async-unwaited", message, block=64)


def test_groups_of_stores() -> None:
    """The memory of the first of two groups may be written when at most one is left."""
    body = f"""{READY}
    {bulk_store(64)}{COMMIT}
    {bulk_store(64, to="y+64", of="r0+64")}{COMMIT}
    @first cp.async.bulk.wait_group.read 1;
    @first st.shared.u32 [r0+60], 1; // here
    {READ_ALL}
    """
    for seed in SEEDS:
        result = sm90.run(body, y=words(64), seed=seed).clean()
        assert result.y[:32].tolist() == [*range(5, 37)]
        for text in (body.replace("r0+60", "r0+64"), body.replace("read 1", "read 2")):
            result = sm90.run(text, y=words(64), seed=seed)
            result.only("race", r"writes shared byte \d+, which .* reads or has read")


# ---- to several blocks


def multicast(mask: int, size: int = 2) -> Result:
    """Block 0 of a cluster loads for those in the mask; each of them waits."""
    copy = (
        bulk_load(128, mark=HERE)
        .replace("@first", "@p1")
        .replace("bytes [", "bytes.multicast::cluster [")
    )
    body = f"""{init(1)}{BUFFER}{expect(128)}
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u16 h0, {mask};
    setp.eq.and.u32 p1, rank, 0, first;
    {copy.replace("];", "], h0;")}
    mov.u32 r4, {mask};
    shr.u32 r4, r4, rank;
    and.b32 r4, r4, 1;
    setp.eq.u32 p1, r4, 0;
    @p1 bra END;
    {wait()}
    ld.shared.u32 r2, [own];
    mad.lo.u32 r5, rank, 32, tid;
    mul.wide.u32 d0, r5, 4;
    add.s64 d0, y, d0;
    st.global.u32 [d0], r2;
    END:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    """
    return sm90.run(body, source(32), words(32 * size), grid=size, cluster=size, seed=mask)


@pytest.mark.parametrize(("mask", "size"), [(1, 2), (2, 2), (3, 2), (0b1010, 4), (0b1111, 4)])
def test_multicast(mask: int, size: int) -> None:
    rows = multicast(mask, size).clean().y.view(size, 32)
    for rank in range(size):
        assert torch.equal(rows[rank], source(32) if mask >> rank & 1 else words(32))


def test_multicast_to_blocks_that_are_not_there() -> None:
    multicast(0b101).first("invalid", "a mask of blocks that the cluster does not have")
