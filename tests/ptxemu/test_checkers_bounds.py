"""Accesses out of bounds and misaligned ones: what is reported, and that their legal twins are not."""

from __future__ import annotations

import pytest
import torch

import ptxemu
from ptxemu.checkers import run, words

ADDRESS = "mul.wide.u32 d0, tid, 4;\nadd.s64 d0, x, d0;\n"
LOAD = ADDRESS + "ld.global.u32 r0, [d0+OFFSET]; // here"
STORE = ADDRESS + "st.global.u32 [d0+OFFSET], tid; // here"


@pytest.mark.parametrize(("body", "verb"), [(LOAD, "reads"), (STORE, "writes")])
@pytest.mark.parametrize(
    ("offset", "place"),
    [
        (4, r"4 bytes that end 4 bytes past the end of x \(128 bytes\)"),
        (-4, r"4 bytes that begin 4 bytes before the start of x \(128 bytes\)"),
        (1 << 32, r"4 bytes that end 4294967172 bytes past the end of x \(128 bytes\)"),
        (-(1 << 32), r"4 bytes that begin 4294967296 bytes before the start of x \(128 bytes\)"),
        (1 << 36, r"4 bytes that end \d{11} bytes past the end of x \(128 bytes\)"),
    ],
)
def test_global_memory_ends_with_its_tensor(body: str, verb: str, offset: int, place: str) -> None:
    run(body.replace("OFFSET", "0"), words(32)).clean()
    guarded = torch.full((96,), -1, dtype=torch.int32)
    found = run(body.replace("OFFSET", str(offset)), guarded[32:64].clone(), guarded)
    found.only("out-of-bounds", f"^{verb} {place}", r"\[block \(0, 0, 0\), warp 0, lane \d+\]")
    assert (guarded == -1).all()


def test_one_past_the_end_is_one_lane() -> None:
    """The message tells of the first lane, the count of all."""
    found = run(LOAD.replace("OFFSET", "4"), words(32)).only("out-of-bounds", "lane 31")
    assert found.count == 1
    assert run(LOAD.replace("OFFSET", "16"), words(32)).only("out-of-bounds", "lane 28").count == 4


def test_offset_of_32_bits_that_overflows() -> None:
    """Row 3 of rows of 2^29 + 16 words: the offset in bytes is computed in 32 bits, and wraps."""
    stride = 2**29 + 16
    untouched = torch.UntypedStorage(4 * (3 * stride + 32))  # pages that nobody writes cost nothing
    rows = torch.empty(0, dtype=torch.int32).set_(untouched, 0, (4, 32), (stride, 1))
    rows[3] = torch.arange(32)
    body = """
    mov.u32 r0, 3;
    MULTIPLY
    add.s64 d0, x, d0;
    mul.wide.u32 d1, tid, 4;
    add.s64 d0, d0, d1;
    ld.global.u32 r2, [d0]; // here
    add.s64 d1, y, d1;
    st.global.u32 [d1], r2;
    """
    wide = body.replace("MULTIPLY", "mul.wide.s32 d0, r0, 0x80000040;".replace("s32", "u32"))
    good = run(wide, rows, words(32)).clean()
    assert good.y.tolist() == list(range(32))
    narrow = "mul.lo.s32 r1, r0, 0x80000040;\ncvt.s64.s32 d0, r1;"
    run(body.replace("MULTIPLY", narrow), rows, words(32)).only(
        "out-of-bounds", r"reads 4 bytes that begin \d+ bytes before the start of x"
    )


def test_bytes_that_no_argument_covers() -> None:
    """Of a strided view the storage's other bytes are out of bounds, unless another argument has them."""
    storage = words(64)
    body = ADDRESS.replace(", 4;", ", 8;") + "ld.global.u32 r0, [d0+OFFSET]; // here"
    run(body.replace("OFFSET", "0"), storage[::2]).clean()
    run(body.replace("OFFSET", "4"), storage[::2]).only(
        "out-of-bounds", "byte 4 of x, which no argument gave access to"
    )
    run(body.replace("OFFSET", "4"), storage[::2], storage[1::2]).clean()
    run(body.replace("OFFSET", "4"), storage).clean()


def test_null_pointer() -> None:
    body = "setp.eq.s64 p0, x, 0;\nGUARD ld.global.u32 r0, [x+OFFSET]; // here"
    for offset in (0, 8):
        unguarded = body.replace("GUARD", "").replace("OFFSET", str(offset))
        run(unguarded).only(
            "out-of-bounds", f"reads 4 bytes at address 0x{offset:x}: a null pointer"
        )
    body = body.replace("OFFSET", "0")
    run(body.replace("GUARD", "@!p0")).clean()


def test_address_of_no_allocation() -> None:
    run("mov.u64 d0, 0x123456789abcdef0;\nld.global.u8 r0, [d0]; // here").only(
        "out-of-bounds", "reads 1 bytes at address 0x123456789abcdef0, which is in no allocation"
    )


def test_read_only_memory_is_told_from_memory_next_to_it() -> None:
    """Two tensors, whatever their distance on the host, are two allocations."""
    both = words(64)
    run(LOAD.replace("OFFSET", "128"), both[:32], both[32:]).clean()  # one storage
    run(LOAD.replace("OFFSET", "128"), both[:32].clone(), both[32:].clone()).only(
        "out-of-bounds", "of x"
    )


@pytest.mark.parametrize(
    ("access", "bytes_"),
    [
        ("ld.global.v4.f32 {f0, f1, f2, f3}, [d0]", 16),
        ("ld.global.v2.f32 {f0, f1}, [d0]", 8),
        ("ld.global.f32 f0, [d0]", 4),
        ("ld.global.u16 h0, [d0]", 2),
        ("st.global.v4.u32 [d0], {tid, tid, tid, tid}", 16),
        ("st.global.v2.u32 [d0], {tid, tid}", 8),
        ("red.global.add.u32 [d0], tid", 4),
        ("ld.shared.v4.f32 {f0, f1, f2, f3}, [r0]", 16),
        ("st.shared.v2.u32 [r0], {tid, tid}", 8),
    ],
)
def test_alignment(access: str, bytes_: int) -> None:
    """Vectors are aligned to their whole size."""
    body = f"""
    mul.wide.u32 d0, tid, 16;
    add.s64 d0, x, d0;
    mov.u32 r0, buffer;
    mad.lo.u32 r0, tid, 16, r0;
    mov.u32 r1, 0;
    st.shared.v4.u32 [r0], {{r1, r1, r1, r1}};
    bar.warp.sync -1;
    add.s64 d0, d0, OFFSET;
    add.u32 r0, r0, OFFSET;
    {access}; // here
    """
    memory = words(160)
    run(body.replace("OFFSET", str(bytes_)), memory).clean()
    found = run(body.replace("OFFSET", str(bytes_ // 2)), memory)
    found.only("misaligned", f"is not a multiple of {bytes_}$|is not a multiple of {bytes_} ")


def test_alignment_of_a_view() -> None:
    """Where a tensor lies is as on the host: a view that starts at an odd element is not aligned to 16 bytes."""
    body = "ld.global.v4.f32 {f0, f1, f2, f3}, [x]; // here"
    memory = torch.zeros(64)
    assert memory.data_ptr() % 16 == 0
    run(body, memory[4:]).clean()
    run(body, memory[1:]).only("misaligned", "not a multiple of 16")


def test_shared_memory_has_a_size() -> None:
    body = "ADDRESS\nst.shared.u32 [r0], tid; // here\n"
    good = "mov.u32 r0, own;"
    run(body.replace("ADDRESS", good), shared=128).clean()
    past = "add.u32 r0, own, 4;"
    run(body.replace("ADDRESS", past), shared=128).only(
        "out-of-bounds", "writes shared bytes 128 to 131, the block has 128", "lane 31"
    )
    before = "sub.u32 r0, own, 4;"
    run(body.replace("ADDRESS", before), shared=128).only(
        "out-of-bounds", "writes shared", "lane 0"
    )


def test_shared_memory_by_a_generic_address() -> None:
    body = """
    cvt.u64.u32 d0, own;
    cvta.shared.u64 d0, d0;
    st.u32 [d0+OFFSET], tid; // here
    ld.u32 r0, [d0+OFFSET];
    mul.wide.u32 d1, tid, 4;
    add.s64 d1, x, d1;
    st.global.u32 [d1], r0;
    """
    good = run(body.replace("OFFSET", "0"), words(32), shared=128).clean()
    assert good.x.tolist() == list(range(32))
    bad = run(body.replace("OFFSET", "4"), words(32), shared=128)
    kinds = [(f.kind, f.line - bad.line("here")) for f in bad.report.findings]
    assert kinds[:2] == [("out-of-bounds", 0), ("out-of-bounds", 1)]


def test_local_memory_has_a_size() -> None:
    body = """
    .local .align 4 .b8 place[16];
    mov.u64 d0, place;
    mul.wide.u32 d1, n, 4;
    add.s64 d0, d0, d1;
    st.local.u32 [d0], tid; // here
    """
    run(body, n=3).clean()
    run(body, n=4).only("out-of-bounds", "writes local bytes 16 to 19, the lane has 16")


def test_parameters_have_a_size() -> None:
    body = "ld.param.u32 r0, [n_param+OFFSET]; // here"
    run(body.replace("OFFSET", "0")).clean()
    run(body.replace("OFFSET", "4")).only("out-of-bounds", "reads parameter bytes 20 to 23 of 20")


def test_constants_have_a_size_and_are_read_only() -> None:
    table = ".const .align 4 .u32 table[4] = {1, 2, 3, 4};"
    body = """
    mov.u64 d0, table;
    mul.wide.u32 d1, n, 4;
    add.s64 d0, d0, d1;
    ld.const.u32 r0, [d0]; // here
    st.global.u32 [x], r0;
    """
    assert run(body, words(1), n=3, module=table).clean().x.item() == 4
    run(body.replace("st.global.u32 [x], r0;", ""), n=4, module=table).only(
        "out-of-bounds", "reads constant"
    )


def test_global_variables_are_allocations() -> None:
    table = ".global .align 4 .u32 table[4] = {1, 2, 3, 4};"
    body = "ld.global.u32 r0, [table+OFFSET]; // here\nst.global.u32 [x], r0;"
    assert run(body.replace("OFFSET", "12"), words(1), module=table).clean().x.item() == 4
    run(body.replace("OFFSET", "16").replace("st.", "// st."), module=table).only(
        "out-of-bounds", r"past the end of table \(16 bytes\)"
    )


def test_access_that_is_switched_off_is_no_access() -> None:
    body = "setp.lt.u32 p0, tid, n;\n" + LOAD.replace("ld.", "GUARD ld.").replace("OFFSET", "0")
    run(body.replace("GUARD", "@p0"), words(7), n=7).clean()
    run(body.replace("GUARD", ""), words(7), n=7).only("out-of-bounds", "lane 7")


def test_branch_table_has_a_size() -> None:
    body = """
    TABLE: .branchtargets ZERO, ONE;
    brx.idx n, TABLE; // here
    ZERO: ret;
    ONE: ret;
    """
    run(body, n=1).clean()
    run(body, n=2).only("out-of-bounds", "branch 2 of a table of 2")


def test_source_line_of_a_finding() -> None:
    body = ".loc 1 41 7\n" + LOAD.replace("OFFSET", "4").replace("\nld.", "\n.loc 1 42 7\nld.")
    found = run(body, words(32)).only("out-of-bounds")
    assert (found.source, found.function) == ("kernel.cu:42", "kernel")
    assert f"kernel, PTX line {found.line} (kernel.cu:42)" in str(found)
    with pytest.raises(ptxemu.EmulationError, match="1 finding:\nout-of-bounds: reads 4 bytes"):
        run(body, words(32)).report.check()
