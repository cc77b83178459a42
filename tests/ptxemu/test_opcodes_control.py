"""Control flow: lanes that part and meet again (PTX ISA, "Control Flow Instructions")."""

from __future__ import annotations

import ptxemu

from .opcode_case import program
from .opcode_flow import HEADER, run


@program(
    HEADER
    + """
setp.lt.u32 %p0, %x0, 500;
@%p0 bra SMALL;
and.b32 %x1, %x0, 1;
setp.eq.u32 %p1, %x1, 0;
@!%p1 bra ODD;
add.u32 %x2, %x0, 10000;
bra.uni DONE;
ODD:
add.u32 %x2, %x0, 20000;
bra DONE;
SMALL:
setp.lt.u32 %p2, %x0, 100;
@%p2 bra TINY;
setp.gt.u32 %p3, %x0, 250;
@%p3 add.u32 %x2, %x0, 30000;
@!%p3 add.u32 %x2, %x0, 40000;
bra DONE;
TINY:
mul.lo.u32 %x2, %x0, %x0;
DONE:
activemask.b32 %m0;
popc.b32 %m0, %m0;
shl.b32 %m0, %m0, 24;
or.b32 %x2, %x2, %m0;
st.global.b32 [%out], %x2;
ret;
}
"""
)
def test_nested_ifs(module: ptxemu.Module) -> None:
    """All lanes of a warp are together again at the end: the number of active ones shows it."""

    def wanted(x: int) -> int:
        if x < 100:
            return x * x
        if x < 500:
            return x + (30000 if x > 250 else 40000)
        return x + (20000 if x & 1 else 10000)

    values, out = run(module)
    active = [32 if i % 100 < 96 else 4 for i in range(200)]
    assert out == [wanted(x) | n << 24 for x, n in zip(values, active, strict=True)]


@program(
    HEADER
    + """
mov.u32 %x1, 0;
mov.u32 %x2, %x0;
LOOP:
setp.le.u32 %p0, %x2, 1;
@%p0 bra DONE;
and.b32 %x3, %x2, 1;
setp.eq.u32 %p1, %x3, 1;
@%p1 bra ODD;
shr.u32 %x2, %x2, 1;
bra NEXT;
ODD:
mad.lo.u32 %x2, %x2, 3, 1;
NEXT:
add.u32 %x1, %x1, 1;
bra LOOP;
DONE:
activemask.b32 %m0;
popc.b32 %m0, %m0;
shl.b32 %m0, %m0, 24;
or.b32 %x1, %x1, %m0;
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_loop_with_a_count_of_each_lane(module: ptxemu.Module) -> None:
    """Collatz: how many steps to 1."""

    def steps(x: int) -> int:
        count = 0
        while x > 1:
            x = 3 * x + 1 if x & 1 else x // 2
            count += 1
        return count

    values, out = run(module)
    active = [32 if i % 100 < 96 else 4 for i in range(200)]
    assert out == [steps(x) | n << 24 for x, n in zip(values, active, strict=True)]


@program(
    HEADER
    + """
mov.u32 %x1, 0;
mov.u32 %x2, 0;
OUTER:
setp.ge.u32 %p0, %x2, %x0;
@%p0 bra DONE;
mov.u32 %x3, 0;
INNER:
add.u32 %x4, %x2, %x3;
rem.u32 %x5, %x4, 7;
setp.eq.u32 %p1, %x5, 6;
@%p1 bra NEXT_OUTER;
add.u32 %x3, %x3, 1;
rem.u32 %x5, %x4, 3;
setp.eq.u32 %p2, %x5, 0;
@%p2 bra INNER_TEST;
add.u32 %x1, %x1, %x4;
setp.gt.u32 %p3, %x1, 5000;
@%p3 bra DONE;
INNER_TEST:
setp.lt.u32 %p4, %x3, %x2;
@%p4 bra INNER;
NEXT_OUTER:
add.u32 %x2, %x2, 1;
bra OUTER;
DONE:
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_nested_loops_with_break_and_continue(module: ptxemu.Module) -> None:
    def wanted(x: int) -> int:
        total = 0
        for i in range(x):
            j = 0
            while True:
                n = i + j
                if n % 7 == 6:
                    break
                j += 1
                if n % 3:
                    total += n
                    if total > 5000:
                        return total
                if j >= i:
                    break
        return total

    values, out = run(module, high=60)
    assert out == [wanted(x) for x in values]


@program(
    HEADER
    + """
rem.u32 %x1, %x0, 5;
TARGETS: .branchtargets A, B, C, B, D;
setp.gt.u32 %p0, %x0, 900;
mov.u32 %x2, 77;
@%p0 bra END;
brx.idx %x1, TARGETS;
A: add.u32 %x2, %x0, 1; bra END;
B: add.u32 %x2, %x0, 2;
C: add.u32 %x2, %x2, 100; bra END;
D: mov.u32 %x2, 4;
END:
st.global.b32 [%out], %x2;
ret;
}
"""
)
def test_branch_table(module: ptxemu.Module) -> None:
    def wanted(x: int) -> int:
        if x > 900:
            return 77
        return {0: x + 1, 1: x + 102, 2: 177, 3: x + 102, 4: 4}[x % 5]

    values, out = run(module)
    assert out == [wanted(x) for x in values]


@program(
    HEADER
    + """
mov.u32 %x1, 0;
and.b32 %x2, %x0, 1;
setp.eq.u32 %p0, %x2, 0;
@%p0 bra SECOND;
FIRST:
add.u32 %x1, %x1, 3;
add.u32 %x0, %x0, 7;
setp.gt.u32 %p1, %x1, 50;
@%p1 bra DONE;
SECOND:
add.u32 %x1, %x1, 5;
and.b32 %x3, %x0, 6;
setp.eq.u32 %p2, %x3, 2;
add.u32 %x0, %x0, 3;
@%p2 bra SECOND;
setp.gt.u32 %p3, %x1, 70;
@!%p3 bra FIRST;
DONE:
st.global.b32 [%out], %x1;
ret;
}
"""
)
def test_loop_with_two_entries(module: ptxemu.Module) -> None:
    """No structured program would give this flow; a compiler may."""

    def wanted(x: int) -> int:
        total, place = 0, "second" if x & 1 == 0 else "first"
        while True:
            if place == "first":
                total, x = total + 3, x + 7
                if total > 50:
                    return total
            total += 5
            again, x = x & 6 == 2, x + 3
            place = "second" if again else "first"
            if not again and total > 70:
                return total

    values, out = run(module)
    assert out == [wanted(x) for x in values]
