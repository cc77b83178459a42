"""Special registers over grids and blocks of three dimensions, and of clusters (PTX ISA, "Special Registers")."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import ptxemu

from .opcode_case import HEAD, carry

THREAD = ("tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x",
          "nctaid.y", "nctaid.z", "laneid", "warpid", "nwarpid", "lanemask_eq",
          "lanemask_lt", "lanemask_le", "lanemask_gt",
          "lanemask_ge", "smid", "nsmid", "dynamic_smem_size", "total_smem_size")  # fmt: skip
CLUSTER = ("cluster_ctarank", "cluster_nctarank", "cluster_ctaid.x", "cluster_ctaid.y", "cluster_ctaid.z",
           "cluster_nctaid.x", "cluster_nctaid.y", "cluster_nctaid.z", "clusterid.x", "clusterid.y", "clusterid.z",
           "nclusterid.x", "nclusterid.y", "nclusterid.z")  # fmt: skip
NAMES = THREAD + CLUSTER


def ptx() -> str:
    """Every thread writes all of them, at its place in the grid: blocks in order, then threads."""
    stores = "\n".join(
        f"mov.u32 %v, %{name}; st.global.b32 [%out+{4 * i}], %v;" for i, name in enumerate(NAMES)
    )
    return (
        HEAD.format(target="sm_90a")
        + f"""
.shared .align 4 .b8 room[40];
.visible .entry test(.param .u64 out)
{{
.reg .b32 %v, %i<8>; .reg .b64 %out, %at;
ld.param.u64 %out, [out];
mov.u32 %i0, %ctaid.z; mov.u32 %i1, %nctaid.y; mov.u32 %i2, %ctaid.y; mad.lo.u32 %i0, %i0, %i1, %i2;
mov.u32 %i1, %nctaid.x; mov.u32 %i2, %ctaid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
mov.u32 %i1, %ntid.z; mov.u32 %i2, %tid.z; mad.lo.u32 %i0, %i0, %i1, %i2;
mov.u32 %i1, %ntid.y; mov.u32 %i2, %tid.y; mad.lo.u32 %i0, %i0, %i1, %i2;
mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
mad.wide.u32 %out, %i0, {4 * len(NAMES)}, %out;
mov.u32 %v, room; st.shared.b32 [%v], %v;
{stores}
ret;
}}
"""
    )


@pytest.mark.parametrize(
    ("grid", "block", "cluster"),
    [
        ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((3, 2, 2), (5, 3, 4), (1, 1, 1)),
        ((2, 1, 1), (33, 1, 1), (1, 1, 1)),
        ((4, 2, 3), (7, 1, 9), (2, 2, 1)),
        ((1, 2, 4), (3, 31, 1), (1, 1, 4)),
    ],
)
def test_special(
    grid: tuple[int, int, int], block: tuple[int, int, int], cluster: tuple[int, int, int]
) -> None:
    threads = int(np.prod(block))
    out = np.zeros((int(np.prod(grid)) * threads, len(NAMES)), np.uint32)
    module = ptxemu.load(ptx())
    module.launch(grid=grid, block=block, cluster=cluster, args=[out], shared=24, seed=3).check()
    places = itertools.product(*(range(n) for n in (*reversed(grid), *reversed(block))))
    for row, (cz, cy, cx, tz, ty, tx) in zip(out, places, strict=True):
        index = tx + block[0] * (ty + block[1] * tz)
        lane, cta, tid = index % 32, (cx, cy, cz), (tx, ty, tz)
        inside = tuple(c % n for c, n in zip(cta, cluster, strict=True))
        wanted = [*tid, *block, *cta, *grid, lane, index // 32, 1 << lane, (1 << lane) - 1,
                  (2 << lane) - 1, (-2 << lane) % (1 << 32), (-1 << lane) % (1 << 32)]  # fmt: skip
        assert [*row[:14].tolist(), *row[15:20].tolist()] == wanted
        assert row[14] == out[0][14] >= -(-threads // 32)  # warp numbers that there may be
        smid, nsmid, dynamic, total = row[20:24].tolist()
        assert smid < nsmid
        assert dynamic == 24
        assert total >= 64  # what the driver keeps for itself may come on top
        rank = inside[0] + cluster[0] * (inside[1] + cluster[1] * inside[2])
        assert row[24:].tolist() == [
            rank, int(np.prod(cluster)), *inside, *cluster,
            *(c // n for c, n in zip(cta, cluster, strict=True)), *(g // n for g, n in zip(grid, cluster, strict=True)),
        ]  # fmt: skip


carry(test_special, lambda: [ptx()])
