"""The decoding kernels as compiled code, and what a launch of them costs: registers, accesses, programs."""

from __future__ import annotations

import re
from typing import Any

import numerics
import pytest
import torch
from decode_cases import Case, build
from emulated import GpuOfCpuTensors, standing_in
from launches import Launch, record
from ptxemu.gpu import Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfuse.backends import triton_device, triton_gpu

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.triton

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
BF16 = torch.bfloat16


def call(
    d: int = 128,
    m: int = 1,
    group: int = 4,
    lengths: tuple[int, ...] = (4096,),
    page_size: int | None = None,
    append: bool = False,
    dtype: torch.dtype = BF16,
    heads: int = 1,
    **options: Any,
) -> Tensor:
    """o of the backend, for caches as full as they can be; pages lie in any order."""
    batch, n = len(lengths), max(lengths)
    q = torch.randn(batch, m, heads * group, d, dtype=dtype).transpose(1, 2)
    cache = torch.randn(2, batch, heads, n, d, dtype=dtype)
    if page_size is not None:
        pages = -(-n // page_size)
        cache = torch.randn(2, batch * pages, heads, page_size, d, dtype=dtype)
        table = torch.randperm(batch * pages, dtype=torch.int32).reshape(batch, pages)
        options["block_table"] = table
    k, v = cache
    new = torch.randn(2, batch, heads, m, d, dtype=dtype).unbind() if append else ()
    options = {"seqlens_k": torch.tensor(lengths), "scale": d**-0.5, **options}
    o = triton_gpu.OPS["decode_attention"].fn(q, k, v, *new, **options)
    assert isinstance(o, Tensor)
    return o


def launches(arch: triton_device.Arch, **arguments: Any) -> list[Launch]:
    return record(arch, lambda: call(**arguments))


# Between them: every tile of rows, each kind of cache, appending, and whatever steps cost registers.
EXTRAS: dict[str, Any] = {
    "causal": False, "window": (100, 3), "softcap": 30.0, "alibi_slopes": torch.ones(8), "sinks": torch.ones(8),
}  # fmt: skip
CALLS: dict[str, dict[str, Any]] = {
    "64-in-one-piece": {"d": 64},
    "120-in-one-piece": {"d": 120, "m": 5},
    "128-pages-of-16": {"d": 128, "group": 8, "page_size": 16, "append": True},
    "256-pages-of-128": {"d": 256, "page_size": 128, "window": (100, 0)},
    "64-rows": {"d": 128, "m": 8, "group": 8, "append": True},
    "everything": {"d": 64, "m": 4, "group": 8, "page_size": 16, "append": True, **EXTRAS},
}


COMPILED = [
    (arch, name)
    for i, arch in enumerate(NVIDIA)
    for j, name in enumerate(CALLS)
    if arch in (80, 90, 120) or (i + j) % 2  # the others have the tiles of one of these
]


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("arch, name", COMPILED)
def test_half_precision_stays_in_registers_and_moves_16_bytes(arch: int, name: str) -> None:
    compiled = launches(arch, **CALLS[name])[0].compiled(arch)
    assert compiled.code.in_registers and compiled.code.body.mma > 0
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*\], (\w+)", compiled.ptx)
    entries = {"0x4"} if "page_size" in CALLS[name] else set()  # of the table
    assert {"0x10"} <= set(copies) <= {"0x10"} | entries
    assert not re.search(r"ld\.global[.\w]*\.[bu]16\b", compiled.ptx)


def test_the_merging_kernel_stays_in_registers() -> None:
    _, merge = launches(80, d=128, sinks=torch.ones(4))
    assert merge.compiled(80).code.in_registers


@pytest.mark.parametrize(
    "arch, d, stack", [(80, 64, 0), (80, 128, 0), (90, 128, 0), (120, 256, 120)]
)
def test_float32_spills_no_more_than_this(arch: int, d: int, stack: int) -> None:
    code = launches(arch, d=d, dtype=torch.float32)[0].compiled(arch).code
    assert code.stack <= stack and code.body.mma > 0


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("name", ["64-in-one-piece", "128-pages-of-16", "everything"])
@pytest.mark.parametrize("arch", AMD)
def test_amd_stays_in_registers(arch: str, name: str) -> None:
    code = launches(arch, **CALLS[name])[0].compiled(arch).code
    assert code.in_registers and code.body.count("v_mfma") > 0


@pytest.mark.parametrize("name, issue", [("64-in-one-piece", 8.8), ("128-pages-of-16", 14.0)])
def test_interior_loop_has_no_more_instructions_than(name: str, issue: float) -> None:
    loop = launches(80, **CALLS[name])[0].compiled(80).code.main_loop
    assert 1.0 < loop.per_mma() <= issue
    assert loop.count("FSEL") == 0, "the interior masks nothing"
    assert loop.count("BAR") <= 6, "warps meet for the maximum, the weights and the copies"
    assert loop.count("LDG") == 0, "all loads are copies of later keys"


# Accesses, counted by the emulator ----------------------------------------------------------------


class Small(GpuOfCpuTensors):
    """A GPU of one multiprocessor, whose programs have long shares of the keys.

    stages: of their pipeline; 0 for those that are shipped."""

    multiprocessors = 1

    def __init__(self, arch: int, stages: int = 0) -> None:
        super().__init__(Emulator(arch))
        self.stages = stages

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if self.stages and "STAGES" in options:
            options = options | {"STAGES": self.stages}
        super().launch(kernel, grid, args, options)


@pytest.mark.parametrize("page_size", [None, 16, 48, 128])
@pytest.mark.parametrize("d", [64, 128])
def test_keys_and_values_are_read_once(d: int, page_size: int | None) -> None:
    """Without a pipeline: its copies are not among the sectors that the emulator counts. The addresses are the same."""
    lengths, group = (1500, 260), 4
    gpu = Small(80, stages=1)
    with triton_device.stand_in(gpu):
        call(d=d, group=group, lengths=lengths, page_size=page_size)
    (decode,) = gpu.reports
    size = 2 * d
    cache, queries_and_o = sum(lengths) * 2 * size, len(lengths) * group * 2 * size
    assert decode.counters["sectors"] * 32 <= 1.05 * (cache + queries_and_o)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("arch, d", [(80, 64), (80, 128), (90, 128), (120, 64)])
def test_shared_memory_has_no_conflicts(arch: int, d: int, page_size: int | None) -> None:
    with standing_in(arch) as gpu:
        call(d=d, lengths=(500,), page_size=page_size, append=True)
    assert len(gpu.reports) == 2
    for report in gpu.reports:
        counted = report.counters
        assert counted["shared_wavefronts"] <= 1.05 * counted["shared_wavefronts_ideal"]


# Shares of the keys -------------------------------------------------------------------------------

LONG = [
    Case("bf16", heads=(8, 1), lengths=(1500, 300)),
    Case("f16", m=5, heads=(6, 2), head_sizes=(72, 48), page_size=7, lengths=(700, 5, 1100)),
    Case("bf16", m=3, head_sizes=(128, 64), page_size=64, lengths=(1200,), append=True),
    Case("f32", head_sizes=(128, 128), page_size=48, lengths=(600, 0), append=False, sinks=True),
    Case("f32", m=2, heads=(9, 3), lengths=(900,), window=(400, 0), softcap=2.0, alibi=True),
    Case("bf16", m=16, heads=(8, 2), head_sizes=(128, 128), lengths=(1024, 700), causal=False),
]


@pytest.mark.parametrize(
    "arch, case",
    [(arch, case) for arch in (80, 90, 120) for case in LONG[:: 1 if arch == 80 else 5]],
    ids=str,
)
def test_long_shares(arch: int, case: Case) -> None:
    """On a GPU with one multiprocessor, where the pipeline of a share has come up to speed."""
    exact, eager = build(case).double().run("eager"), build(case).run("eager")
    with standing_in(arch) as gpu:
        gpu.multiprocessors = 1  # type: ignore[attr-defined]
        actual = build(case).run("triton")
    for name, x, y, z in zip(("o", "lse"), actual, exact, eager, strict=True):
        numerics.check(x, y, z, name)


def test_many_shares() -> None:
    """More than the merging kernel takes at a time; those that no query sees are never written."""
    case = Case(heads=(2, 1), head_sizes=(16, 40), lengths=(5000, 4097, 100), sinks=True)
    with standing_in(80) as gpu:
        actual = build(case).run("triton")
    assert len(gpu.reports) == 2
    exact, eager = build(case).double().run("eager"), build(case).run("eager")
    for name, x, y, z in zip(("o", "lse"), actual, exact, eager, strict=True):
        numerics.check(x, y, z, name)


def programs(arch: int = 90, **arguments: Any) -> list[int]:
    return [launch.grid[0] for launch in launches(arch, **arguments)]


def test_shares_fill_the_gpu() -> None:
    assert programs(lengths=(128,)) == [1], "one share, so nothing to merge"
    assert programs(lengths=(300,)) == [3, 4]
    assert programs(lengths=(300,), append=True) == [4, 4]
    many = {"heads": 8, "d": 64}
    few, rows = programs(lengths=(32768,), **many)
    assert rows == 32 and 0.85 * 264 <= few <= 264
    assert programs(lengths=(4096,) * 33, **many) == [264]
    most, rows = programs(lengths=(4096,) * 40, **many)
    assert rows == 40 * 32 and most % 320 == 0 and most / 264 / -(-most // 264) >= 0.85


class Ops(TorchDispatchMode):
    """Collects the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_call_allocates_and_launches_and_reads_nothing(page_size: int | None) -> None:
    """So that CUDA graphs can capture it: neither lengths nor tables come to the host."""
    q, k = torch.randn(2, 4, 1, 64), torch.randn(6, 2, 48, 64)
    table = {"block_table": torch.zeros(2, 3, dtype=torch.int32)} if page_size else {}
    k = k if page_size else k[:2]
    lengths, new = torch.tensor([100, 30]), torch.randn(2, 2, 1, 64)
    ops = Ops()

    def run() -> None:
        with ops:
            triton_gpu.OPS["decode_attention"].fn(
                q, k, k.clone(), new, new, seqlens_k=lengths, return_lse=True, **table
            )

    assert len(record(90, run)) == (2 if page_size else 1)
    assert ops.names <= {"new_empty", "clone"}
