"""mov, packing and unpacking, addresses of variables, cvta and isspacep (PTX ISA, "mov", "cvta", "isspacep")."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import ptxemu

from .opcode_case import Case, program, table

TYPES = ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred")


def moves() -> Iterator[Case]:
    for t in TYPES:
        yield Case(f"mov.{t}", t, t, lambda a: a)
    for t, text, bits in (
        ("u16", "65535", 65535), ("s16", "-2", -2), ("b32", "0xDEADBEEF", 0xDEADBEEF),
        ("f32", "0fC0490FDB", 0xC0490FDB),
        ("f32", "2.5", 0x40200000), ("s64", "-9223372036854775808", 1 << 63),
        ("f64", "0d400921FB54442D18", 0x400921FB54442D18),
        ("b64", "0x8000000000000001", 1 << 63 | 1), ("b32", "0f3F800000", 0x3F800000), ("u32", "WARP_SZ", 32),
    ):  # fmt: skip
        yield Case(f"mov.{t}", t, "u32", lambda a, k=bits: k, f"{{d}}, {text}", note=text)


def vectors() -> Iterator[Case]:
    """The first part is the lowest."""
    yield Case(
        "mov.b32", "b32", "b16 b16", lambda a, b: a | b << 16, "{d}, {{{a}, {b}}}", note="from 2"
    )
    yield Case(
        "mov.b64", "b64", "b32 b32", lambda a, b: a | b << 32, "{d}, {{{a}, {b}}}", note="from 2"
    )
    yield Case("mov.b64", "b64", "b16 b16 b16 b16", lambda *v: sum(x << 16 * i for i, x in enumerate(v)),
               "{d}, {{{a}, {b}, {c}, {f}}}", note="from 4")  # fmt: skip
    yield Case(
        "mov.b32", "b32", "b16", lambda a: a | 7 << 16, "{d}, {{{a}, 7}}", note="from constants"
    )
    yield Case(
        "mov.b32", "b16 b16", "b32", lambda a: (a, a >> 16), "{{{d}, {e}}}, {a}", note="into 2"
    )
    yield Case(
        "mov.b64", "b32 b32", "b64", lambda a: (a, a >> 32), "{{{d}, {e}}}, {a}", note="into 2"
    )
    yield Case(
        "mov.b64",
        "b16 b16",
        "b64",
        lambda a: (a >> 16, a >> 48),
        "{{_, {d}, _, {e}}}, {a}",
        note="into 4",
    )
    yield Case(
        "mov.b64",
        "b16 b16",
        "b64",
        lambda a: (a, a >> 32),
        "{{{d}, _, {e}, _}}, {a}",
        note="into the others",
    )
    yield Case("mov.b64", "b32", "b64", lambda a: a >> 32, "{{_, {d}}}, {a}", note="into one")
    yield Case("mov.b32", "b32 b32", "b32 b32", lambda a, b: (b & 0xFFFF | a << 16, a),
               "{e}, {a}; .reg .b16 lo, hi; mov.b32 {{lo, hi}}, {a}; mov.b32 {{hi, _}}, {b}; mov.b32 {d}, {{hi, lo}}",
               note="swap")  # fmt: skip


test_move = table(moves())
test_vector = table(vectors())


@program(
    """
.global .align 16 .b8 far[64];
.const .align 4 .b32 near[4] = {1, 2, 3, 4};
.shared .align 16 .b8 tile[256];
.visible .entry test(.param .u64 out, .param .align 8 .b8 block[32])
{
.local .align 8 .b8 own[16];
.reg .b64 %a, %b, %out, %g<8>; .reg .b32 %v, %s; .reg .pred %p;
ld.param.u64 %out, [out];
cvta.global.u64 %g0, far;
cvta.const.u64 %g1, near+8;
cvta.shared.u64 %g2, tile+16;
cvta.local.u64 %g3, own;
mov.u64 %a, block;
cvta.param.u64 %g4, %a;
cvta.shared::cta.u64 %g5, tile;
cvta.param::entry.u64 %g6, block+8;
mov.u32 %v, 77; st.global.b32 [far+4], %v; ld.b32 %v, [%g0+4]; st.global.b32 [%out], %v;
ld.b32 %v, [%g1]; st.global.b32 [%out+4], %v;
mov.u32 %v, 78; st.shared.b32 [tile+20], %v; ld.b32 %v, [%g2+4]; st.global.b32 [%out+8], %v;
mov.u32 %v, 79; st.local.b32 [own+8], %v; ld.b32 %v, [%g3+8]; st.global.b32 [%out+12], %v;
ld.b32 %v, [%g4+12]; st.global.b32 [%out+16], %v;
cvta.to.shared.u64 %b, %g2; cvt.u32.u64 %s, %b; ld.shared.b32 %v, [%s+4]; st.global.b32 [%out+20], %v;
cvta.to.global.u64 %b, %g0; ld.global.b32 %v, [%b+4]; st.global.b32 [%out+24], %v;
cvta.to.local.u64 %b, %g3; ld.local.b32 %v, [%b+8]; st.global.b32 [%out+28], %v;
cvta.to.const.u64 %b, %g1; ld.const.b32 %v, [%b+4]; st.global.b32 [%out+32], %v;
cvta.to.param.u64 %b, %g4; ld.param.b32 %v, [%b]; st.global.b32 [%out+36], %v;
mov.u32 %s, tile+16; ld.shared.b32 %v, [%s+4]; st.global.b32 [%out+40], %v;
mov.u64 %a, far; ld.global.b32 %v, [%a+4]; st.global.b32 [%out+44], %v;
mov.u64 %a, far+8; ld.global.b32 %v, [%a+-4]; st.global.b32 [%out+48], %v;
ld.b32 %v, [%g6+4]; st.global.b32 [%out+52], %v;
sub.u64 %a, %g2, %g5; cvt.u32.u64 %v, %a; st.global.b32 [%out+56], %v;
ret;
}
"""
)
def test_addresses(module: ptxemu.Module) -> None:
    """Every kind of variable, by its own address and by its generic one."""
    out = np.zeros(15, np.uint32)
    module.launch(args=[out, np.arange(100, 108, dtype=np.uint32).tobytes()]).check()
    assert out.tolist() == [77, 3, 78, 79, 103, 78, 77, 79, 4, 100, 78, 77, 77, 103, 16]


SPACES = (
    "global",
    "shared",
    "shared::cta",
    "shared::cluster",
    "local",
    "const",
    "param",
    "param::entry",
)
PLACES = ("far", "tile", "own", "near", "block")
_TESTS = "\n".join(
    f"cvta.{space}.u64 %a, {name}; "
    + " ".join(
        f"isspacep.{asked} %p, %a; selp.u32 %v, 1, 0, %p; st.global.b32 [%out+{4 * (8 * i + j)}], %v;"
        for j, asked in enumerate(SPACES)
    )
    for i, (name, space) in enumerate(
        zip(PLACES, ("global", "shared", "local", "const", "param"), strict=True)
    )
)


@program(
    f"""
.global .align 16 .b8 far[64];
.const .align 4 .b32 near[4] = {{1, 2, 3, 4}};
.shared .align 16 .b8 tile[256];
.visible .entry test(.param .u64 out, .param .align 8 .b8 block[32])
{{
.local .align 8 .b8 own[16];
.reg .b64 %a, %out; .reg .b32 %v; .reg .pred %p;
ld.param.u64 %out, [out];
{_TESTS}
ret;
}}
"""
)
def test_isspacep(module: ptxemu.Module) -> None:
    """A kernel's parameters count as global memory too."""
    out = np.zeros((5, 8), np.uint32)
    module.launch(args=[out, bytes(32)]).check()
    yes = {"far": {"global"}, "tile": {"shared", "shared::cta", "shared::cluster"}, "own": {"local"}, "near": {"const"},
           "block": {"global", "param", "param::entry"}}  # fmt: skip
    assert out.tolist() == [[int(space in yes[name]) for space in SPACES] for name in PLACES]


@program(
    """
.visible .entry test(.param .u64 out)
{
.reg .b64 %out, %t<8>; .reg .b32 %c<8>; .reg .pred %p<2>;
ld.param.u64 %out, [out];
mov.u32 %c0, %clock; mov.u64 %t0, %clock64; mov.u64 %t2, %globaltimer; mov.u32 %c2, %globaltimer_lo;
mov.u32 %c3, %clock_hi; mov.u32 %c4, %globaltimer_hi;
mov.u32 %c1, %clock; mov.u64 %t1, %clock64; mov.u64 %t3, %globaltimer;
sub.u32 %c1, %c1, %c0; sub.u64 %t1, %t1, %t0; sub.u64 %t3, %t3, %t2;
st.global.b32 [%out], %c1; st.global.b64 [%out+8], %t1; st.global.b64 [%out+16], %t3;
st.global.b32 [%out+24], %c3; st.global.b32 [%out+28], %c4;
ret;
}
"""
)
def test_clocks_go_on(module: ptxemu.Module) -> None:
    out = np.zeros(4, np.uint64)
    module.launch(args=[out]).check()
    assert 0 < int(out[0]) < 100
    assert 0 < int(out[1]) < 100
    assert 0 < int(out[2]) < 100
    assert int(out[3]) == 0
