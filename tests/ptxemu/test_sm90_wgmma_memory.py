"""wgmma: shared memory that it reads on its own, and the warps that take part."""

from __future__ import annotations

import re

import torch

from ptxemu import TensorMap, sm90
from ptxemu.checkers import Result, words
from ptxemu.gmma_kernel import (
    ARRIVE,
    BODY,
    COMMIT,
    DESCRIPTORS,
    MEET,
    OPERANDS,
    OUT,
    PROXY,
    STORE_A,
    STORE_B,
    clean,
    each_seed,
    fails,
    mma,
    wait_group,
    zero,
)
from ptxemu.sm90 import init, wait

MARKED = BODY.replace(mma(), mma(mark="here"))
END = zero() + ARRIVE + mma(mark="here") + COMMIT + wait_group() + OUT


def test_operands_are_not_fenced() -> None:
    """The writers have to fence, or who multiplies, once it has seen the writes."""
    message = r"reads shared byte \d+ through the asynchronous proxy; .* wrote it at @plain"
    fails(MARKED.replace(PROXY, ""), message)
    fails(MARKED.replace(PROXY, "@first " + PROXY), message)
    clean(BODY.replace(PROXY + MEET, MEET + PROXY))


def test_a_fence_of_half_of_the_writers() -> None:
    """Two warps write the halves of each 16 bytes, and only the first fences."""
    body = f"""{DESCRIPTORS}{STORE_A}{STORE_B}{PROXY}{MEET}
    setp.lt.u32 p1, warp, 2;
    setp.eq.u32 p2, warp, 0;
    mov.u32 r0, buffer;
    mad.lo.u32 r0, lane, 16, r0;
    mad.lo.u32 r0, warp, 8, r0;
    @p1 st.shared.v2.u32 [r0+2048], {{r4, r4}};
    @p2 {PROXY}{MEET}{END}"""
    fails(body, "through the asynchronous proxy; warp 1 wrote it")
    clean(body.replace("@p2 ", ""))


def test_missing_barrier() -> None:
    """The fence and the wait are each thread's own."""
    for result in each_seed(BODY.replace(MEET, "")):
        assert "race" in result.report.kinds()


STORE = "st.shared.u32 [own+2048], tid; // here\n"


def test_operands_are_overwritten_before_the_wait() -> None:
    clean(BODY.replace(wait_group(), wait_group() + MEET + STORE))
    for result in each_seed(BODY.replace(wait_group(), STORE + wait_group())):
        finding = result.report.findings[0]
        assert (finding.kind, finding.line) == ("race", result.line("here"))
        assert re.search(r"writes shared byte \d+, which .* reads or has read", finding.message)
    # Other warps may still multiply.
    for result in each_seed(BODY.replace(wait_group(), wait_group() + STORE)):
        assert result.report.kinds() == {"race"}


def test_an_operand_that_a_later_product_still_reads() -> None:
    """The second product reads B, too; only the first has been waited for."""
    body = OPERANDS + zero() + zero(4) + ARRIVE + mma() + COMMIT + mma(4) + COMMIT + wait_group(1)
    store = "@first " + STORE
    clean(body + wait_group() + MEET + store + OUT)
    for result in each_seed(body + MEET + store + wait_group() + OUT):
        assert {(f.kind, f.line) for f in result.report.findings} == {("race", result.line("here"))}


def refill(early: str, late: str, waits: str = "r9") -> list[Result]:
    """The copy engine fills B, multiplies, and fills it again when all warps have said that they are done with it."""
    body = f"""{DESCRIPTORS}{STORE_A}{PROXY}{MEET}{init(1, 4)}{zero()}
    mov.u32 r8, buffer;
    mov.u32 r9, 0; // turn, and parity of the copies
    setp.eq.u32 p4, lane, 0;
    LOOP:
    setp.eq.u32 p1, r9, 0;
    xor.b32 r10, r9, 1;
    @p1 bra FILL;
    {wait("r10", "bars+8")}
    FILL:
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;
    @first cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [r8+2048], [m0, {{0}}], [bars];
    {wait(waits)}
    {ARRIVE}{mma()}{COMMIT}{early}{wait_group()}{late}
    add.u32 r9, r9, 1;
    setp.lt.u32 p3, r9, 2;
    @p3 bra LOOP;
    {OUT}"""
    tensor = TensorMap(torch.ones(256, dtype=torch.bfloat16), (256,))
    return [sm90.run(body, words(128), maps=[tensor], block=128, seed=seed) for seed in range(3)]


def test_a_copy_into_operands_in_use() -> None:
    release = "@p4 mbarrier.arrive.shared::cta.b64 _, [bars+8];\n"
    for result in refill("", release):
        assert (result.clean().x.view(torch.float32) == 32).all()
    assert {f.kind for result in refill(release, "") for f in result.report.findings} == {"race"}
    # The wait for the phase before is over at once, while the copy is under way.
    found = [result.report.kinds() for result in refill("", release, waits="r10")]
    assert set().union(*found) & {"async-unwaited", "race"}


def test_descriptor_out_of_bounds() -> None:
    """The block has `buffer` and eight mbarriers."""
    body = MARKED.replace("0x1000080080", "0x1000080104")
    fails(body, r"the matrix reaches shared byte \d+, the block has 4160", kind="out-of-bounds")


def test_operands_that_were_never_written() -> None:
    message = "multiplies shared memory that was never written, at byte 2048"
    fails(MARKED.replace(STORE_B, ""), message, kind="uninitialised")


# ---- who takes part


def test_half_a_warpgroup() -> None:
    for block in (32, 96):
        for result in each_seed(MARKED, block):
            messages = [f.message for f in result.report.findings if f.kind == "invalid"]
            assert len(messages) == 1 and messages[0].startswith("needs a warpgroup: four warps")


def test_lanes_that_differ() -> None:
    add = "cvt.u64.u32 d5, lane;\nshl.b64 d5, d5, 32;\nadd.u64 d3, d3, d5;\n"
    for result in each_seed(MARKED.replace(ARRIVE, add + ARRIVE)):
        result.first("invalid", "the lanes have different matrix descriptors")
    mixed = MARKED.replace("d4, 1, 1, 1", "d4, p1, 1, 1")
    fails(
        mixed.replace(ARRIVE, f"setp.eq.u32 p1, lane, 3;\n{ARRIVE}"),
        "different scale-d",
        kind="invalid",
    )


def test_bits_that_a_descriptor_does_not_have() -> None:
    """The base offset, for patterns that do not start where addresses repeat, is not supported."""
    message = "a base offset, or with other bits set, is not supported"
    for bits in ("0x2001000080080", "0x1000084080"):
        for result in each_seed(MARKED.replace("0x1000080080", bits)):
            result.first("invalid", message)
