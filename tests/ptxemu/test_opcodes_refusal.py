"""What the emulator does not know it refuses at load, with the line: it never guesses."""

from __future__ import annotations

import pytest

import ptxemu

from .opcode_case import HEAD

_BODY = """.global .align 16 .b8 data[64];
.shared .align 16 .b8 tile[64];
.visible .entry test(.param .u64 p)
{
.reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .pred %p<4>;
HERE:
TABLE: .branchtargets HERE;
"""

# Each of these NVIDIA's assembler refuses too.
ILLEGAL = """
frobnicate.u32 %r0, %r1;
add.frob.u32 %r0, %r1, %r2;
add.u32.frob %r0, %r1, %r2;
add %r0, %r1, %r2;
add.u32 %r0, %r1;
add.u32 %r0, %r1, %r2, %r3;
add.u64 %rd0, %r1, %rd2;
add.u16 %h0, %h1, %r2;
add.u32 %h0, %r1, %r2;
add.f32 %r0, %r1, %p0;
add.u8 %h0, %h1, %h2;
add.u32 %r0, !%r1, %r2;
add.u32 %r0, %zz, %r2;
add.u32 5, %r1, %r2;
add.u32 %r0, %r1, 1.5;
add.f32 %r0, %r1, 5;
add.f64 %rd0, %rd1, 5;
add.sat.u32 %r0, %r1, %r2;
add.ftz.f64 %rd0, %rd1, %rd2;
add.sat.f64 %rd0, %rd1, %rd2;
add.rz.f16 %h0, %h1, %h2;
add.rna.f32 %r0, %r1, %r2;
add.sat.bf16 %h0, %h1, %h2;
sub.u16x2 %r0, %r1, %r2;
mul.u32 %r0, %r1, %r2;
mul.lo.f32 %r0, %r1, %r2;
mul.wide.u64 %rd0, %rd1, %rd2;
mul.wide.u32 %r0, %r1, %r2;
mad.lo.sat.s32 %r0, %r1, %r2, %r3;
mad.f32 %r0, %r1, %r2, %r3;
fma.f32 %r0, %r1, %r2, %r3;
fma.f64 %rd0, %rd1, %rd2, %rd3;
fma.f16 %h0, %h1, %h2, %h3;
fma.rn.sat.relu.f16 %h0, %h1, %h2, %h3;
div.f32 %r0, %r1, %r2;
div.f64 %rd0, %rd1, %rd2;
div.approx.f64 %rd0, %rd1, %rd2;
rcp.f32 %r0, %r1;
sqrt.f32 %r0, %r1;
sqrt.approx.f64 %rd0, %rd1;
rsqrt.f32 %r0, %r1;
ex2.f32 %r0, %r1;
ex2.f16 %h0, %h1;
tanh.approx.ftz.f32 %r0, %r1;
tanh.f16 %h0, %h1;
abs.u32 %r0, %r1;
neg.u32 %r0, %r1;
abs.ftz.f64 %rd0, %rd1;
neg.sat.f32 %r0, %r1;
min.relu.u32 %r0, %r1, %r2;
min.NaN.f64 %rd0, %rd1, %rd2;
min.xorsign.f32 %r0, %r1, %r2;
mul24.lo.u64 %rd0, %rd1, %rd2;
dp4a.u32.u64 %r0, %r1, %r2, %r3;
and.f32 %r0, %r1, %r2;
and.u32 %r0, %r1, %r2;
and.pred %p0, %p1, %r2;
not.pred %p0, %p1, %p2;
shl.u32 %r0, %r1, %r2;
shl.b32 %r0, %r1, %rd2;
shr.f32 %r0, %r1, %r2;
popc.u32 %r0, %r1;
clz.b16 %r0, %h1;
bfind.b32 %r0, %r1;
bfe.b32 %r0, %r1, %r2, %r3;
bfi.u32 %r0, %r1, %r2, %r3, %r4;
brev.u32 %r0, %r1;
lop3.b32 %r0, %r1, %r2, %r3, %r4;
prmt.b32.frob %r0, %r1, %r2, %r3;
shf.l.b32 %r0, %r1, %r2, %r3;
shf.l.wrap.b64 %rd0, %rd1, %rd2, %r3;
bmsk.b32 %r0, %r1, %r2;
setp.s32 %p0, %r1, %r2;
setp.lt.s32 %r0, %r1, %r2;
setp.lt.s32 %p0, %r1;
setp.lt.and.s32 %p0, %r1, %r2;
setp.lt.s32 %p0, %r1, %r2, %p1;
setp.lt.b32 %p0, %r1, %r2;
setp.ltu.s32 %p0, %r1, %r2;
setp.nan.u32 %p0, %r1, %r2;
setp.lo.s32 %p0, %r1, %r2;
setp.hs.f32 %p0, %r1, %r2;
setp.lt.ftz.s32 %p0, %r1, %r2;
setp.lt.ftz.f64 %p0, %rd1, %rd2;
set.lt.u32 %r0, %r1, %r2;
set.lt.u64.s32 %rd0, %r1, %r2;
selp.pred %p0, %p1, %p2, %p3;
slct.u32.u32 %r0, %r1, %r2, %r3;
slct.ftz.u32.s32 %r0, %r1, %r2, %r3;
testp.finite.f16 %p0, %h1;
copysign.f16 %h0, %h1, %h2;
cvt.s32.f32 %r0, %r1;
cvt.rn.s32.f32 %r0, %r1;
cvt.f32.s32 %r0, %r1;
cvt.rzi.f32.s32 %r0, %r1;
cvt.f16.f32 %h0, %r1;
cvt.rn.f32.f16 %r0, %h1;
cvt.rn.u32.s16 %r0, %h1;
cvt.rzi.f32.f64 %r0, %rd1;
cvt.rn.f16x2.f32 %r0, %r1;
cvt.rn.f16.f32 %h0, %r1, %r2;
cvt.rn.e4m3x2.f32 %h0, %r1, %r2;
cvt.rna.f16.f32 %h0, %r1;
cvt.rm.tf32.f32 %r0, %r1;
cvt.rn.relu.f32.f64 %r0, %rd1;
cvt.u32.u64 %h0, %rd1;
cvt.u64.u32 %rd0, %h1;
cvt.ftz.u32.u16 %r0, %h1;
mov.u32 %r0, %rd1;
mov.u32 %r0, nowhere;
mov.u32 %r0, %nonsense;
mov.b64 %rd0, {%r0, %r1, %r2};
mov.b64 %rd0, {%r0};
mov.b32 %r0, {%r1, %r2};
cvta.u64 %rd0, %rd1;
cvta.shared.u64 %rd0, %r1;
isspacep.global %r0, %rd1;
isspacep.frob %p0, %rd1;
ld.global.u32 %r0, %rd0;
ld.global.u32 %h0, [%rd0];
ld.global.u64 %r0, [%rd0];
ld.global.v2.u32 %r0, [%rd0];
ld.global.v2.u32 {%r0, %r1, %r2}, [%rd0];
ld.global.v3.u32 {%r0, %r1, %r2}, [%rd0];
ld.global.v4.u64 {%rd0, %rd1, %rd2, %rd3}, [%rd4];
ld.global.f16 %h0, [%rd0];
ld.global.frob.u32 %r0, [%rd0];
ld.global.pred %p0, [%rd0];
ld.relaxed.global.u32 %r0, [%rd0];
ld.global.u32 %r0, [%rd0], %rd1;
ld.global.u32 %r0, [nowhere];
st.global.u32 [%rd0], %h0;
st.global.u32 %rd0, %r0;
st.const.u32 [%rd0], %r0;
st.global.nc.u32 [%rd0], %r0;
st.global.v2.u32 [%rd0], %r0;
atom.global.add.u32 %r0, %rd0, %r1;
atom.global.add.b32 %r0, [%rd0], %r1;
atom.global.add.u16 %h0, [%rd0], %h1;
atom.global.min.f32 %r0, [%rd0], %r1;
atom.global.inc.s32 %r0, [%rd0], %r1;
atom.global.and.u32 %r0, [%rd0], %r1;
atom.global.cas.b32 %r0, [%rd0], %r1;
atom.global.add.f16 %h0, [%rd0], %h1;
atom.shared.add.v2.f32 {%r0, %r1}, [%r4], {%r2, %r3};
atom.const.add.u32 %r0, [%rd0], %r1;
red.global.exch.b32 [%rd0], %r1;
red.global.cas.b32 [%rd0], %r1, %r2;
red.global.add.u32 %r0, [%rd0], %r1;
shfl.sync.frob.b32 %r0, %r1, %r2, %r3, %r4;
shfl.sync.bfly.b64 %rd0, %rd1, %r2, %r3, %r4;
shfl.sync.bfly.b32 %r0, %r1, %r2, %r3;
shfl.bfly.b32 %r0, %r1, %r2, %r3;
vote.sync.ballot.pred %p0, %p1, %r2;
vote.sync.all.b32 %r0, %p1, %r2;
vote.all.pred %p0, %p1;
match.any.sync.b16 %r0, %h1, %r2;
match.any.sync.b32 %r0|%p0, %r1, %r2;
match.any.b32 %r0, %r1;
redux.sync.add.u64 %rd0, %rd1, %r2;
redux.sync.and.s32 %r0, %r1, %r2;
redux.sync.add.f32 %r0, %r1, %r2;
elect.sync %r0, %r1;
activemask.b64 %rd0;
activemask.b32 %r0, %r1;
bar.sync;
bar.sync 0, 32, 1;
bar.arrive 1;
bar.red.popc.u32 %r0, 0;
bar.red.popc.pred %p0, 0, %p1;
bar.red.and.u32 %r0, 0, %p1;
bar.frob 0;
barrier.cluster.sync;
fence;
fence.proxy.frob;
membar;
membar.cta %r0;
nanosleep.u32;
setmaxnreg.inc.sync.aligned.u32 100;
setmaxnreg.inc.u32 96;
griddepcontrol.frob;
ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0, %r1, %r2}, [%r4];
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0, %r1, %r2}, [%r4];
ldmatrix.sync.aligned.m8n8.x1.shared.b32 {%r0}, [%r4];
ldmatrix.sync.m8n8.x1.shared.b16 {%r0}, [%r4];
stmatrix.sync.aligned.m8n8.x1.global.b16 [%rd0], {%r0};
movmatrix.sync.aligned.m8n8.b16 %r0, %r1;
mma.sync.aligned.m16n8k8.row.col.f32.f16.bf16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6}, {%r0, %r1, %r2, %r3};
mma.sync.aligned.m16n8k8.col.row.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6}, {%r0, %r1, %r2, %r3};
mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r7}, {%r0, %r1, %r2, %r3};
mma.sync.aligned.m16n8k8.row.col.satfinite.f32.f16.f16.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6}, {%r0,%r1,%r2,%r3};
mma.sync.aligned.m16n8k8.row.col.f16.bf16.bf16.f16 {%r0, %r1}, {%r4, %r5}, {%r6}, {%r0, %r1};
mma.sync.aligned.m16n8k8.row.col.f16.tf32.tf32.f16 {%r0, %r1}, {%r4, %r5, %r6, %r7}, {%r6, %r7}, {%r0, %r1};
mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r6,%r7}, {%r0,%r1,%r2,%r3};
mma.sync.aligned.m16n8k16.row.col.f32.s8.s8.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6}, {%r0, %r1, %r2, %r3};
cp.async.cg.shared.global [%r0], [%rd0], 8;
cp.async.ca.shared.global [%r0], [%rd0], 12;
cp.async.ca.global.shared [%rd0], [%r0], 4;
cp.async.ca.shared.global [%r0], [%rd0];
cp.async.wait_group;
cp.async.wait_group %r0;
cp.async.commit_group 1;
bra NOWHERE;
bra %r0;
bra;
brx.idx %r0, NOWHERE;
brx.idx %rd0, TABLE;
call nothing;
ret 5;
exit %r0;
trap %r0;
@%r0 add.u32 %r0, %r1, %r2;
@%q0 add.u32 %r0, %r1, %r2;
"""


# These the assembler takes, and compilers do not write.
UNSUPPORTED = """
and.pred %p0, %p1, !%p2;
setp.lt.f16x2 %p0, %r1, %r2;
selp.u32 %r0, %r1, %r2, !%p0;
ld.global.u32 %r0, [%h0];
vote.ballot.b32 %r0, %p1;
mov.u16 %h0, %tid.x;
mov.b32 %r0, {%h0, _};
"""


@pytest.mark.parametrize("text", [*ILLEGAL.strip().splitlines(), *UNSUPPORTED.strip().splitlines()])
def test_instruction(text: str) -> None:
    before = HEAD.format(target="sm_90a") + _BODY
    with pytest.raises(ptxemu.PtxError, match=f"^line {before.count(chr(10)) + 1}: "):
        ptxemu.load(before + text + "\nret;\n}\n")


_HEAD = HEAD.format(target="sm_90a")
# A whole module, the line, and a word of the message.
MODULES = {
    ".version 8.8\n.address_size 64\n": (1, "target"),
    ".version 8.8\n.target gfx942\n": (2, "gfx942"),
    _HEAD + ".frob 3;\n": (4, "frob"),
    _HEAD + ".visible .entry k()\n{\nadd.u32\n": (7, "name"),
    _HEAD + ".visible .entry k()\n{\n.reg .f128 %q;\nret;\n}\n": (6, "type"),
    _HEAD + ".visible .entry k()\n{\n.reg .b32 %r0;\nmov.u32 %r0, 0x;\nret;\n}\n": (7, "number"),
    _HEAD + ".visible .entry k()\n{\n.reg .b32 %r0;\nmov.u32 %r0, 12ab;\nret;\n}\n": (7, "number"),
    _HEAD + ".visible .entry k()\n{\n.reg .b32 %r0;\nmov.f32 %r0, 0f3F80;\nret;\n}\n": (
        7,
        "number",
    ),
    _HEAD + ".visible .entry k()\n{\n.reg .b32 %r0;\nmov.f32 %r0, 1.2.3;\nret;\n}\n": (7, "number"),
    _HEAD + ".visible .entry k()\n{\nret\n}\n": (7, "name"),
    _HEAD + ".visible .entry k()\n{\nret;\n": (7, "closed"),
    _HEAD + ".global .b8 few[2] = {1, 2, 3};\n": (4, "few"),
    _HEAD + ".global .b32 two[2][2] = {{1, 2, 3}, {4}};\n": (4, "two"),
    _HEAD + ".global .f32 x = 1;\n": (4, "x"),
    _HEAD + ".global .b32 x = 1.5;\n": (4, "x"),
    _HEAD + ".global .u64 x = nowhere;\n": (4, "nowhere"),
    _HEAD + ".extern .global .b32 elsewhere;\n": (4, "elsewhere"),
    _HEAD + ".extern .func f();\n.visible .entry k() { call f; ret; }\n": (5, "f"),
    _HEAD + ".alias a, b;\n": (4, "alias"),
    _HEAD + ".func f(.param .b32 x) { ret; }\n.visible .entry k()\n{\ncall f;\nret;\n}\n": (
        7,
        "parameters",
    ),
}


@pytest.mark.parametrize("text", MODULES, ids=[f"{line} {word}" for line, word in MODULES.values()])
def test_module(text: str) -> None:
    line, word = MODULES[text]
    with pytest.raises(ptxemu.PtxError, match=f"^line {line}: .*{word}"):
        ptxemu.load(text)
