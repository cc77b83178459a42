"""Tensor maps that cannot be used, and those that cannot be made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ptxemu import Argument, Output, PtxError, TensorMap, sm90
from ptxemu.checkers import words
from ptxemu.sm90 import BUFFER, END, FENCE, init
from ptxemu.sm90_boxes import (
    MAP_AT,
    PUBLISH,
    ZERO,
    counted,
    fields,
    load,
    read,
    replace,
    store,
    with_map,
)


def fails(
    body: str, kind: str, message: str, x: Argument = 0, maps: Sequence[TensorMap] = ()
) -> None:
    result = sm90.run(init(1) + BUFFER + body, x, words(64), maps=maps)
    result.first(kind, message)


MAP = TensorMap(counted(8, 16), (4, 8))
HERE = " // here"


def load_by(map_: str) -> str:
    return load((0, 0), 128, map_, mark=HERE)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (load((0, 0, 0), 128, mark=HERE), "invalid", "the tensor map is of 2 dimensions"),
        (load((0,), 128, mark=HERE), "invalid", "the tensor map is of 2 dimensions"),
        (load((0, 0), 128, to="r0+64", mark=HERE), "misaligned", "is not a multiple of 128"),
        (load((0, 0), 128, to="r0+4096", mark=HERE), "out-of-bounds", r"copies to shared bytes 4\d* to 4\d*"),
        (store((0, 0), mark=HERE), "uninitialised", "copies shared memory that was never written"),
        ("add.s64 q1, m0, 32;\n" + load_by("q1"), "misaligned", "is not a multiple of 64"),
        ("add.s64 q1, y, 128;\n" + load_by("q1"), "invalid", "the address does not hold a tensor map"),
        ("add.s64 q1, y, 256;\n" + load_by("q1"), "out-of-bounds", "past the end of y"),
        ("mov.b64 q1, map0;\n" + load_by("q1"), "out-of-bounds", "a null pointer"),  # it lacks a cvta.param
        ("cvt.u64.u32 q1, r0;\ncvta.shared.u64 q1, q1;\n" + load_by("q1"), "invalid", "is in global, constant or"),
    ],
)  # fmt: skip
def test_wrong_use(body: str, kind: str, message: str) -> None:
    fails(body, kind, message, maps=[MAP])


def test_map_that_was_never_written() -> None:
    message = "some of the tensor map was never written"
    fails(load_by("x"), "invalid", message, Output(words(32)))
    partly = MAP_AT + fields(MAP) + PUBLISH.replace("128;\nfence", "128; // here\nfence")
    message = "copies a tensor map of which some was never written"
    fails(partly, "uninitialised", message, with_map(MAP.tensor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("box_dim", 257, 0), "box dimension 0 is 257, needs 1 to 256"),
        (replace("box_dim", 0, 1), "box dimension 1 is 0"),
        (replace("box_dim", 6, 0), "a box row of 24 bytes, no multiple of 16"),
        (replace("global_dim", 0, 1), "dimension 1 is 0"),
        (replace("global_stride", 72, 0), "stride 1 is no multiple of 16 bytes"),
        (replace("element_stride", 2, 0), "element strides other than 1 are not supported"),
        (replace("interleave_layout", 1), "interleaved tensors are not supported"),
        (replace("swizzle_mode", 3), "a box row of 32 bytes with a swizzle of 128 is not supported"),
        (replace("swizzle_mode", 3) + replace("box_dim", 64, 0), "a box row of 256 bytes with a swizzle of 128"),
        (replace("fill_mode", 1), "a fill of NaN in a tensor of integers"),
        ("add.s64 q1, q1, 8;\n" + replace("global_address", "q1"), "the tensor's address is no multiple of 16"),
    ],
)  # fmt: skip
def test_maps_that_no_copy_takes(change: str, message: str) -> None:
    body = ZERO + fields(MAP) + change + PUBLISH + load_by("x")
    fails(body, "invalid", message, with_map(MAP.tensor))


def test_values_that_do_not_fit() -> None:
    body = ZERO + replace("box_dim", 65544, 0).replace(";\n", "; // here\n")
    fails(body, "invalid", "the value is too large for the field")


def test_map_of_more_than_there_is() -> None:
    """The copy engine believes the map; the emulator knows the memory."""
    grown = ZERO + fields(MAP) + replace("global_dim", 9, 1) + PUBLISH
    load_end = load((6, 0), 128, "x", mark=HERE)
    fails(grown + load_end, "out-of-bounds", "past the end of x", with_map(MAP.tensor))
    read(grown, MAP, with_map(MAP.tensor), (4, 0)).clean()


def test_store_of_a_box_that_is_only_partly_written() -> None:
    """What is outside of the tensor need not be defined."""
    fill = "setp.lt.u32 p0, lane, 16;\n@p0 st.shared.u32 [own], lane;\n"
    for row in (10, 9):
        tensor = words(12 * 8).view(12, 8)
        body = f"{BUFFER}{fill}{FENCE}\nbar.warp.sync -1;\n{store((row, 0), mark=HERE)}{END}"
        result = sm90.run(body, maps=[TensorMap(tensor, (4, 8))])
        if row == 10:
            assert result.clean() and tensor[10:].flatten().tolist() == list(range(16))
            unfenced = sm90.run(body.replace(FENCE, ""), maps=[TensorMap(tensor, (4, 8))])
            unfenced.only("async-unwaited", "no fence.proxy.async between")
        else:
            message = "copies shared memory that was never written, from byte 64"
            result.only("uninitialised", message)


def test_store_of_rows_that_are_only_partly_written() -> None:
    tensor = words(8 * 16).view(8, 16)
    fill = "and.b32 r1, lane, 7;\nsetp.lt.u32 p0, r1, COUNT;\n@p0 st.shared.u32 [own], lane;\n"
    body = f"{BUFFER}{fill}{FENCE}\nbar.warp.sync -1;\n{store((0, 12), mark=HERE)}{END}"
    maps = [TensorMap(tensor, (4, 8))]
    sm90.run(body.replace("COUNT", "4"), maps=maps).clean()
    assert tensor[:4, 12:].flatten().tolist() == [
        *range(4),
        *range(8, 12),
        *range(16, 20),
        *range(24, 28),
    ]
    result = sm90.run(body.replace("COUNT", "3"), maps=maps)
    result.only("uninitialised", "copies shared memory that was never written, from byte 0")


LOAD = "cp.async.bulk.tensor.{}.mbarrier::complete_tx::bytes [r0], [x, {}], [bars]"


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("tensormap.replace.tile.global_address.shared::cta.b1024.b32 [r0], r1", "needs .b64"),
        ("tensormap.replace.tile.rank.shared::cta.b1024.b64 [r0], q0", "needs .b32"),
        ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [r0], 5, r1", "at most 5 dimensions"),
        ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [r0], r1, r1", "needs a constant"),
        ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [r0], 13", "value 13 is not supported"),
        ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [r0], r1", "needs a constant"),
        ("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [r0], 4", "value 4 is not supported"),
        ("tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [r0], 2", "value 2 is not supported"),
        (PUBLISH.split(";")[1].replace("128", "64"), "128 bytes"),
        (LOAD.format("2d.shared::cluster.global", "{r1}"), "has 1 coordinates"),
        (LOAD.format("1d.shared::cluster.global", "r1"), "needs [map, {coordinates}]"),
        ("cp.async.bulk.tensor.2d.global.shared::cluster.bulk_group [x, {r1, r1}], [r0]", "the block's own"),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.bulk_group [x, {r1, r1}], [r0]", "needs one of .add"),
        (LOAD.format("3d.shared::cluster.global.im2col", "{r1, r1, r1}"), ".im2col is not supported"),
    ],
)  # fmt: skip
def test_refused(instruction: str, message: str) -> None:
    with pytest.raises(PtxError, match=re.escape(message)):
        sm90.run(instruction + ";")


@pytest.mark.parametrize(
    ("tensor", "box", "options", "message"),
    [
        (counted(8, 16), (4,), {}, "box: (4,) for shape (8, 16), needs 1 to 5 dimensions, as many"),
        (counted(1, 1, 1, 1, 1, 4), (1,) * 5 + (4,), {}, "needs 1 to 5 dimensions"),
        (torch.zeros(0, 4), (1, 4), {}, "tensor: shape (0, 4), needs sizes of at least 1"),
        (counted(8, 16)[:, ::2], (4, 4), {}, "tensor: strides (16, 2), needs 1 in the last dimension"),
        (counted(8, 6), (4, 4), {}, "tensor: strides (6, 1), needs 1 in the last dimension, multiples of 16 bytes"),
        (counted(8, 16)[:, 1:9], (4, 8), {}, "tensor: its memory does not start at a multiple of 16 bytes"),
        (counted(8, 16), (4, 2), {}, "box: (4, 2), needs sizes of 1 to 256 and rows of a multiple of 16 bytes"),
        (counted(8, 16), (0, 8), {}, "box: (0, 8), needs sizes of 1 to 256"),
        (counted(8, 16), (257, 8), {}, "box: (257, 8), needs sizes of 1 to 256"),
        (counted(8, 16), (4, 8), {"swizzle": "96B"}, "swizzle: '96B', needs one of none, 32B, 64B, 128B"),
        (counted(8, 16), (4, 16), {"swizzle": "32B"}, "box: rows of 64 bytes, needs those of its swizzle, 32B"),
        (counted(8, 16), (4, 8), {"swizzle": "64B"}, "box: rows of 32 bytes, needs those of its swizzle, 64B"),
        (counted(8, 16), (4, 8), {"nan_fill": True}, "nan_fill: torch.int32 is copied as integers"),
        (torch.zeros(8, 16).to(torch.float8_e5m2), (4, 16), {"nan_fill": True}, "nan_fill: torch.float8_e5m2 is"),
    ],
)  # fmt: skip
def test_maps_of_the_host(
    tensor: torch.Tensor, box: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorMap(tensor, box, **options)


def test_types_that_no_map_has() -> None:
    with pytest.raises(TypeError, match=r"tensor: torch.complex64 has no place in a tensor map"):
        TensorMap(torch.zeros(4, 4, dtype=torch.complex64), (4, 4))
