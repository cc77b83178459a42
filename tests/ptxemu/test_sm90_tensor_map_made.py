"""Tensor maps that a kernel makes (tensormap.replace, tensormap.cp_fenceproxy)."""

from __future__ import annotations

import pytest
import torch

from ptxemu import TensorMap, sm90
from ptxemu.sm90 import BUFFER, END, init, wait
from ptxemu.sm90_boxes import (
    ELEMENTS,
    MAP_AT,
    PUBLISH,
    ZERO,
    box_of,
    counted,
    fields,
    load,
    read,
    replace,
    store,
    with_map,
)
from ptxemu.tensor_map import Swizzle


@pytest.mark.parametrize(
    ("shape", "box", "at"),
    [((40,), (16,), (-3,)), ((7, 32), (4, 16), (5, 20)), ((3, 4, 16), (2, 2, 16), (2, -1, 0)),
     ((2, 3, 4, 16), (1, 2, 2, 16), (1, 2, 3, 5)), ((2, 2, 3, 2, 16), (2, 1, 2, 2, 16), (1, 0, -1, 1, 0))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_every_field(
    shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Made in shared memory and copied, or in its place in global memory."""
    tensor = counted(*shape, dtype=torch.int64).remainder(50).to(dtype)
    m = TensorMap(tensor, box, nan_fill=dtype.is_floating_point)
    in_place = fields(m, "x", "global") + "fence.proxy.tensormap::generic.acquire.gpu [x], 128;\n"
    for body in (ZERO + fields(m) + PUBLISH, BUFFER + in_place):
        result = read(body, m, with_map(tensor), at).clean()
        actual = result.y.view(dtype).view(box)
        inside = box_of(torch.ones_like(tensor), at, box) == 1
        assert torch.equal(actual[inside], box_of(tensor.double(), at, box).to(dtype)[inside])
        outside = actual[~inside].double()
        assert outside.isnan().all() if dtype.is_floating_point else not outside.any()


@pytest.mark.parametrize("swizzle", ["32B", "64B", "128B"])
def test_swizzle_mode(swizzle: Swizzle) -> None:
    columns = int(swizzle[:-1]) // 4
    tensor = counted(16, columns)
    m = TensorMap(tensor, (16, columns), swizzle)
    result = read(ZERO + fields(m) + PUBLISH, m, with_map(tensor), (0, 0)).clean()
    chunks = result.y.view(torch.int32).view(-1, 4)
    mask = columns // 4 - 1
    order = [i // 8 * 8 + (i % 8 ^ (i // 8 & mask)) for i in range(len(chunks))]
    assert torch.equal(chunks[order].view(16, columns), tensor)


def test_changing_a_map_from_the_host() -> None:
    """A kernel copies its parameter, lets it point elsewhere and makes it smaller."""
    other, tensor = counted(8, 16), counted(8, 16).neg()
    m = TensorMap(other, (4, 8))
    body = f"""{MAP_AT}
    mad.lo.u32 r6, lane, 4, r5;
    cvt.u64.u32 q1, lane;
    mad.lo.u64 q1, q1, 4, m0;
    ld.u32 r7, [q1];
    st.shared.u32 [r6], r7;
    bar.warp.sync -1;
    add.s64 q1, x, 128;
    {replace("global_address", "q1")}{replace("global_dim", 6, 1)}{PUBLISH}"""
    result = read(body, m, with_map(tensor), (4, 2), maps=[m])
    expected = box_of(tensor[:6], (4, 2), (4, 8))
    assert torch.equal(result.clean().y.view(torch.int32).view(4, 8), expected)


def test_prefetches_and_store() -> None:
    x, y = counted(8, 16), torch.zeros(8, 16, dtype=torch.int32)
    maps = [TensorMap(t, (4, 8)) for t in (x, y)]
    body = f"""{init(1)}{BUFFER}
    prefetch.tensormap [m0];
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [m0, {{0, 0}}];
    {load((2, 4), 128)}{wait()}{store((6, 12), "m1")}{END}"""
    sm90.run(body, maps=maps).clean()
    assert torch.equal(y[6:, 12:], x[2:4, 4:8]) and y.count_nonzero() == 8
