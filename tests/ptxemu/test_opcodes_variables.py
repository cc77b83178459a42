"""Variables of a module: initial values, pointers among them, alignment, scopes, and how long they live."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import ptxemu

from .opcode_case import program

_VALUES = """
.global .align 4 .b8 bytes[7] = {1, 255, -1, 0x7F, 0b11};
.global .u16 shorts[3] = {1, 65535};
.global .s32 word = -5;
.global .f32 single[4] = {1.5, -0.25, 0f40490FDB, 2.0};
.global .f64 double[2] = {0d3FF8000000000000, -2.5};
.global .s64 large = -9223372036854775808;
.global .b32 grid[2][3] = {{1, 2, 3}, {4, 5, 6}};
.global .b32 open[][2] = {{7}, {8, 9}};
.global .align 8 .u64 pointers[4] = {0, generic(grid)+4, word};
.global .align 8 .b8 mixed[8];
.const .align 8 .u64 kept[2] = {word, grid+12};
"""


@program(
    _VALUES
    + """
.visible .entry test(.param .u64 out)
{
.reg .b64 %out, %a, %b; .reg .b32 %v;
ld.param.u64 %out, [out];
mov.u64 %a, pointers;
ld.global.u64 %b, [%a+8]; ld.global.b32 %v, [%b+8]; st.global.b32 [%out], %v;
ld.global.u64 %b, [pointers+16]; ld.b32 %v, [%b]; st.global.b32 [%out+4], %v;
ld.const.u64 %b, [kept+8]; ld.global.b32 %v, [%b]; st.global.b32 [%out+8], %v;
ld.global.u64 %b, [%a]; cvt.u32.u64 %v, %b; st.global.b32 [%out+12], %v;
ld.global.s16 %v, [shorts+2]; st.global.b32 [%out+16], %v;
ld.global.b32 %v, [word]; add.s32 %v, %v, 1; st.global.b32 [word], %v;
ret;
}
"""
)
def test_initial_values(module: ptxemu.Module) -> None:
    def content(name: str) -> bytes:
        return module.variable(name).tobytes()

    assert content("bytes") == bytes([1, 255, 255, 127, 3, 0, 0])
    assert content("shorts") == struct.pack("<3H", 1, 65535, 0)
    assert content("word") == struct.pack("<i", -5)
    assert content("single") == struct.pack("<2fIf", 1.5, -0.25, 0x40490FDB, 2.0)
    assert content("double") == struct.pack("<2d", 1.5, -2.5)
    assert content("large") == struct.pack("<q", -(1 << 63))
    assert content("grid") == struct.pack("<6i", 1, 2, 3, 4, 5, 6)
    assert content("open") == struct.pack("<4i", 7, 0, 8, 9)
    assert content("mixed") == bytes(8)
    out = np.zeros(5, np.int32)
    module.launch(args=[out]).check()
    assert out.tolist() == [4, -5, 4, 0, -1]
    module.launch(args=[out]).check()
    assert out[1] == -4  # what a launch leaves in a global variable, the next one finds
    assert content("word") == struct.pack("<i", -3)


@program(
    """
.const .align 16 .b8 table[20] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18};
.const .f32 half = 0f3F000000;
.visible .const .align 8 .s16 odd[3] = {-1, 300};
.visible .entry test(.param .u64 out)
{
.reg .b64 %out, %a; .reg .b32 %v<4>; .reg .b16 %h;
ld.param.u64 %out, [out];
mov.u64 %a, table;
ld.const.v4.u8 {%v0, %v1, %v2, %v3}, [%a+16]; st.global.v4.b32 [%out], {%v0, %v1, %v2, %v3};
ld.const.f32 %v0, [half]; st.global.b32 [%out+16], %v0;
ld.const.s16 %v1, [odd+2]; st.global.b32 [%out+20], %v1;
ld.const.s16 %v1, [odd]; st.global.b32 [%out+24], %v1;
ld.const.u16 %v1, [odd+4]; st.global.b32 [%out+28], %v1;
ret;
}
"""
)
def test_constants(module: ptxemu.Module) -> None:
    out = np.zeros(8, np.int32)
    module.launch(args=[out]).check()
    assert out.tolist() == [16, 17, 18, 0, 0x3F000000, 300, -1, 0]


@program(
    """
.shared .align 4 .b32 first[3];
.extern .shared .align 128 .b8 dynamic[];
.shared .align 8 .b64 second;
.visible .entry test(.param .u64 out)
{
.shared .align 16 .b8 inner[5];
.reg .b64 %out; .reg .b32 %v;
ld.param.u64 %out, [out];
mov.u32 %v, dynamic; and.b32 %v, %v, 127; st.global.b32 [%out], %v;
mov.u32 %v, second; and.b32 %v, %v, 7; st.global.b32 [%out+4], %v;
mov.u32 %v, inner; and.b32 %v, %v, 15; st.global.b32 [%out+8], %v;
mov.u32 %v, 1; st.shared.b32 [first+8], %v; mov.u32 %v, 2; st.shared.b32 [second+4], %v;
mov.u32 %v, 3; st.shared.b8 [inner+4], %v; mov.u32 %v, 4; st.shared.b32 [dynamic], %v;
mov.u32 %v, 5; st.shared.b32 [dynamic+60], %v;
ld.shared.b32 %v, [first+8]; st.global.b32 [%out+12], %v;
ld.shared.b32 %v, [second+4]; st.global.b32 [%out+16], %v;
ld.shared.u8 %v, [inner+4]; st.global.b32 [%out+20], %v;
ld.shared.b32 %v, [dynamic]; st.global.b32 [%out+24], %v;
mov.u32 %v, %dynamic_smem_size; st.global.b32 [%out+28], %v;
ret;
}
"""
)
def test_shared_variables(module: ptxemu.Module) -> None:
    """None overlaps another; dynamic shared memory lies behind them all, as aligned as it asks for."""
    out = np.zeros(8, np.uint32)
    module.launch(args=[out], shared=64).check()
    assert out.tolist() == [0, 0, 0, 1, 2, 3, 4, 64]


@program(
    """
.visible .entry test(.param .u64 out)
{
.reg .b64 %out; .reg .b32 %v, %w;
.local .align 4 .b32 own;
ld.param.u64 %out, [out];
mov.u32 %v, 1; st.local.b32 [own], %v;
{
.local .align 4 .b32 own; .reg .b32 %v;
mov.u32 %v, 2; st.local.b32 [own], %v;
{ .local .align 8 .b8 own[16]; mov.u32 %w, 3; st.local.b32 [own+12], %w; ld.local.b32 %w, [own+12];
  st.global.b32 [%out+8], %w; }
ld.local.b32 %v, [own]; st.global.b32 [%out+4], %v;
}
ld.local.b32 %w, [own]; st.global.b32 [%out], %w; st.global.b32 [%out+12], %v;
ret;
}
"""
)
def test_scopes(module: ptxemu.Module) -> None:
    """The same name in an inner scope is another register or variable."""
    out = np.zeros(4, np.uint32)
    module.launch(args=[out]).check()
    assert out.tolist() == [1, 2, 3, 1]


@program(
    """
.visible .entry test(.param .u64 a, .param .s32 b, .param .u16 c, .param .f32 d, .param .f64 e,
                     .param .align 16 .b8 f[20], .param .s8 g, .param .u64 .ptr .global .align 16 h)
{
.reg .b64 %out, %q; .reg .b32 %v, %w; .reg .b16 %s;
ld.param.u64 %out, [h];
ld.param.b32 %v, [b]; st.global.b32 [%out], %v;
ld.param.u16 %v, [c]; st.global.b32 [%out+4], %v;
ld.param.f32 %v, [d]; st.global.b32 [%out+8], %v;
ld.param.f64 %q, [e]; st.global.b64 [%out+16], %q;
ld.param.v2.b32 {%v, %w}, [f+8]; st.global.v2.b32 [%out+24], {%v, %w};
ld.param.b32 %v, [f+16]; st.global.b32 [%out+32], %v;
ld.param.s8 %v, [g]; st.global.b32 [%out+36], %v;
ret;
}
"""
)
def test_parameters(module: ptxemu.Module) -> None:
    """Each at its alignment; numbers are packed as the parameter's type."""
    out, pointee = np.zeros(10, np.int32), np.zeros(4, np.int32)
    layout = ptxemu.struct("<Qiii", pointee, 1, 2, 3)
    module.launch(args=[pointee, -7, 65535, 1.5, 2.5, layout, -3, out]).check()
    assert out.tolist() == [-7, 65535, 0x3FC00000, 0, 0, 0x40040000, 1, 2, 3, -3]
    with pytest.raises(ValueError, match=r"args\[1\].*does not fit"):
        module.launch(args=[pointee, 1 << 32, 0, 0.0, 0.0, layout, 0, out])
    with pytest.raises(TypeError, match=r"args\[2\]"):
        module.launch(args=[pointee, 0, 0.5, 0.0, 0.0, layout, 0, out])
