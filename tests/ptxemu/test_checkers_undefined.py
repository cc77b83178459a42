"""Values that were never written: reported where they matter, followed until there, and dropped where they do not."""

from __future__ import annotations

import pytest
import torch

import ptxemu
from ptxemu.checkers import run, words

PLACE = "mul.wide.u32 d0, tid, 4;\nadd.s64 d1, x, d0;\n"

STORE = PLACE + "st.global.u32 [d1], r0; // here"


def test_register_never_written_is_stored() -> None:
    run("mov.u32 r0, 7;\n" + STORE, words(32)).clean()
    run(STORE, words(32)).only(
        "uninitialised",
        "uses an undefined value as what it stores; the register was never written",
        "lane 0 and 31 more",
    )


def test_register_written_by_some_lanes() -> None:
    body = "setp.lt.u32 p0, tid, 20;\n@p0 mov.u32 r0, 7;\nOTHERS\n" + STORE
    run(body.replace("OTHERS", "@!p0 mov.u32 r0, 8;"), words(32)).clean()
    run(body.replace("OTHERS", ""), words(32)).only("uninitialised", "lane 20 and 11 more")


def test_undefined_value_is_followed_to_its_use() -> None:
    """The message says where it came in, not where it passed through."""
    body = """
    add.u32 r1, r2, 1; // other
    mul.lo.u32 r3, r1, 3;
    cvt.rn.f32.u32 f0, r3;
    fma.rn.f32 f1, f0, f0, 0f3F800000;
    cvt.rzi.u32.f32 r0, f1;
    """
    run("mov.u32 r2, 2;\n" + body + STORE, words(32)).clean()
    run(body + STORE, words(32)).only("uninitialised", "as what it stores; it comes from @other")


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (
            "mul.wide.u32 d2, r0, 4;\nadd.s64 d2, x, d2;\nld.global.u32 r1, [d2]; // here",
            "an address",
        ),
        (
            "shl.b32 r1, r0, 2;\nadd.u32 r1, r1, own;\nst.shared.u32 [r1], tid; // here",
            "an address",
        ),
        ("setp.eq.u32 p0, r0, 0;\n@p0 bra ON; // here\nmov.u32 r1, 0;\nON:", "a condition"),
        ("setp.eq.u32 p0, r0, 0;\n@p0 mov.u32 r1, 0; // here", "a condition"),
        (
            "T: .branchtargets A, B;\nbrx.idx r0, T; // here\nA: ret;\nB: ret;",
            "the index of a branch",
        ),
        ("setp.eq.u32 p0, r0, 0;\nvote.sync.any.pred p1, p0, -1; // here", "a vote"),
        ("bar.sync r0; // here", "the number of a barrier"),
        ("red.global.add.u32 [x], r0; // here", "what an atomic operation uses"),
        ("atom.global.cas.b32 r1, [x], 0, r0; // here", "what an atomic operation uses"),
    ],
)
def test_uses_that_matter(use: str, what: str) -> None:
    run("mov.u32 r0, 0;\n" + use, words(1)).clean()
    run(use, words(1)).first("uninitialised", f"uses an undefined value as {what}")


def test_condition_of_some_lanes() -> None:
    body = "setp.lt.u32 p0, tid, 8;\n@p0 setp.lt.u32 p1, tid, 4;\nGUARD bra ON; // here\nON:"
    run(body.replace("GUARD", "@p0")).clean()
    run(body.replace("GUARD", "@p1")).only("uninitialised", "lane 8 and 23 more")


SHARED = "WRITE\nbar.sync 0;\nadd.u32 r1, own, 4;\nld.shared.u32 r0, [r1]; // other\n" + STORE


def test_shared_memory_never_written() -> None:
    half = "mad.lo.u32 r2, tid, 4, own;\nst.shared.u32 [r2], tid;"  # every other word
    whole = "st.shared.u32 [own], tid;\nst.shared.u32 [own+128], tid;"
    run(SHARED.replace("WRITE", whole), words(32)).clean()
    run(SHARED.replace("WRITE", "st.shared.u32 [own], tid;"), words(32)).only(
        "uninitialised", "as what it stores; it comes from @other", r"lane 31\]"
    )
    run(SHARED.replace("WRITE", half), words(32)).only("uninitialised", "lane 0 and 15 more")


def test_undefined_value_passes_through_shared_memory() -> None:
    """Storing one there is no fault (a tile's padding may be); using what is read back is."""
    body = SHARED.replace("WRITE", "st.shared.u32 [own], r2;\nst.shared.u32 [own+128], tid;")
    run(body, words(32)).only("uninitialised", "lane 0 and 30 more")
    run("mov.u32 r2, 1;\n" + body, words(32)).clean()
    run(body.split("mul.wide")[0]).clean()


def test_undefined_value_passes_through_local_memory() -> None:
    body = """
    .local .align 4 .b8 place[8];
    st.local.u32 [place], tid;
    ld.local.u32 r0, [place+OFFSET]; // other
    """
    run(body.replace("OFFSET", "0") + STORE, words(32)).clean()
    run(body.replace("OFFSET", "4") + STORE, words(32)).only("uninitialised", "from @other")


def test_memory_of_an_output() -> None:
    """Reading an Output before writing it is a finding, after writing it is not."""
    body = PLACE + "WRITE\nld.global.u32 r0, [d1]; // other\nadd.s64 d2, y, d0;\n"
    body += "st.global.u32 [d2], r0; // here"
    written = body.replace("WRITE", "st.global.u32 [d1], tid;")
    assert run(written, ptxemu.Output(words(32)), words(32)).clean().y[3] == 3
    unwritten = body.replace("WRITE", "")
    run(unwritten, words(32), words(32)).clean()
    run(unwritten, ptxemu.Output(words(32)), words(32)).only("uninitialised", "from @other")


def test_output_is_followed_byte_by_byte() -> None:
    body = "st.global.u8 [x+1], n;\nld.global.u8 r0, [x+OFFSET];\nst.global.u8 [y], r0; // here"
    output = ptxemu.Output(words(1))
    run(body.replace("OFFSET", "1"), output, words(1)).clean()
    run(body.replace("OFFSET", "2"), output, words(1)).only("uninitialised")


def test_asynchronous_copy_of_what_was_never_written() -> None:
    body = "cp.async.ca.shared.global [buffer], [x], 16; // here\ncp.async.wait_all;"
    run("setp.eq.u32 p0, tid, 0;\n@p0 " + body, words(4)).clean()
    run("setp.eq.u32 p0, tid, 0;\n@p0 " + body, ptxemu.Output(words(4))).only(
        "uninitialised", "copies global memory that was never written"
    )


def test_atomic_on_memory_never_written() -> None:
    body = "red.shared.add.u32 [own], 1; // here"
    run("st.shared.u32 [own], tid;\n" + body).clean()
    run(body).only("uninitialised", "an atomic operation on memory that was never written")
    run("atom.shared.exch.b32 r0, [own], tid;\n" + body).clean()


def test_generic_store_matters_as_a_global_one_does() -> None:
    body = "cvta.global.u64 d2, x;\nst.u32 [d2], r0; // here"
    run("mov.u32 r0, 1;\n" + body, words(1)).clean()
    run(body, words(1)).only("uninitialised", "what it stores")
    to_shared = "cvt.u64.u32 d2, own;\ncvta.shared.u64 d2, d2;\nst.u32 [d2], r0;"
    run(to_shared).clean()


@pytest.mark.parametrize(
    "drop",
    [
        "selp.u32 r0, r2, r1, p0;",
        "mov.u32 r0, r2;\n@!p0 mov.u32 r0, 5;",
        "setp.lt.u32 p1, r2, 9;\nand.pred p2, p1, p0;\nselp.u32 r0, 1, 2, p2;",
        "setp.lt.u32 p1, r2, 9;\nor.pred p2, p1, p3;\nselp.u32 r0, 1, 2, p2;",
        "mov.u32 r0, r1;\nadd.u32 r3, r2, 1;",  # a result that nobody uses
    ],
)
def test_undefined_value_that_is_not_taken(drop: str) -> None:
    """r2 is undefined where p0 is false: lanes from 20 on."""
    body = """
    setp.lt.u32 p0, tid, 20;
    setp.ge.u32 p3, tid, 20;
    mov.u32 r1, 3;
    @p0 mov.u32 r2, 4;
    """
    run(body + drop + "\n" + STORE, words(32)).clean()


def test_choosing_the_undefined_value_is_reported() -> None:
    body = "setp.lt.u32 p0, tid, 20;\nmov.u32 r1, 3;\nselp.u32 r0, r1, r2, p0;\n"
    run(body + STORE, words(32)).only("uninitialised", "lane 20 and 11 more")


def test_a_value_is_reported_once() -> None:
    """Each instruction that uses it is told of once; what it makes of it counts as known from then on."""
    body = STORE + "\nst.global.u32 [d1], r0;\nadd.u32 r3, r0, 1;\nst.global.u32 [d1], r3;"
    assert len(run(body, words(32)).report.findings) == 1


def test_lanes_that_are_switched_off_all_the_way() -> None:
    """A masked load leaves undefined values behind, which go through arithmetic and shuffles and are not stored."""
    body = (
        PLACE
        + """
    setp.lt.u32 p0, tid, n;
    @p0 ld.global.f32 f0, [d1];
    mul.f32 f1, f0, f0;
    ex2.approx.ftz.f32 f2, f1;
    mov.b32 r1, f2;
    shfl.sync.up.b32 r2, r1, 1, 0, -1;
    mov.b32 f3, r2;
    selp.f32 f3, f3, 0f00000000, p0;
    add.f32 f4, f2, f3;
    st.shared.f32 [own], f4;
    bar.warp.sync -1;
    ld.shared.f32 f5, [own];
    @p0 st.global.f32 [d1], f5; // here
    """
    )
    run(body, torch.ones(20), n=20).clean()
    run(body.replace("@p0 st.", "st."), torch.ones(32), n=20).only(
        "uninitialised", "lane 20 and 11"
    )


def test_sum_with_neutral_elements() -> None:
    """Lanes without an element bring a zero."""
    body = PLACE + "setp.lt.u32 p0, tid, n;\nINIT\n@p0 ld.global.f32 f0, [d1];\n"
    for step in (16, 8, 4, 2, 1):
        body += f"mov.b32 r1, f0;\nshfl.sync.bfly.b32 r2, r1, {step}, 31, -1;\n"
        body += "mov.b32 f1, r2;\nadd.f32 f0, f0, f1;\n"
    body += "st.global.f32 [x], f0; // here"
    assert (
        run(body.replace("INIT", "mov.f32 f0, 0f00000000;"), torch.ones(20), n=20).clean().x[0]
        == 20
    )
    run(body.replace("INIT", ""), torch.ones(20), n=20).only("uninitialised", "lane 0 and 31 more")


HALVES = """
.reg .b16 known, never;
mov.u16 known, 7;
mov.b32 r1, 0x04030201;
mov.b32 r2, {known, never}; // its lower half is defined
mov.b32 r3, {never, known};
mov.b64 d5, {r1, r9};
"""  # r9 is never written


@pytest.mark.parametrize(
    ("steps", "known"),
    [
        ("prmt.b32 r0, r1, r9, 0x3120;", True),  # no byte of r9
        ("prmt.b32 r0, r9, r1, 0x7654;", True),
        ("prmt.b32 r0, r1, r9, 0x3124;", False),
        ("prmt.b32 r0, r2, r3, 0x7610;", True),  # the halves that are defined
        ("prmt.b32 r0, r2, r3, 0x5410;", False),
        ("prmt.b32 r0, r2, r3, 0xff9e;", True),  # signs of their bytes
        ("prmt.b32 r0, r1, r1, r9;", False),  # whatever is taken, it is not known which
        ("prmt.b32.rc16 r0, r2, r9, 0;", True),
        ("prmt.b32.rc16 r0, r2, r9, 1;", False),
        ("and.b32 r0, r2, 0xffff;", True),
        ("and.b32 r0, r2, 0x1ffff;", False),
        ("or.b32 r0, r3, 0xffff;", True),
        ("or.b32 r0, r3, 0xfffe;", False),
        ("and.b32 r0, r9, 0;", True),
        ("xor.b32 r0, r9, r9;", False),
        ("not.b32 r0, r2;", False),
        ("shl.b32 r0, r2, 16;", True),
        ("shl.b32 r0, r2, 15;", False),
        ("shr.u32 r0, r3, 16;", True),
        ("shr.s32 r0, r3, 20;", True),
        ("shr.s32 r0, r2, 20;", False),
        ("shr.u32 r0, r3, r9;", False),
        ("shf.l.wrap.b32 r0, r3, r2, 16;", True),
        ("shf.r.wrap.b32 r0, r2, r3, 16;", False),
        ("shf.r.clamp.b32 r0, r9, r1, 32;", True),
        ("lop3.b32 r0, r1, r9, r1, 0xf0;", True),  # its table is that of the first operand
        ("lop3.b32 r0, r2, r3, r9, 0xc0;", False),
        ("lop3.b32 r0, r2, 0xffff, r9, 0xc0;", True),
        ("bfi.b32 r0, r2, r3, 0, 16;", True),
        ("bfi.b32 r0, r9, r1, 4, 0;", True),
        ("bfi.b32 r0, r2, r3, 0, 15;", False),
        ("bfe.u32 r0, r2, 3, 13;", True),
        ("bfe.s32 r0, r2, 3, 14;", False),
        ("bfe.u32 r0, r1, 3, r9;", False),
        ("and.b64 d5, d5, 0xffffffff;\ncvt.u32.u64 r0, d5;", True),
        ("shr.u64 d5, d5, 31;\ncvt.u32.u64 r0, d5;", False),
        ("shl.b64 d5, d5, 32;\nshr.u64 d5, d5, 32;\ncvt.u32.u64 r0, d5;", True),
    ],
)
def test_bits_that_are_not_taken(steps: str, known: bool) -> None:
    """Compilers leave operands undefined of which an instruction takes no bit; nothing is asked of those."""
    found = run(HALVES + steps + "\n" + STORE, words(32))
    assert found.report.kinds() == (set() if known else {"uninitialised"})


def test_bits_of_some_lanes() -> None:
    """The selector of lanes from 20 on takes a byte of what was never written; the result takes its operand's place."""
    body = """
    mov.u32 r1, 0x04030201;
    setp.lt.u32 p0, tid, 20;
    selp.u32 r2, 0x3210, 0x4210, p0;
    prmt.b32 r0, r1, r0, r2;
    """
    run(body + STORE, words(32)).only("uninitialised", "lane 20 and 11 more")
