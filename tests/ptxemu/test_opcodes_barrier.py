"""Barriers of a block and of a cluster, fences, and hints (PTX ISA, "Parallel Synchronization … Instructions")."""

from __future__ import annotations

import numpy as np

import ptxemu

from .opcode_case import program

_HEAD = """
.visible .entry test(.param .u64 out)
{
.shared .align 4 .b32 tile[256];
.reg .b64 %out, %a; .reg .b32 %i<6>, %v<6>, %s<3>; .reg .pred %p<6>;
ld.param.u64 %out, [out];
mov.u32 %i0, %tid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %ctaid.x; mad.lo.u32 %i3, %i2, %i1, %i0;
mad.wide.u32 %out, %i3, 16, %out;
mov.u32 %s0, tile; mad.lo.u32 %s1, %i0, 4, %s0;
"""
_NEIGHBOUR = """
add.u32 %v0, %i0, 1; rem.u32 %v0, %v0, %i1; mad.lo.u32 %s2, %v0, 4, %s0;
"""


def run(
    module: ptxemu.Module, block: int, grid: int = 1, seeds: int = 4, **more: object
) -> list[np.ndarray]:
    results = []
    for seed in range(seeds):
        out = np.full((grid * block, 4), -1, np.int32)
        module.launch("test", grid, block, [out], seed=seed, **more).check()  # type: ignore[arg-type]
        results.append(out)
    return results


def _ring(sync: str) -> str:
    """Each thread reads what its neighbour wrote, three times over."""
    step = f"st.shared.b32 [%s1], %v1; {sync} ld.shared.b32 %v2, [%s2]; {sync} mad.lo.u32 %v1, %v1, 2, %v2;\n"
    return (
        _HEAD
        + _NEIGHBOUR
        + "mov.u32 %v1, %i0; mov.u32 %v3, 0;\n"
        + 3 * step
        + "st.global.b32 [%out], %v1;\nret;\n}\n"
    )


def ring(block: int) -> list[int]:
    values = list(range(block))
    for _ in range(3):
        values = [2 * v + values[(i + 1) % block] for i, v in enumerate(values)]
    return values


@program(_ring("bar.sync 0;"))
def test_block(module: ptxemu.Module) -> None:
    """Blocks of one warp, of several, and of a last one that is not full."""
    for block in (32, 128, 70):
        for out in run(module, block):
            assert out[:, 0].tolist() == ring(block)


@program(_ring("barrier.sync 3;"))
def test_unaligned(module: ptxemu.Module) -> None:
    for out in run(module, 70):
        assert out[:, 0].tolist() == ring(70)


@program(
    _ring(
        "{ .reg .b32 id, n; mov.u32 id, 7; add.u32 n, %i1, 31; and.b32 n, n, -32; barrier.cta.sync.aligned id, n; }"
    )
)
def test_number_and_count_in_registers(module: ptxemu.Module) -> None:
    for out in run(module, 100):
        assert out[:, 0].tolist() == ring(100)


@program(
    _HEAD
    + _NEIGHBOUR
    + """
st.shared.b32 [%s1], %i0;
and.b32 %v1, %i0, 1;
setp.eq.u32 %p0, %v1, 0;
@%p0 bra EVEN;
barrier.sync 0;
bra DONE;
EVEN:
barrier.sync 0;
DONE:
ld.shared.b32 %v2, [%s2];
st.global.b32 [%out], %v2;
ret;
}
"""
)
def test_lanes_come_one_after_another(module: ptxemu.Module) -> None:
    """Without .aligned the lanes of a warp may come from different places, also those of one that is not full."""
    for block in (64, 70):
        for out in run(module, block):
            assert out[:, 0].tolist() == [(i + 1) % block for i in range(block)]


@program(
    _HEAD
    + """
shr.u32 %i4, %i0, 5;
setp.lt.u32 %p0, %i4, 2;
@%p0 bra FIRST;
add.u32 %v0, %i0, 1; and.b32 %v0, %v0, 63; add.u32 %v0, %v0, 64; mad.lo.u32 %s2, %v0, 4, %s0;
st.shared.b32 [%s1], %i0;
bar.sync 2, 64;
ld.shared.b32 %v1, [%s2];
bra DONE;
FIRST:
xor.b32 %v0, %i0, 32; mad.lo.u32 %s2, %v0, 4, %s0;
st.shared.b32 [%s1], %i0;
bar.sync 1, 64;
ld.shared.b32 %v1, [%s2];
DONE:
st.global.b32 [%out], %v1;
ret;
}
"""
)
def test_two_groups_of_warps(module: ptxemu.Module) -> None:
    """Each with a barrier and a count of its own."""
    for out in run(module, 128):
        assert out[:, 0].tolist() == [i ^ 32 if i < 64 else 64 + (i + 1) % 64 for i in range(128)]


@program(
    _HEAD
    + """
shr.u32 %i4, %i0, 5;
setp.eq.u32 %p0, %i4, 0;
mov.u32 %v3, 0; mov.u32 %v4, 0;
@!%p0 bra PRODUCER;
CONSUMER:
bar.sync 1, 96;
ld.shared.b32 %v1, [%s1+128]; ld.shared.b32 %v2, [%s1+256];
add.u32 %v4, %v4, %v1; add.u32 %v4, %v4, %v2;
bar.arrive 2, 96;
add.u32 %v3, %v3, 1; setp.lt.u32 %p1, %v3, 3;
@%p1 bra CONSUMER;
bra DONE;
PRODUCER:
mad.lo.u32 %v1, %v3, 1000, %i0; st.shared.b32 [%s1], %v1;
barrier.cta.arrive.aligned 1, 96;
barrier.sync.aligned 2, 96;
add.u32 %v3, %v3, 1; setp.lt.u32 %p1, %v3, 3;
@%p1 bra PRODUCER;
DONE:
st.global.b32 [%out], %v4;
ret;
}
"""
)
def test_producers_and_a_consumer(module: ptxemu.Module) -> None:
    """Who only arrives does not wait; the two barriers take turns."""
    for out in run(module, 96):
        assert out[:, 0].tolist() == [3 * (2 * i + 96) + 6000 if i < 32 else 0 for i in range(96)]


@program(
    _HEAD
    + """
rem.u32 %v0, %i0, 3; setp.eq.u32 %p0, %v0, 0;
setp.lt.u32 %p1, %i0, %i1;
setp.eq.u32 %p2, %i0, 41;
bar.red.popc.u32 %v1, 0, %p0;
bar.red.popc.u32 %v2, 1, %i1, !%p0;
st.global.v2.b32 [%out], {%v1, %v2};
bar.red.and.pred %p3, 0, %p1; selp.u32 %v1, 1, 0, %p3;
bar.red.and.pred %p3, 0, %p0; selp.u32 %v2, 2, 0, %p3; or.b32 %v1, %v1, %v2;
bar.red.or.pred %p3, 0, %p2; selp.u32 %v2, 4, 0, %p3; or.b32 %v1, %v1, %v2;
bar.red.or.pred %p3, 0, !%p1; selp.u32 %v2, 8, 0, %p3; or.b32 %v1, %v1, %v2;
barrier.red.and.pred %p3, 5, !%p2; selp.u32 %v2, 16, 0, %p3; or.b32 %v1, %v1, %v2;
barrier.cta.red.or.aligned.pred %p3, 6, %p0; selp.u32 %v2, 32, 0, %p3; or.b32 %v1, %v1, %v2;
st.global.b32 [%out+8], %v1;
ret;
}
"""
)
def test_reductions(module: ptxemu.Module) -> None:
    """Counts, and, or over the block, of predicates and of their negations."""
    for out in run(module, 96):
        assert out[:, :3].tolist() == [[32, 64, 1 | 4 | 32]] * 96


@program(
    _HEAD
    + """
mov.u32 %v0, %cluster_ctarank;
st.shared.b32 [%s1], %i3;
fence.acq_rel.cluster; membar.cta; membar.gl; membar.sys; fence.sc.gpu; fence.acq_rel.sys;
fence.proxy.async; fence.proxy.alias;
barrier.cluster.arrive.release.aligned;
nanosleep.u32 20; mov.u32 %v1, 5; nanosleep.u32 %v1;
barrier.cluster.wait.acquire.aligned;
ld.shared.b32 %v1, [%s1];
st.global.v2.b32 [%out], {%v0, %v1};
barrier.cluster.arrive; barrier.cluster.wait;
barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
griddepcontrol.wait; griddepcontrol.launch_dependents;
ret;
}
"""
)
def test_cluster(module: ptxemu.Module) -> None:
    for out in run(module, 64, grid=4, cluster=2):
        assert out[:, 0].tolist() == [i // 64 % 2 for i in range(256)]
        assert out[:, 1].tolist() == list(range(256))


@program(
    _HEAD
    + """
shr.u32 %i4, %i0, 5; setp.lt.u32 %p0, %i4, 4;
@%p0 bra LESS;
setmaxnreg.inc.sync.aligned.u32 232;
bra DONE;
LESS:
setmaxnreg.dec.sync.aligned.u32 40;
DONE:
st.global.b32 [%out], %i0;
ret;
}
"""
)
def test_registers_are_given_and_taken(module: ptxemu.Module) -> None:
    for out in run(module, 256):
        assert out[:, 0].tolist() == list(range(256))
