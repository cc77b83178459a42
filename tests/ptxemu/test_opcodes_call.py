"""Calls: arguments and results of each lane, recursion, parameters in memory, printf and assertions."""

from __future__ import annotations

import numpy as np

import ptxemu

from .opcode_case import program
from .opcode_flow import HEADER, run

_SCALE = """
.func (.param .b32 result) scale(.param .b32 x, .param .b64 by)
{
.reg .b32 %x, %y; .reg .b64 %b;
ld.param.b32 %x, [x]; ld.param.b64 %b, [by]; cvt.u32.u64 %y, %b; mul.lo.u32 %x, %x, %y;
st.param.b32 [result], %x;
ret;
}
"""


@program(
    _SCALE
    + HEADER
    + """
setp.lt.u32 %p0, %x0, 500;
@%p0 bra SMALL;
{
.param .b32 a; .param .b64 b; .param .b32 r;
st.param.b32 [a], %x0; st.param.b64 [b], 3;
call.uni (r), scale, (a, b);
ld.param.b32 %x1, [r];
}
bra DONE;
SMALL:
{
.param .b32 a; .param .b64 b; .param .b32 r;
add.u32 %x2, %x0, 1;
st.param.b64 [b], 5; st.param.b32 [a], %x2;
call (r), scale, (a, b);
ld.param.b32 %x1, [r];
}
DONE:
setp.gt.u32 %p1, %x1, 2000;
{
.param .b64 a; .param .b64 b; .param .b32 r;
st.param.b32 [a], %x1; st.param.b64 [b], 2;
@%p1 call (r), scale, (a, b);
@%p1 ld.param.b32 %x1, [r];
}
activemask.b32 %m0; popc.b32 %m0, %m0; shl.b32 %m0, %m0, 24; or.b32 %x1, %x1, %m0;
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_two_sites_of_one_function(module: ptxemu.Module) -> None:
    """The argument's variable has another size at each site; lanes are together again after the calls."""

    def wanted(x: int) -> int:
        y = 3 * x if x >= 500 else 5 * (x + 1)
        return 2 * y if y > 2000 else y

    values, out = run(module)
    active = [32 if i % 100 < 96 else 4 for i in range(200)]
    assert out == [wanted(x) | n << 24 for x, n in zip(values, active, strict=True)]


@program(
    _SCALE
    + HEADER
    + """
setp.gt.u32 %p0, %x0, 600;
{
.param .b32 a; .param .b64 b; .param .b32 r;
st.param.b32 [a], %x0; st.param.b64 [b], 3;
call (r), scale, (a, b);
ld.param.b32 %x1, [r];
st.param.b32 [r], %x0;
st.param.b32 [a], %x1; st.param.b64 [b], 7;
@%p0 call (r), scale, (a, b);
ld.param.b32 %x1, [r];
}
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_lanes_that_do_not_call(module: ptxemu.Module) -> None:
    """The variable of the result stays as it is in those lanes."""
    values, out = run(module)
    assert out == [21 * x if x > 600 else x for x in values]


@program(
    """
.func (.param .b32 r) fib(.param .b32 n)
;
.func (.param .b32 r) fib(.param .b32 n)
{
.local .align 4 .b32 kept;
.reg .b32 %n, %a, %b; .reg .pred %p;
ld.param.b32 %n, [n];
setp.lt.u32 %p, %n, 2;
@%p bra BASE;
st.local.b32 [kept], %n;
sub.u32 %a, %n, 1;
{ .param .b32 x; .param .b32 y; st.param.b32 [x], %a; call (y), fib, (x); ld.param.b32 %a, [y]; }
ld.local.b32 %n, [kept];
sub.u32 %b, %n, 2;
{ .param .b32 x; .param .b32 y; st.param.b32 [x], %b; call (y), fib, (x); ld.param.b32 %b, [y]; }
add.u32 %a, %a, %b;
st.param.b32 [r], %a;
ret;
BASE:
st.param.b32 [r], %n;
ret;
}
"""
    + HEADER
    + """
{ .param .b32 x; .param .b32 y; st.param.b32 [x], %x0; call (y), fib, (x); ld.param.b32 %x1, [y]; }
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_recursion(module: ptxemu.Module) -> None:
    """Each lane has its own depth, registers and local memory."""

    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    values, out = run(module, count=100, high=11)
    assert out == [fib(x) for x in values]


@program(
    """
.func (.param .align 8 .b8 r[16]) turn(.param .align 8 .b8 s[24], .param .b32 at)
{
.reg .b64 %a, %g, %i; .reg .b32 %v<5>;
mov.u64 %a, s;
ld.param.u32 %v0, [at];
mad.wide.u32 %i, %v0, 4, %a;
ld.local.b32 %v1, [%i];
cvta.local.u64 %g, %a;
ld.b32 %v2, [%g+20];
mov.u32 %v4, 99;
st.b32 [%g+20], %v4;
ld.param.b32 %v3, [s+20];
ld.local.b32 %v4, [%a+20];
st.param.v2.b32 [r], {%v1, %v2};
st.param.b32 [r+8], %v3;
st.param.b32 [r+12], %v4;
ret;
}
"""
    + HEADER
    + """
and.b32 %x1, %x0, 3;
{
.param .align 8 .b8 s[24]; .param .b32 at; .param .align 8 .b8 r[16];
st.param.v4.b32 [s], {%x0, %x1, 10, 20};
st.param.v2.b32 [s+16], {30, %i0};
st.param.b32 [at], %x1;
call (r), turn, (s, at);
ld.param.v4.b32 {%x2, %x3, %x4, %x5}, [r];
}
mad.lo.u32 %x2, %x3, 1000, %x2; mad.lo.u32 %x2, %x4, 1000000, %x2; add.u32 %x2, %x2, %x5;
st.global.b32 [%out], %x2;
ret;
}
"""
)
def test_structs_and_the_address_of_a_parameter(module: ptxemu.Module) -> None:
    """The address is of a copy in local memory: a store there leaves the parameter as it is."""
    values, out = run(module)
    picked = [[x, x & 3, 10, 20][x & 3] for x in values]
    wanted = [p + 1000 * i + 1000000 * i + 99 for i, p in enumerate(picked)]
    assert out == [w % (1 << 32) for w in wanted]


@program(
    """
.visible .global .align 4 .b32 total;
.func leave(.param .b32 x)
{
.reg .b32 %x; .reg .pred %p;
ld.param.b32 %x, [x];
setp.lt.u32 %p, %x, 300;
@%p exit;
red.global.add.u32 [total], 1;
}
.func count() { .reg .b32 %x; mov.u32 %x, 1000; red.global.add.u32 [total], %x; ret.uni; }
"""
    + HEADER
    + """
{ .param .b32 x; st.param.b32 [x], %x0; call leave, (x); }
setp.gt.u32 %p0, %x0, 900;
@%p0 call count;
st.global.b32 [%out], 1;
ret;
}
"""
)
def test_functions_without_results(module: ptxemu.Module) -> None:
    """exit in a function ends the thread."""
    values, out = run(module)
    assert out == [0xFFFF if x < 300 else 1 for x in values]
    total = int(module.variable("total").view(np.uint32)[0])
    assert total == 2 * sum((x >= 300) + 1000 * (x > 900) for x in values)  # run launches twice


_STRINGS = """
.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
.extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s) .noreturn;
.global .align 1 .b8 format[30] = {37, 100, 32, 37, 108, 108, 117, 32, 37, 46, 50, 102, 32, 37, 115,
    32, 37, 99, 37, 37, 32, 37, 48, 52, 120, 10, 0};
.global .align 1 .b8 word[6] = {104, 101, 108, 108, 111, 0};
"""


@program(
    _STRINGS
    + """
.visible .entry test(.param .u64 out)
{
.local .align 8 .b8 values[40];
.reg .b64 %out, %a, %f, %w; .reg .b32 %t, %r; .reg .pred %p;
ld.param.u64 %out, [out];
mov.u32 %t, %tid.x;
setp.ne.u32 %p, %t, 1;
@%p ret;
mov.u64 %a, values; cvta.local.u64 %a, %a; cvta.global.u64 %f, format; cvta.global.u64 %w, word;
mov.u32 %r, -7; st.local.b32 [values], %r;
st.local.b64 [values+8], 0x100000001; st.local.b64 [values+16], 0d400921FB54442D18;
st.local.b64 [values+24], %w; st.local.b32 [values+32], 33; st.local.b32 [values+36], 255;
{
.param .b64 f; .param .b64 a; .param .b32 r;
st.param.b64 [f], %f; st.param.b64 [a], %a;
call.uni (r), vprintf, (f, a);
ld.param.b32 %r, [r];
}
st.global.b32 [%out], %r;
ret;
}
"""
)
def test_printf(module: ptxemu.Module) -> None:
    """Numbers of every kind, strings and signs; gives the number of its arguments or characters, no error."""
    out = np.full(1, -1, np.int32)
    report = module.launch(block=3, args=[out]).check()
    assert report.output == "-7 4294967297 3.14 hello !% 00ff\n"
    assert out[0] >= 0


@program(
    _STRINGS
    + """
.visible .entry test()
{
.reg .b64 %w; .reg .b32 %t; .reg .pred %p;
mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 40;
@%p bra FINE;
cvta.global.u64 %w, word;
{
.param .b64 m; .param .b64 f; .param .b32 l; .param .b64 n; .param .b64 s;
st.param.b64 [m], %w; st.param.b64 [f], %w; st.param.b32 [l], 123; st.param.b64 [n], %w; st.param.b64 [s], 1;
call.uni __assertfail, (m, f, l, n, s);
}
FINE:
ret;
}
"""
)
def test_assertion(module: ptxemu.Module) -> None:
    report = module.launch(block=64)
    assert report.kinds() == {"trap"}
    assert "assertion failed: hello, in hello at hello:123" in report.findings[0].message
    module.launch(block=32).check()
