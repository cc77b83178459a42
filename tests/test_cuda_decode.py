"""The CUDA kernels of decoding as compiled code, and what a launch of them costs: registers, accesses, blocks."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import torch
from cuda_code import kernels_of
from decode_cases import Case, build
from emulated import CudaOfCpuTensors, standing_in
from torch import Tensor

import pyfuse
from pyfuse.backends import cuda_device

pytestmark = pytest.mark.skipif(cuda_device._cuda is None, reason=cuda_device.NOT_BUILT)


def call(
    d: int = 128,
    group: int = 4,
    lengths: tuple[int, ...] = (500,),
    page_size: int | None = None,
    append: bool = False,
    **options: Any,
) -> Tensor:
    """o in bfloat16, for caches as full as they can be; pages lie in any order."""
    batch, n = len(lengths), max(lengths)
    q = torch.randn(batch, group, 1, d, dtype=torch.bfloat16)
    cache = torch.randn(2, batch, 1, n, d, dtype=torch.bfloat16)
    if page_size is not None:
        pages = -(-n // page_size)
        cache = torch.randn(2, batch * pages, 1, page_size, d, dtype=torch.bfloat16)
        table = torch.randperm(batch * pages, dtype=torch.int32).reshape(batch, pages)
        options["block_table"] = table
    if append:
        options["k_new"], options["v_new"] = torch.randn(2, batch, 1, 1, d, dtype=torch.bfloat16)
    o: Tensor = pyfuse.decode_attention(
        q, *cache, seqlens_k=torch.tensor(lengths), backend="cuda", **options
    )
    return o


def one_processor(gpu: Any) -> CudaOfCpuTensors:
    """Of a GPU with one multiprocessor blocks have long shares of the keys."""
    gpu.multiprocessors = 1
    assert isinstance(gpu, CudaOfCpuTensors)
    return gpu


# What is compiled ---------------------------------------------------------------------------------


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_nothing_spills(arch: str, d: int, dtype: str) -> None:
    kernels = kernels_of(f"attention_decode_{dtype}_d{d}", arch)
    assert set(kernels) == ({"decode"} if dtype == "f32" else {"decode", "decode_32_rows"})
    assert all(kernel.spills == 0 for kernel in kernels.values())


# Accesses, counted by the emulator ----------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize("d", [64, 128])
def test_keys_and_values_are_read_once(d: int, page_size: int | None) -> None:
    lengths, group = (1500, 260), 4
    with standing_in(80, backend="cuda") as gpu:
        call(d, group, lengths, page_size)
        whole = len(one_processor(gpu).reports)
        call(d, group, lengths, page_size)
    (decode,) = gpu.reports[whole:]
    cache, queries_and_o = sum(lengths) * 4 * d, len(lengths) * group * 4 * d
    sectors = decode.counters["copied_sectors"] + decode.counters["sectors"]
    assert sectors * 32 <= 1.05 * (cache + queries_and_o)
    split = gpu.reports[0].counters["copied_sectors"] * 32
    assert split <= 1.05 * (cache + 12 * queries_and_o), "each share reads the queries again"


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("arch, d, group", [(80, 64, 4), (80, 128, 20), (90, 128, 4), (120, 64, 4)])
def test_shared_memory_has_no_conflicts(
    arch: int, d: int, group: int, page_size: int | None
) -> None:
    with standing_in(arch, backend="cuda") as gpu:
        call(d, group, page_size=page_size, append=True)
    assert len(gpu.reports) == 2
    for report in gpu.reports:
        assert report.conflicts() == []


# Shares of the keys -------------------------------------------------------------------------------

LONG = [
    Case("bf16", heads=(8, 1), lengths=(1500, 300)),
    Case("f16", m=5, heads=(6, 2), head_sizes=(72, 48), page_size=7, lengths=(700, 5, 1100)),
    Case("bf16", m=3, head_sizes=(128, 64), page_size=64, lengths=(1200,), append=True),
    Case("f32", head_sizes=(128, 128), page_size=48, lengths=(600, 0), sinks=True),
    Case("f32", m=2, heads=(9, 3), lengths=(900,), window=(400, 0), softcap=2.0, alibi=True),
    Case("bf16", m=16, heads=(8, 2), head_sizes=(128, 128), lengths=(1024, 700), causal=False),
    Case("bf16", m=2, head_sizes=(256, 256), page_size=16, lengths=(500, 33), append=True),
    Case("f32", head_sizes=(256, 200), lengths=(300,), window=100),
]


@pytest.mark.parametrize(
    "arch, case",
    [(arch, case) for arch in (80, 90, 120) for case in LONG[:: 1 if arch == 80 else 5]],
    ids=str,
)
def test_long_shares(arch: int, case: Case) -> None:
    """On a GPU with one multiprocessor, where the rings of a share go round."""
    exact, eager = build(case).double().run("eager"), build(case).run("eager")
    with standing_in(arch, backend="cuda") as gpu:
        one_processor(gpu)
        actual = build(case).run("cuda")
    for name, x, y, z in zip(("o", "lse"), actual, exact, eager, strict=True):
        numerics.check(x, y, z, name)


def test_many_shares() -> None:
    """More than a warp of the merging kernel has lanes; those that no query sees are never written."""
    case = Case(heads=(2, 1), head_sizes=(16, 40), lengths=(5000, 4097, 100), sinks=True)
    exact, eager = build(case).double().run("eager"), build(case).run("eager")
    with standing_in(80, backend="cuda") as gpu:
        actual = build(case).run("cuda")
    assert len(gpu.reports) == 2
    for name, x, y, z in zip(("o", "lse"), actual, exact, eager, strict=True):
        numerics.check(x, y, z, name)


@pytest.mark.parametrize("dtype, window", [("bf16", None), ("f32", None), ("bf16", 150)])
def test_the_tile_of_rows_changes_no_bit(dtype: str, window: int | None) -> None:
    """Heads of large groups, in tiles of 32 rows for half precision, are each what they are alone."""
    case = Case(dtype, m=3, heads=(16, 1), lengths=(600, 77), window=window)
    with standing_in(80, backend="cuda"):
        together, alone = build(case), build(case)
        expected, lse = together.run("cuda")
        alone.tensors["q"] = alone.tensors["q"][:, 5:6]
        actual, lse_alone = alone.run("cuda")
    numerics.assert_bitwise_equal(actual, expected[:, 5:6], "o")
    numerics.assert_bitwise_equal(lse_alone, lse[:, 5:6], "lse")
