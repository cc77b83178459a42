"""Rotary embedding and embedding sum on the Triton kernels: memory traffic, machine code, and what only a GPU does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from embed_cases import CASES, check_call, check_gradients, kernel_gradients, leaves_of, options
from numerics import assert_bitwise_equal
from rope_cases import ROTATIONS, angles
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from conftest import Target
from emulated import GpuOfCpuTensors, standing_in
from launches import Launch, Recorder, record
from ptxemu import Report, triton_run
from ptxemu.gpu import Emulator

import pyfuse
from pyfuse.backends import (
    gpu_embed,
    triton_device,
    triton_embed,
    triton_embed_gradient,
    triton_rope,
)
from pyfuse.backends.triton_device import Arch
from pyfuse.kernels import position_configs
from pyfuse.sinusoids import sinusoids

pytestmark = pytest.mark.triton

NVIDIA, AMD = (80, 86, 89, 90, 100, 120), ("gfx90a", "gfx942")
BF16 = torch.bfloat16
TRITON = Target("triton", arch=80)


@pytest.fixture
def emulator() -> Iterator[GpuOfCpuTensors]:
    with standing_in(80) as gpu:
        yield gpu


def heads_of(rows: int, heads: int, d: int, dtype: torch.dtype = BF16, batch: int = 1) -> Tensor:
    return torch.randn(batch, rows, heads, d).to(dtype).transpose(1, 2)


# ---- memory traffic -------------------------------------------------------------------------------


def sectors(*tensors: Tensor) -> float:
    """32 bytes each."""
    return sum(t.numel() * t.element_size() for t in tensors) / 32


def assert_traffic(
    report: Report, ideal: float, launches: list[Launch], kind: str = "v4.b32"
) -> None:
    """Nothing is read or written twice, and data go 16 bytes at a time, or as `kind` says."""
    assert report.counters["sectors"] <= 1.05 * ideal, report.conflicts(shared=False)[:5]
    (launch,) = launches
    ptx = launch.compiled(80).ptx
    assert not re.findall(r"ld\.local|st\.local", ptx)
    stores = re.findall(r"st\.global\.(\S+)", ptx)
    assert stores and set(stores) == {kind}
    loads = re.findall(r"ld\.global\.(\S+)", ptx)
    assert loads.count(kind) >= len(stores), loads


ROPE_SIZES = {
    "llama": (8, 128, 128, BF16, torch.float32, "half"),
    "gpt_j": (8, 128, 64, BF16, BF16, "interleaved"),
    "neox": (16, 96, 32, BF16, torch.float32, "half"),
    "f32": (4, 64, 64, torch.float32, torch.float32, "half"),
    "one_head": (1, 64, 64, BF16, torch.float32, "half"),
}


@pytest.mark.parametrize("case", ROPE_SIZES)
def test_rope_reads_and_writes_once(case: str, emulator: GpuOfCpuTensors) -> None:
    heads, d, r, dtype, table, layout = ROPE_SIZES[case]
    rows = (
        position_configs.TURN_PROGRAMS * position_configs.MULTIPROCESSORS
    )  # enough for all heads in a program
    x, (cos, sin) = heads_of(rows, heads, d, dtype), angles(rows, r // 2, dtype=table)

    def call() -> Tensor:
        return triton_rope.rope(x, cos, sin, layout=layout)

    y = call()
    # A warp has one head, and spreads it out.
    kind = "b16" if case == "one_head" else "v4.b32"
    assert_traffic(emulator.reports[-1], sectors(x, y, cos, sin), record(80, call), kind)


def test_rope_of_a_pair_reads_the_angles_once(emulator: GpuOfCpuTensors) -> None:
    q, k, (cos, sin) = heads_of(1100, 4, 64), heads_of(1100, 1, 64), angles(1100, 32)

    def call() -> tuple[Tensor, Tensor]:
        return triton_rope.rope_pair(q, k, cos, sin, layout="half")

    turned = call()
    assert_traffic(emulator.reports[-1], sectors(q, k, *turned, cos, sin), record(80, call))


EMBED_SIZES = {
    "bert": (768, "bert", 0.0, 2 * 8),
    "gpt2": (768, "learned", 0.0, 8),
    "vaswani": (512, "vaswani", 0.1, 8),
    "token": (1280, "token", 0.0, 8),
}


@pytest.mark.parametrize("case", EMBED_SIZES)
def test_embed_reads_and_writes_once(
    case: str, emulator: GpuOfCpuTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's rows and, once for each program, what all tokens share: 64 tokens a program, as of a large batch."""
    d, chosen, dropout, ids = EMBED_SIZES[case]
    monkeypatch.setattr(position_configs, "MULTIPROCESSORS", 1)
    position_configs.gather.cache_clear()
    tokens, vocabulary = 1024, torch.randn(200, d).to(BF16)
    given = options(d, (16, 64), dtype=BF16, **CASES[chosen] | {"dropout_p": dropout})
    if "position_weight" in given:
        given["position_weight"] = torch.randn(64, d).to(BF16)
    token_ids = torch.randint(0, 200, (16, 64))

    def call() -> Tensor:
        return triton_embed.embed(token_ids, vocabulary, **given)

    y = call()
    position_configs.gather.cache_clear()
    tables = 1 + ("position_weight" in given) + ("segment_weight" in given)
    ideal = (1 + tables) * sectors(y) + tokens * ids / 32
    ideal += sum(sectors(given[name]) for name in ("norm_weight", "norm_bias") if name in given)
    ideal += d / 2 * 8 / 32 * ("sinusoidal" in given)
    assert_traffic(emulator.reports[-1], ideal, record(80, call))


# ---- machine code ---------------------------------------------------------------------------------


def rope_launches(arch: int | str) -> list[Launch]:
    x, (cos, sin) = heads_of(64, 32, 128), angles(64, 64)
    x2, (cos2, sin2) = heads_of(64, 12, 96), angles(64, 16)
    calls = [
        lambda: triton_rope.rope_pair(x, x[:, :8], cos, sin, layout="half"),
        lambda: triton_rope.rope(x2, cos2, sin2, layout="interleaved"),
    ]
    return [launch for call in calls for launch in record(arch, call)]


def embed_launches(arch: int | str, d: int, case: str, dtype: torch.dtype = BF16) -> list[Launch]:
    """Forward and backward."""
    weight, token_ids = torch.zeros(500, d, dtype=dtype), torch.zeros(3, 40, dtype=torch.long)
    given = options(d, (3, 40), dtype=dtype, **CASES[case])
    needs = frozenset(leaves_of(weight, given))

    def both() -> None:
        y, saved = triton_embed.forward(token_ids, weight, **given)
        triton_embed_gradient.backward((y,), (token_ids, weight), given, saved, needs)

    return list({str(launch.kernel): launch for launch in record(arch, both)}.values())


MACHINE_CODE: dict[str, Callable[[Any], list[Launch]]] = {
    "rope": rope_launches,
    "bert": lambda arch: embed_launches(arch, 768, "bert"),
    "wide": lambda arch: embed_launches(arch, 65536, "sinusoidal_at"),
}


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("arch", NVIDIA + AMD)
@pytest.mark.parametrize("case", MACHINE_CODE)
def test_nothing_spills(case: str, arch: Arch) -> None:
    for launch in MACHINE_CODE[case](arch):
        code = launch.compiled(arch).code
        assert code.in_registers, (code.name, code.registers)


# ---- queries and keys together --------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ROTATIONS)
@pytest.mark.parametrize("rows", [1, 33])
def test_pair_equals_two(rows: int, layout: str, inplace: bool, emulator: GpuOfCpuTensors) -> None:
    """Few tokens share their heads out to programs, one of which has both queries and keys."""
    q, k = heads_of(rows, 20, 80, batch=2), torch.randn(2, 3, rows, 80).to(BF16)
    cos, sin = angles(50, 24)
    given = {"layout": layout, "positions": torch.randint(0, 50, (2, rows))}
    expected = [triton_rope.rope(x, cos, sin, **given) for x in (q, k)]
    before = len(emulator.reports)
    turned = triton_rope.rope_pair(q, k, cos, sin, **given, inplace=inplace)
    assert len(emulator.reports) == before + 1
    for x, y, e in zip((q, k), turned, expected, strict=True):
        assert_bitwise_equal(y, e, "pair")
        assert (y is x) == inplace and y.stride() == x.stride()


# ---- ids and positions outside of their tables ----------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_position_outside_the_table_gives_nan(bad: int, emulator: GpuOfCpuTensors) -> None:
    x, (cos, sin) = torch.randn(1, 2, 3, 8), angles(40, 3)
    positions = torch.tensor([3, bad, 39])
    y = triton_rope.rope(x, cos, sin, layout="half", positions=positions)
    assert y[:, :, 1, :6].isnan().all() and torch.equal(y[..., 6:], x[..., 6:])
    good = [0, 2]
    expected = pyfuse.rope(
        x[:, :, good], cos, sin, layout="half", positions=positions[good], backend="triton"
    )
    assert_bitwise_equal(y[:, :, good], expected, "the others")


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["token_ids", "positions", "segment_ids"])
def test_id_outside_its_table_gives_nan(name: str, bad: int, emulator: GpuOfCpuTensors) -> None:
    table = torch.randn(50, 8)
    good = torch.arange(6).view(2, 3)
    wrong = good.clone()
    wrong[1, 1] = bad
    ids = {"token_ids": good, "positions": good, "segment_ids": good}
    tables = {"weight": table, "position_weight": table, "segment_weight": table}
    y = pyfuse.embed(**ids | {name: wrong}, **tables, backend="triton")
    expected = pyfuse.embed(**ids, **tables, backend="triton")
    nan = torch.zeros(2, 3, dtype=torch.bool)
    nan[1, 1] = True
    assert y[nan].isnan().all()
    assert_bitwise_equal(y[~nan], expected[~nan], "the others")
    given = {**ids, **tables, name: wrong}
    point = (given.pop("token_ids"), given.pop("weight"))
    found = kernel_gradients(TRITON, torch.ones(2, 3, 8), *point, given)
    theirs = {"token_ids": "weight", "positions": "position_weight"}.get(name, "segment_weight")
    for key, gradient in found.items():
        rows = torch.zeros(50)
        rows[[0, 1, 2, 3, 5] if key == theirs else range(6)] = 1.0
        assert torch.equal(gradient, rows[:, None].expand(50, 8)), key


def test_debugging_stops_at_an_id_outside(emulator: GpuOfCpuTensors) -> None:
    """As TRITON_DEBUG=1 does, which also looks for integers that overflow: only that id is at fault."""
    weight, ids = torch.randn(50, 64), torch.tensor([3, 49, 0])
    x, (cos, sin) = torch.randn(1, 2, 3, 8), angles(40, 3)
    given = options(64, (3,), dtype=torch.float32, **CASES["vaswani"])
    given["positions"] = torch.tensor([3, 10**7, -(10**7)])

    def kinds(call: Callable[[], Any]) -> set[str]:
        (launch,) = record(80, call)
        options = launch.options | {"debug": True}
        return triton_run.launch(
            launch.kernel, launch.grid, *launch.args, arch=80, check=False, **options
        ).kinds()

    assert not kinds(lambda: triton_embed.embed(ids, weight, **given))
    assert "trap" in kinds(lambda: triton_embed.embed(ids + 1, weight, **given))
    rope = {"layout": "half", "positions": torch.tensor([0, 39, 7])}
    assert not kinds(lambda: triton_rope.rope(x, cos, sin, **rope))
    rope["positions"] += 1
    assert "trap" in kinds(lambda: triton_rope.rope(x, cos, sin, **rope))


# ---- sinusoids, wide rows, long runs --------------------------------------------------------------


def test_sinusoids_of_far_positions(emulator: GpuOfCpuTensors) -> None:
    """As exact as float32 is, where float32 angles would be off by whole turns."""
    positions = torch.cat(
        [torch.arange(40), 10**7 + torch.arange(40), torch.randint(-(10**9), 10**9, (80,))]
    )
    for d in (64, 7):
        weight, ids = torch.zeros(1, d), torch.zeros(len(positions), dtype=torch.long)
        y = triton_embed.embed(ids, weight, sinusoidal=True, positions=positions)
        exact = sinusoids(positions, d, 10000.0, torch.float64)
        # float64's own products are off by 6e-8 at 10^9
        assert (y - exact).abs().max() < 3e-7
        assert ((y - exact).abs()[:40] <= 2**-22 * exact.abs()[:40]).all()
    assert y[0].tolist() == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("case", ["bert", "sinusoidal_at"])
def test_wide_rows(case: str, emulator: GpuOfCpuTensors) -> None:
    for d in (8200 if case == "bert" else 8201, 16640):
        weight, token_ids = torch.randn(9, d), torch.randint(0, 9, (1, 3))
        given = options(d, (1, 3), dtype=torch.float32, **CASES[case])
        check_call(TRITON, token_ids, weight, given, f"D = {d}")
        check_gradients(TRITON, [(torch.randn(1, 3, d), token_ids, weight, given)], f"D = {d}")


def test_a_row_that_all_tokens_have_is_summed_by_many(emulator: GpuOfCpuTensors) -> None:
    tokens, d = 10000, 8
    ids, weight, dy = (
        torch.ones(tokens, dtype=torch.long),
        torch.zeros(2, d),
        torch.randn(tokens, d),
    )
    found = kernel_gradients(TRITON, dy, ids, weight, {})["weight"]
    exact = dy.double().sum(0)
    assert (found[0] == 0).all() and (found[1] - exact).abs().max() < 2**-22 * dy.abs().sum(0).max()
    launches = record(80, lambda: kernel_gradients(TRITON, dy, ids, weight, {}))
    chunk = position_configs.SUMS_CHUNK
    sizes = [launch.grid[0] for launch in launches if "row_sums" in str(launch.kernel)]
    assert sizes == [-(-tokens // chunk), -(-2 * sizes[0] // chunk), 1]


@contextmanager
def shuffled() -> Iterator[None]:
    """Programs and warps in another order."""
    gpu = GpuOfCpuTensors(Emulator(80))
    gpu.orders = count(5)
    with triton_device.stand_in(gpu):
        yield


def test_the_order_of_programs_changes_no_bit(emulator: GpuOfCpuTensors) -> None:
    shape, d = (9, 41), 65
    token_ids = torch.randint(0, 1000, shape) % 700
    token_ids[:, 20:] = 3
    weight, dy = torch.randn(1000, d).to(BF16), torch.randn(*shape, d).to(BF16)
    for chosen in (CASES["bert"] | {"position": "at"}, CASES["vaswani"]):
        given = options(d, shape, dtype=BF16, **chosen)
        expected = kernel_gradients(TRITON, dy, token_ids, weight, given)
        with shuffled():
            found = kernel_gradients(TRITON, dy, token_ids, weight, given)
        for name, gradient in found.items():
            assert_bitwise_equal(gradient, expected[name], name)


# ---- launches -------------------------------------------------------------------------------------


def test_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read from a tensor: on a GPU that would wait for all work before."""

    def waits(*_: Any) -> None:
        raise AssertionError("a value is read from a tensor")

    dy = torch.randn(3, 9, 16)
    x, (cos, sin) = torch.randn(1, 2, 9, 16), angles(20, 8)
    weight, ids = torch.randn(50, 16), torch.randint(0, 3, (3, 9))
    calls = []
    for chosen in (CASES["f32_norm"], CASES["sinusoidal_at"], CASES["learned_at"]):
        given = options(16, (3, 9), dtype=torch.float32, **chosen)
        gpu_embed.turns(16, weight.device)  # a constant of the model, made at the first call
        calls.append(given)
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
    ):
        monkeypatch.setattr(Tensor, name, waits)
    with triton_device.stand_in(Recorder(90)):
        for given in calls:
            kernel_gradients(TRITON, dy, ids, weight, given)
        triton_rope.rope(x, cos, sin, layout="half", positions=ids[0])


def test_sizes_and_seeds_compile_nothing_anew() -> None:
    """Of the kernels' arguments only dtypes, options and alignment change the code."""

    def kinds(rows: int, heads: int, tokens: int, seed: int) -> list[Any]:
        from ptxemu.triton_compile import bind

        x, (cos, sin) = torch.zeros(2, rows, heads, 64).transpose(1, 2), angles(rows, 32)
        launches = record(80, lambda: triton_rope.rope(x, cos, sin, layout="half"))
        weight, ids = torch.zeros(40 + tokens, 64), torch.zeros(2, tokens, dtype=torch.long)
        given = options(64, (2, tokens), dtype=torch.float32, **CASES["bert"])
        given |= {
            "position_weight": torch.zeros(tokens, 64),
            "dropout_seed": torch.tensor([seed, 1]),
        }
        dy = torch.zeros(2, tokens, 64)
        launches += record(80, lambda: kernel_gradients(TRITON, dy, ids, weight, given))
        return [bind(i.kernel, i.args, 80, i.options).specialization for i in launches]

    assert kinds(2000, 8, 60, 16) == kinds(2007, 8, 53, 1)
