"""Undefined values that pass from lane to lane: by shuffles, matrix loads and products."""

from __future__ import annotations

import pytest
import torch

from ptxemu.checkers import run, words

STORE = "mul.wide.u32 d0, tid, 4;\nadd.s64 d1, x, d0;\nst.global.u32 [d1], r0; // here"


def test_shuffles_carry_it_from_lane_to_lane() -> None:
    """Lane i takes lane i ^ 1's value: undefined in odd lanes becomes undefined in even ones."""
    body = """
    and.b32 r1, tid, 1;
    setp.eq.u32 p0, r1, 0;
    @p0 mov.u32 r2, 5;
    shfl.sync.bfly.b32 r0, r2, 1, 31, -1;
    setp.GUARD.u32 p1, r1, 0;
    """
    guarded = STORE.replace("st.global", "@p1 st.global")
    run(body.replace("GUARD", "ne") + guarded, words(32)).clean()
    run(body.replace("GUARD", "eq") + guarded, words(32)).only("uninitialised", "15 more")


MMA = """
mov.u32 r1, 0x3f803f80; // one, twice
mov.b32 r2, r1;
mov.b32 r3, r1;
mov.b32 r4, r1;
mov.b32 r5, r1;
mov.b32 r6, r1;
mov.f32 f0, 0f00000000;
mov.f32 f1, f0;
mov.f32 f2, f0;
mov.f32 f3, f0;
UNDEFINE
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
  {f4, f5, f6, f7}, {r1, r2, r3, r4}, {r5, r6}, {f0, f1, f2, f3};
mul.wide.u32 d0, tid, 16;
add.s64 d0, x, d0;
CHECK
st.global.v4.f32 [d0], {f4, f5, f6, f7}; // here
"""


def mma(undefine: str, check: str) -> str:
    """Undefine a register in lane 9; store all of the result that `check` leaves. Lane 4g + t holds rows g (the first
    two) and g + 8, columns 2t and 2t + 1."""
    lane_9 = f"setp.eq.u32 p0, tid, 9;\n@p0 mov.b32 {undefine}, {'f20' if undefine[0] == 'f' else 'r20'};"
    return MMA.replace("UNDEFINE", lane_9 if undefine != "none" else "").replace("CHECK", check)


@pytest.mark.parametrize(
    ("undefine", "clean", "count"),
    [
        # a1 of lane 9 is of row 2 (r1, r3) or row 10 (r2, r4): the four lanes with g = 2 have it.
        ("r1", "shr.u32 r7, tid, 2;\nsetp.eq.u32 p1, r7, 2;\n@p1 bra END;", 4),
        ("r4", "shr.u32 r7, tid, 2;\nsetp.eq.u32 p1, r7, 2;\n@p1 bra END;", 4),
        # b of lane 9 is of column 2: the lanes with t = 1 have columns 2 and 3.
        ("r5", "and.b32 r7, tid, 3;\nsetp.eq.u32 p1, r7, 1;\n@p1 bra END;", 8),
        ("f2", "setp.eq.u32 p1, tid, 9;\n@p1 bra END;", 1),
    ],
)
def test_mma_spoils_its_rows_and_columns_only(undefine: str, clean: str, count: int) -> None:
    tensor = torch.zeros(128)
    run(mma("none", ""), tensor).clean()
    assert tensor.eq(16).all()
    found = run(mma(undefine, ""), torch.zeros(128)).only("uninitialised")
    more = f" and {count - 1} more" if count > 1 else ""
    first = {"r5": 1, "f2": 9}.get(undefine, 8)
    assert f"lane {first}{more}]" in found.message
    run(mma(undefine, clean) + "END:", torch.zeros(128)).clean()


def test_mma_keeps_the_rows_of_one_half() -> None:
    """With row 2 undefined, row 10 of the same lanes is good."""
    body = mma("r1", "").replace("{f4, f5, f6, f7}; // here", "{f6, f7, f6, f7}; // here")
    run(body, torch.zeros(128)).clean()
    body = mma("r2", "").replace("{f4, f5, f6, f7}; // here", "{f6, f7, f6, f7}; // here")
    run(body, torch.zeros(128)).only("uninitialised")


def test_ldmatrix_of_memory_never_written() -> None:
    """Row 5 of the matrix: lanes 20 to 23; transposed, the lanes that hold rows 4 and 5 of each column."""
    body = """
    mov.u32 r0, buffer;
    mad.lo.u32 r0, tid, 16, r0;
    setp.ne.u32 p0, tid, 5;
    mov.u32 r1, 0;
    ALL st.shared.v4.u32 [r0], {r1, r1, r1, r1};
    bar.warp.sync -1;
    and.b32 r2, tid, 7;
    mov.u32 r3, buffer;
    mad.lo.u32 r3, r2, 16, r3;
    ldmatrix.sync.aligned.m8n8.x1TRANS.shared.b16 {r0}, [r3]; // other
    """
    for trans, lanes in (("", "lane 20 and 3 more"), (".trans", "lane 2 and 7 more")):
        text = body.replace("TRANS", trans) + STORE
        run(text.replace("ALL", ""), words(32)).clean()
        run(text.replace("ALL", "@p0"), words(32)).only("uninitialised", "from @other", lanes)
