"""Tensor maps: boxes of tensors of one to five dimensions, over every edge, and maps that a kernel makes itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ptxemu import TensorMap, sm90
from ptxemu.checkers import Result
from ptxemu.gmma import swizzled
from ptxemu.sm90 import BUFFER, END, FENCE, init, wait
from ptxemu.sm90_boxes import IN, OUT, bits, box_of, counted, load, store
from ptxemu.tensor_map import Swizzle


def loaded(tensor_map: TensorMap, at: Sequence[int], seed: int = 0) -> NDArray[np.uint8]:
    """The box as it lies in shared memory, bytes."""
    size = int(np.prod(tensor_map.box)) * tensor_map.tensor.element_size()
    y = torch.zeros(size, dtype=torch.uint8)
    body = init(1) + BUFFER + load(at, size) + wait() + OUT
    sm90.run(body, 0, y, n=size, maps=[tensor_map], shared=max(size, 1024), seed=seed).clean()
    return y.numpy()


SHAPES = {1: ((19,), (8,)), 2: ((5, 12), (3, 8)), 3: ((3, 4, 12), (2, 3, 4)), 4: ((2, 3, 2, 8), (2, 2, 2, 4)),
          5: ((2, 3, 2, 2, 8), (2, 2, 1, 2, 4))}  # fmt: skip


@pytest.mark.parametrize("rank", SHAPES)
def test_load(rank: int) -> None:
    """Boxes inside, over the edge of each dimension on both sides, and outside altogether."""
    shape, box = SHAPES[rank]
    tensor = counted(*shape)
    tensor_map = TensorMap(tensor, box)
    places = [(0,) * rank, (-100,) * rank]
    for d in range(rank):
        for c in (-box[d] + 1, -1, 1, shape[d] - 1, shape[d]):
            places.append(tuple(c if i == d else 0 for i in range(rank)))
    for seed, at in enumerate(places):
        assert np.array_equal(loaded(tensor_map, at, seed), bits(box_of(tensor, at, box))), at


@pytest.mark.parametrize("rank", SHAPES)
def test_store(rank: int) -> None:
    """Only what is inside of the tensor is written, and nothing of memory between its rows."""
    shape, box = SHAPES[rank]
    for at in ((0,) * rank, (-1,) * rank, tuple(s - 1 for s in shape), shape):
        whole = (
            torch.zeros(*shape[:-1], shape[-1] + 8, dtype=torch.int32)
            if rank > 1
            else torch.zeros(*shape, dtype=torch.int32)
        )
        tensor = whole[..., : shape[-1]]
        x = counted(*box)
        body = BUFFER + IN + store(at) + END
        sm90.run(body, x, n=x.nbytes, maps=[TensorMap(tensor, box)]).clean()
        expected = torch.zeros_like(tensor)
        for index in itertools.product(*map(range, box)):
            place = tuple(a + i for a, i in zip(at, index, strict=True))
            if all(0 <= p < s for p, s in zip(place, shape, strict=True)):
                expected[place] = x[index]
        assert torch.equal(tensor, expected)
        assert not whole[..., shape[-1] :].any()


def test_strides() -> None:
    """Dimensions in another order than in memory, and gaps."""
    tensor = counted(4, 6, 24)[:, ::2, 4:20].transpose(0, 1)
    for at in ((0, 0, 0), (1, -1, 3), (2, 2, 10)):
        assert np.array_equal(
            loaded(TensorMap(tensor, (2, 3, 8)), at), bits(box_of(tensor, at, (2, 3, 8)))
        )


DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
def test_types_and_swizzles(dtype: torch.dtype, swizzle: Swizzle) -> None:
    """16-byte chunk c of the row of 128 bytes number r lies at chunk c ^ r, modulo the chunks that are exchanged."""
    row = 48 if swizzle == "none" else int(swizzle[:-1])
    box = (10, row // dtype.itemsize)
    tensor = counted(16, 2 * box[1], dtype=torch.int64).remainder(100).to(dtype)
    for at in ((0, 0), (3, box[1] // 2), (9, -1), (-2, 2 * box[1] - 3)):
        actual = loaded(TensorMap(tensor, box, swizzle), at)
        plain = bits(box_of(tensor.double(), at, box).to(dtype))
        expected = np.zeros_like(plain)
        for chunk in range(len(plain) // 16):
            line, column = divmod(chunk, 8)
            mask = {"none": 0, "32B": 1, "64B": 3, "128B": 7}[swizzle]
            to = line * 8 + (column ^ (line & mask))
            expected[16 * to : 16 * to + 16] = plain[16 * chunk : 16 * chunk + 16]
        assert np.array_equal(actual, expected)


def test_swizzle_follows_the_address() -> None:
    """A box that does not start where the pattern does."""
    tensor = counted(16, 32)
    y = torch.zeros(4096, dtype=torch.uint8)
    move = load((0, 0), 2048, to="r4").replace(
        "@first mbarrier", "add.u32 r4, r0, 384;\n@first mbarrier", 1
    )
    zero = (
        "".join(f"st.shared.u32 [own+{i}], 0;\n" for i in range(0, 4096, 128))
        + FENCE
        + "\nbar.warp.sync -1;\n"
    )
    body = init(1) + BUFFER + zero + move + wait() + OUT
    sm90.run(body, 0, y, n=4096, maps=[TensorMap(tensor, (16, 32), "128B")]).clean()
    at = swizzled(384 + np.arange(2048), 128)
    assert np.array_equal(y.numpy()[at], bits(tensor))
    assert not np.delete(y.numpy(), at).any()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("swizzle", ["none", "64B"])
def test_nan_outside(dtype: torch.dtype, swizzle: Swizzle) -> None:
    columns = 64 // dtype.itemsize
    tensor = torch.ones(4, columns, dtype=dtype)
    at = swizzled(np.arange(256), 64) if swizzle != "none" else np.arange(256)
    box = loaded(TensorMap(tensor, (4, columns), swizzle, nan_fill=True), (2, 3))[at]
    inside = torch.zeros(4, columns, dtype=torch.bool)
    inside[:2, : columns - 3] = True
    values = torch.from_numpy(box).view(dtype).view(4, columns)
    assert torch.equal(values.isnan(), ~inside) and (values[inside] == 1).all()


# ---- reductions

REDUCIBLE = {
    "add": [torch.int32, torch.uint32, torch.uint64, torch.float32, torch.float16, torch.bfloat16],
    "min": [torch.int32, torch.int64, torch.float16], "max": [torch.int32, torch.int64, torch.bfloat16],
    "inc": [torch.uint32], "dec": [torch.uint32], "and": [torch.int32], "or": [torch.int64], "xor": [torch.int32],
}  # fmt: skip


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "inc": lambda old, v: torch.where(old >= v, 0, old + 1),
    "dec": lambda old, v: torch.where((old == 0) | (old > v), v, old - 1),
}


def reduce(
    op: str, tensor: torch.Tensor, x: torch.Tensor, at: Sequence[int], mark: str = ""
) -> Result:
    body = BUFFER + IN + store(at, op=op, mark=mark) + END
    return sm90.run(body, x, n=x.nbytes, maps=[TensorMap(tensor, x.shape)])


@pytest.mark.parametrize(
    ("op", "dtype"), [(op, d) for op, ds in REDUCIBLE.items() for d in ds], ids=str
)
def test_reductions(op: str, dtype: torch.dtype) -> None:
    """Of the part of the box that is inside."""
    rng = np.random.default_rng(0)
    low = 0 if dtype in (torch.uint32, torch.uint64) else -20
    old, value = (torch.from_numpy(rng.integers(low, 20, (4, 8))) for _ in "ab")
    tensor, x = old.to(dtype), value[:3].to(dtype)
    expected = old.clone()
    expected[2:, 3:] = FUNCTIONS[op](old[2:, 3:], value[:2, :5])
    reduce(op, tensor, x, (2, 3)).clean()
    assert torch.equal(tensor, expected.to(dtype))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("min", torch.float32), ("add", torch.float64), ("add", torch.int64), ("add", torch.int16), ("and", torch.float32),
     ("inc", torch.int32), ("max", torch.uint8)],
)  # fmt: skip
def test_reductions_that_the_type_does_not_have(op: str, dtype: torch.dtype) -> None:
    tensor, x = torch.zeros(4, 16, dtype=dtype), torch.zeros(2, 16, dtype=dtype)
    reduce(op, tensor, x, (0, 0), " // here").only(
        "invalid", "elements of type .* do not have this reduction"
    )
