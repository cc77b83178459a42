"""Reductions by the copy engine (cp.reduce.async.bulk), and bulk copies that PTX does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ptxemu import PtxError, sm90
from ptxemu.sm90 import BUFFER, END, bulk_load, init, wait

INTEGERS = {
    "u32": torch.uint32, "s32": torch.int32, "b32": torch.uint32,
    "u64": torch.uint64, "s64": torch.int64, "b64": torch.uint64,
}  # fmt: skip
FLOATS = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64
}  # fmt: skip
# PTX ISA, "cp.reduce.async.bulk": which operation has which types in global memory.
ALLOWED = {
    "add": ["u32", "s32", "u64", "f16", "bf16", "f32", "f64"], "min": ["u32", "s32", "u64", "s64", "f16", "bf16"],
    "max": ["u32", "s32", "u64", "s64", "f16", "bf16"], "inc": ["u32"], "dec": ["u32"],
    "and": ["b32", "b64"], "or": ["b32", "b64"], "xor": ["b32", "b64"],
}  # fmt: skip
Function = Callable[[Any, Any], Any]
OF_INTEGERS: dict[str, Function] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, v: np.where(old >= v, 0, old + 1),
    "dec": lambda old, v: np.where((old == 0) | (old > v), v, old - 1),
}
OF_FLOATS: dict[str, Function] = {"add": torch.add, "min": torch.minimum, "max": torch.maximum}


def rounding(op: str, kind: str) -> str:
    return ".noftz" if op == "add" and kind in ("f16", "bf16") else ""


def reduced(kind: str, op: str, before: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """y after one reduction with x, which a bulk load brings to shared memory."""
    size = value.nbytes
    opcode = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}{rounding(op, kind)}.{kind}"
    body = f"""{init(1)}{BUFFER}
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {size};
    {bulk_load(size)}{wait()}
    @first {opcode} [y], [r0], {size};
    {END}
    """
    after = before.clone()
    sm90.run(body, value, after).clean()
    return after


@pytest.mark.parametrize(
    ("op", "kind"), [(op, kind) for op, kinds in ALLOWED.items() for kind in kinds]
)
def test_reductions(op: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind in FLOATS:
        before, value = (torch.from_numpy(rng.standard_normal(32)).to(FLOATS[kind]) for _ in "ab")
        assert torch.equal(reduced(kind, op, before, value), OF_FLOATS[op](before, value))
        return
    dtype = INTEGERS[kind]
    bits = 8 * dtype.itemsize
    drawn = (rng.integers(0, 1 << bits, 32, np.uint64) for _ in "ab")
    old, new = (d % 5 if op in ("inc", "dec") else d for d in drawn)
    before, value = (torch.from_numpy(d.astype(f"u{bits // 8}")).view(dtype) for d in (old, new))
    exact = OF_INTEGERS[op](before.numpy(), value.numpy()).astype(before.numpy().dtype)
    assert np.array_equal(reduced(kind, op, before, value).numpy(), exact)


def test_adding_f32_flushes_denormals() -> None:
    tiny = torch.tensor([1e-40, 2e-38, -1e-40, 1.0])
    added = reduced("f32", "add", tiny, torch.tensor([1e-40, -1.5e-38, 0.0, 1e-40]))
    assert added.tolist() == [0.0, 0.0, 0.0, 1.0]
    smallest = torch.full((2,), 5e-324, dtype=torch.float64)
    assert torch.equal(reduced("f64", "add", smallest, torch.zeros_like(smallest)), smallest)
    half = torch.full((8,), 6e-8, dtype=torch.float16)
    assert torch.equal(reduced("f16", "add", half, torch.zeros_like(half)), half)


@pytest.mark.parametrize("op", ALLOWED)
def test_refused_reductions(op: str) -> None:
    for kind in [*INTEGERS, *FLOATS, "u16", "f16x2"]:
        for flags in ("", ".noftz"):
            opcode = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}{flags}.{kind}"
            text = sm90.ptx(f"{opcode} [y], [r0], 16;")
            if kind in ALLOWED[op] and flags == rounding(op, kind):
                sm90.load(text)
                continue
            with pytest.raises(PtxError):
                sm90.load(text)


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.bulk.global.shared::cluster.bulk_group [y], [r0], 16",
        "cp.async.bulk.global.shared::cta.bulk_group.multicast::cluster [y], [r0], 16",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [r0], [x], 16",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [r0], [r0], 16, [bars]",
        "cp.async.bulk.shared::cluster.global.bulk_group [r0], [x], 16",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [r0], [r0], 16, [bars]",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.u32 [y], [r0], 16",
    ],
)
def test_refused(instruction: str) -> None:
    with pytest.raises(PtxError):
        sm90.load(sm90.ptx(instruction + ";"))
