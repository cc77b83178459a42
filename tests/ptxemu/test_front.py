"""The Python side: how arguments are checked and packed, what a report says, and that a seed decides everything."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

import ptxemu
from ptxemu import Report
from ptxemu.checkers import ptx, run, words

HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"

TYPES = (
    HEAD
    + """
.visible .entry kernel(
  .param .u64 out, .param .u32 u, .param .s32 s, .param .f32 f, .param .u8 b, .param .u64 w, .param .f64 g
) .reqntid 64, 1, 1
{
  .reg .b64 d<4>;
  .reg .b32 r<4>;
  .reg .f32 f<2>;
  .reg .f64 g<2>;
  ld.param.u64 d0, [out];
  ld.param.u32 r0, [u];
  ld.param.s32 r1, [s];
  ld.param.f32 f0, [f];
  ld.param.u8 r2, [b];
  ld.param.u64 d1, [w];
  ld.param.f64 g0, [g];
  st.global.u32 [d0], r0;
  st.global.s32 [d0+4], r1;
  st.global.f32 [d0+8], f0;
  st.global.u32 [d0+12], r2;
  st.global.u64 [d0+16], d1;
  st.global.f64 [d0+24], g0;
  ret;
}
.visible .entry other() { ret; }
"""
)

STRUCT = (
    HEAD
    + """
.visible .entry kernel(.param .align 8 .b8 p[24])
{
  .reg .b64 d<4>;
  .reg .b32 r<4>;
  ld.param.u64 d0, [p];
  ld.param.u64 d1, [p+8];
  ld.param.s32 r0, [p+16];
  ld.global.u32 r1, [d1];
  add.s32 r1, r1, r0;
  st.global.u32 [d0], r1;
  ret;
}
"""
)


def launch(*values: Any, entry: str | None = "kernel", block: Any = 64, **options: Any) -> Report:
    return ptxemu.load(TYPES).launch(entry, block=block, args=values, **options)


GOOD = (1, -2, 1.5, 255, 2**63, 0.1)


def test_scalars_are_packed_as_their_parameter() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    launch(out, *GOOD).check()
    assert struct.unpack("<IifIQd", out.numpy().tobytes()) == (1, -2, 1.5, 255, 2**63, 0.1)
    launch(out, True, 2**31 - 1, 2, -1, -1, 3).check()
    expected = (1, 2**31 - 1, 2.0, 255, 2**64 - 1, 3.0)
    assert struct.unpack("<IifIQd", out.numpy().tobytes()) == expected


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((1,), ValueError, "args: 2, but kernel has 7 parameters"),
        ((*GOOD, 1), ValueError, "args: 8, but kernel has 7 parameters"),
        ((2**32, *GOOD[1:]), ValueError, r"args\[1\]: 4294967296 does not fit .u32"),
        ((1, -(2**31) - 1, *GOOD[2:]), ValueError, r"args\[2\]: -2147483649 does not fit .s32"),
        ((*GOOD[:3], 256, *GOOD[4:]), ValueError, r"args\[4\]: 256 does not fit .u8"),
        ((1.0, *GOOD[1:]), TypeError, r"args\[1\]: 1.0 for a parameter of type .u32"),
        (("1", *GOOD[1:]), TypeError, r"args\[1\]: str is no argument"),
        ((None, *GOOD[1:]), TypeError, r"args\[1\]: NoneType is no argument"),
        ((b"12345", *GOOD[1:]), ValueError, r"args\[1\]: 5 bytes, kernel takes 4"),
        ((words(1), *GOOD[1:]), ValueError, r"args\[1\]: 8 bytes, kernel takes 4"),
    ],
)
def test_arguments_that_do_not_fit(
    values: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        launch(words(8), *values)


def test_entry_is_named_unless_there_is_one() -> None:
    with pytest.raises(ValueError, match=r"^entry: the module has \['kernel', 'other'\], name one"):
        launch(words(8), *GOOD, entry=None)
    with pytest.raises(ValueError, match=r"^entry: 'kernal' is not in the module, which has \['k"):
        launch(words(8), *GOOD, entry="kernal")
    ptxemu.load(STRUCT).launch(args=[ptxemu.struct("<QQi4x", words(1), words(1), 1)]).check()
    launch(entry="other").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 32}, "block: 32 threads, kernel was compiled for 64"),
        ({"block": (64, 2)}, "block: 128 threads, kernel was compiled for 64"),
        ({"entry": "other", "block": 1025}, "block: 1025 threads, needs 1 to 1024"),
        ({"entry": "other", "block": ()}, r"block: \(\), needs one to three sizes"),
        ({"entry": "other", "block": (1, 1, 1, 1)}, "block: .* needs one to three sizes"),
        ({"entry": "other", "grid": 0}, "grid: 0, needs one to three sizes of at least 1"),
        ({"entry": "other", "grid": (2, -1)}, r"grid: \(2, -1\), needs"),
        ({"entry": "other", "grid": 3, "cluster": 2}, "cluster: does not divide the grid"),
        ({"entry": "other", "grid": 32, "cluster": 32}, "cluster: needs 1 to 16 blocks"),
    ],
)
def test_sizes(options: dict[str, Any], message: str) -> None:
    values = () if options.get("entry") == "other" else (words(8), *GOOD)
    with pytest.raises(ValueError, match=f"^{message}"):
        launch(*values, **options)


@pytest.mark.parametrize(
    ("target", "limit"),
    [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90a", 227), ("sm_120", 99)],
)
def test_shared_memory_of_an_architecture(target: str, limit: int) -> None:
    module = ptxemu.load(ptx("", shared=1024, target=target))
    assert module.target == target
    module.launch(args=[0, 0, 0], shared=(limit - 1) * 1024).check()
    needs = f"shared: the block needs {limit * 1024 + 1} bytes, {target} has {limit * 1024}"
    with pytest.raises(ValueError, match=needs):
        module.launch(args=[0, 0, 0], shared=(limit - 1) * 1024 + 1)


def test_struct_parameter() -> None:
    """Tensors and arrays in a struct become pointers; their names in findings say which they were."""
    out, source = words(1), torch.tensor([40], dtype=torch.int32)
    module = ptxemu.load(STRUCT)
    module.launch(args=[ptxemu.struct("<QQi4x", out, source, 2)]).check()
    assert out.item() == 42
    module.launch(args=[ptxemu.struct("<QQi4x", out, source.numpy(), -2)]).check()
    assert out.item() == 38
    half = torch.zeros(4, dtype=torch.int8)[:2]
    report = module.launch(args=[ptxemu.struct("<QQi4x", out, half, 2)])
    assert "reads byte 2 of arg0[1], which no argument gave access" in report.findings[0].message
    with pytest.raises(ValueError, match=r"^args\[0\]: 20 bytes, kernel takes 24"):
        module.launch(args=[ptxemu.struct("<QQi", out, source, 2)])
    with pytest.raises(
        TypeError, match=r"^args\[0\]: a struct parameter needs bytes or Struct, go"
    ):
        module.launch(args=[7])
    assert module.launch(args=[bytes(24)]).kinds() == {"out-of-bounds"}


def test_tensors_that_are_not_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"^arg0: on meta, needs a CPU tensor"):
        launch(torch.empty(8, device="meta"), *GOOD)
    with pytest.raises(ValueError, match=r"^out: on meta"):
        launch(torch.empty(8, device="meta"), *GOOD, names={0: "out"})


PLACE = "mul.wide.u32 d0, tid, 4;\nadd.s64 d1, x, d0;\nadd.s64 d2, y, d0;\n"

COPY = PLACE + "ld.global.u32 r0, [d1]; // here\nst.global.u32 [d2], r0;"


def test_names_of_arguments() -> None:
    report = ptxemu.load(ptx(COPY)).launch(args=[words(8), words(32), 0], block=32)
    assert "past the end of arg0 (32 bytes)" in report.findings[0].message
    run(COPY, words(8), words(32), names=("queries", "y")).only("out-of-bounds", "of queries")


def test_arrays_and_views_are_used_in_place() -> None:
    array = np.arange(32, dtype=np.int32)
    out = words(96).view(32, 3)
    body = COPY.replace("add.s64 d2, y, d0", "mul.wide.u32 d3, tid, 12;\nadd.s64 d2, y, d3")
    run(body, array, out[:, 1]).clean()
    assert out[:, 1].tolist() == list(range(32))
    assert out[:, ::2].eq(0).all()


def test_views_of_one_storage_share_an_allocation() -> None:
    both = torch.arange(64, dtype=torch.int32)
    run(COPY, both[:32], both[32:]).clean()
    assert torch.equal(both[:32], both[32:])


def test_expanded_and_transposed_views() -> None:
    """Strides of 0, and orders other than the storage's, cover just their elements."""
    row = words(40)
    run(COPY, row[4:5].expand(32), words(32)).only("out-of-bounds", "byte 20 of x")
    matrix = torch.arange(64, dtype=torch.int32).view(8, 8)
    run(COPY, matrix.t(), words(64)).clean()
    run(COPY, matrix.t()[:4], words(64)).only("out-of-bounds", "byte 16 of x")


def test_tensor_without_elements_is_a_null_pointer() -> None:
    run("setp.ne.s64 p0, x, 0;\n@p0 trap;", torch.empty(0)).clean()


def test_variable() -> None:
    table = ".visible .global .align 4 .u32 count[2] = {5, 6};"
    body = "atom.global.add.u32 r0, [count+4], 10;"
    module = ptxemu.load(ptx(body, module=table))
    for turn in range(1, 3):  # what it holds stays from launch to launch
        module.launch(args=[0, 0, 0], block=1).check()
        assert module.variable("count").view(np.uint32).tolist() == [5, 6 + 10 * turn]
    module.variable("count")[:] = 0
    module.launch(args=[0, 0, 0], block=1).check()
    assert module.variable("count").view(np.uint32).tolist() == [0, 10]
    with pytest.raises(ValueError, match=r"^variable: counts is not in the module"):
        module.variable("counts")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate.u32 r0, r1;", "frobnicate"),
        ("add.wrong.u32 r0, r1, r2;", "wrong"),
        ("add.u32 r0, r1;", "operands"),
        ("add.u32 r0, r1, d0;", "d0"),
        ("add.u32 r0, r1, nowhere;", "nowhere"),
        ("bra NOWHERE;", "NOWHERE"),
        ("mov.f32 f0, 1;", ""),
        ("tcgen05.wait::ld.sync.aligned;", "tcgen05"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(line: str, message: str) -> None:
    text = ptx(f"add.u32 r0, r1, r2;\n{line}\nadd.u32 r3, r1, r2;")
    at = text.splitlines().index("  " + line) + 1
    with pytest.raises(ptxemu.PtxError, match=f"^line {at}: .*{message}"):
        ptxemu.load(text)
