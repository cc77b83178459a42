"""Copies of boxes of tensors: PTX for the tests of tensor maps, and what the boxes hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptxemu import Argument, TensorMap, sm90
from ptxemu.checkers import Result
from ptxemu.sm90 import BUFFER, FENCE, init, wait


def coordinates(at: Sequence[int]) -> str:
    """Innermost first, as PTX has them."""
    return "{" + ", ".join(str(c) for c in reversed(at)) + "}"


def load(at: Sequence[int], bytes_: int, map_: str = "m0", to: str = "r0", mark: str = "") -> str:
    """Thread 0 loads the box at index `at`."""
    mode = f"{len(at)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    return f"""
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {bytes_};
    @first cp.async.bulk.tensor.{mode} [{to}], [{map_}, {coordinates(at)}], [bars];{mark}
    """


def store(at: Sequence[int], map_: str = "m0", op: str = "", mark: str = "") -> str:
    """Thread 0 stores the box from the buffer, or reduces with it."""
    name = f"{'cp.reduce' if op else 'cp'}.async.bulk.tensor.{len(at)}d.global.shared::cta"
    mode = f".{op}.tile" if op else ".tile"
    return f"@first {name}{mode}.bulk_group [{map_}, {coordinates(at)}], [r0];{mark}\n"


# Of the buffer's first n bytes, by 32 threads.
COPY = """
mov.u32 r1, tid;
mov.u32 r2, own;
mul.wide.u32 d0, tid, 4;
add.s64 d0, d0, POINTER;
shr.u32 r4, n, 2;
COPY:
setp.lt.u32 p0, r1, r4;
@p0 LOAD;
@p0 STORE;
add.s64 d0, d0, 128;
add.u32 r2, r2, 128;
add.u32 r1, r1, 32;
setp.lt.u32 p0, r1, r4;
@p0 bra COPY;
"""
OUT = (
    COPY.replace("POINTER", "y")
    .replace("LOAD", "ld.shared.u32 r3, [r2]")
    .replace("STORE", "st.global.u32 [d0], r3")
)
IN = (
    COPY.replace("POINTER", "x")
    .replace("LOAD", "ld.global.u32 r3, [d0]")
    .replace("STORE", "st.shared.u32 [r2], r3")
)
IN += FENCE + "\nbar.warp.sync -1;\n"


def box_of(
    tensor: torch.Tensor, at: Sequence[int], box: Sequence[int], fill: float = 0
) -> torch.Tensor:
    """The box from index `at` on; what is outside is `fill`."""
    result = torch.full(tuple(box), fill, dtype=torch.float64).to(tensor.dtype)
    for index in itertools.product(*map(range, box)):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < s for p, s in zip(place, tensor.shape, strict=True)):
            result[index] = tensor[place]
    return result


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


def counted(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """1, 2, 3, …"""
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)


# ---- maps that a kernel makes

# PTX ISA, "tensormap.replace", validity of new_val for .elemtype.
ELEMENTS = {
    torch.uint8: 0, torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4, torch.int64: 5, torch.float16: 6,
    torch.float32: 7, torch.float64: 9, torch.bfloat16: 10,
}  # fmt: skip
SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
# A warp clears the map at r5, in shared memory; when it is made, copies it to x, whose tensor follows it.
MAP_AT = BUFFER + "add.u32 r5, r0, 2048;\n"
ZERO = MAP_AT + "mad.lo.u32 r6, lane, 4, r5;\nst.shared.u32 [r6], 0;\nbar.warp.sync -1;\n"
PUBLISH = """
bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [x], [r5], 128;
fence.proxy.tensormap::generic.acquire.gpu [x], 128;
"""


def replace(
    field: str,
    value: int | str,
    index: int | None = None,
    at: str = "r5",
    space: str = "shared::cta",
) -> str:
    """Thread 0 sets one field of the map at `at`."""
    width = "b64" if field in ("global_address", "global_stride") else "b32"
    operands = str(value) if index is None else f"{index}, {value}"
    return f"@first tensormap.replace.tile.{field}.{space}.b1024.{width} [{at}], {operands};\n"


def fields(m: TensorMap, at: str = "r5", space: str = "shared::cta") -> str:
    """All fields of a map; the tensor is behind the map in x."""
    size = m.tensor.element_size()
    lines = ["add.s64 q1, x, 128;\n", replace("global_address", "q1", None, at, space)]

    def add(field: str, values: Sequence[int]) -> None:
        lines.extend(replace(field, v, i, at, space) for i, v in enumerate(values))

    add("box_dim", m.box[::-1])
    add("global_dim", list(m.tensor.shape)[::-1])
    add("global_stride", [s * size for s in m.tensor.stride()[:-1]][::-1])
    add("element_stride", [1] * len(m.box))
    codes = {
        "rank": len(m.box) - 1,
        "elemtype": ELEMENTS[m.tensor.dtype],
        "interleave_layout": 0,
        "swizzle_mode": SWIZZLES[m.swizzle],
        "fill_mode": int(m.nan_fill),
    }
    return "".join([*lines, *(replace(f, code, None, at, space) for f, code in codes.items())])


def with_map(tensor: torch.Tensor) -> torch.Tensor:
    """Room for a map, and the tensor's memory."""
    return torch.cat([torch.zeros(128, dtype=torch.uint8), torch.from_numpy(bits(tensor).copy())])


def size_of(m: TensorMap) -> int:
    """Bytes of a box."""
    return int(np.prod(m.box)) * m.tensor.element_size()


def read(
    body: str, m: TensorMap, x: Argument, at: Sequence[int], map_: str = "x", **options: Any
) -> Result:
    """y: the box that a map reads which the body makes."""
    text = init(1) + body + load(at, size_of(m), map_) + wait() + OUT
    return sm90.run(text, x, torch.zeros(size_of(m), dtype=torch.uint8), size_of(m), **options)
