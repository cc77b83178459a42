"""Rotary embedding and embedding sum on the CUDA kernels: memory traffic, machine code, and what only a GPU does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import Target
from embed_cases import CASES, check_call, check_gradients, kernel_gradients, leaves_of, options
from numerics import assert_bitwise_equal
from rope_cases import angles
from torch import Tensor

pytest.importorskip("pyfuse._cuda", reason="pyfuse._cuda is not built")

from cuda_code import kernels_of
from emulated import CudaOfCpuTensors, standing_in
from ptxemu import Report

import pyfuse
from pyfuse.backends import cuda_device, cuda_embed, cuda_embed_gradient
from pyfuse.sinusoids import sinusoids

BF16, F32 = torch.bfloat16, torch.float32
CUDA = Target("cuda", arch=80)


@pytest.fixture
def emulator() -> Iterator[CudaOfCpuTensors]:
    """Of few multiprocessors: a warp has as many tokens as of a large call on a large GPU."""
    with standing_in(80, backend="cuda") as gpu:
        assert isinstance(gpu, CudaOfCpuTensors)
        gpu.multiprocessors = 4
        yield gpu


# ---- memory traffic -------------------------------------------------------------------------------


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def assert_traffic(report: Report, once: float) -> None:
    """All tensors are read and written once, and no two lanes meet in a bank of shared memory."""
    counters = report.counters
    assert 32 * counters["sectors"] <= 1.05 * once, report.conflicts(shared=False)[:5]
    assert counters.get("shared_wavefronts", 0) == counters.get("shared_wavefronts_ideal", 0)


ROPE_SIZES = {
    "llama": (8, 2, 128, 128, BF16, F32, "half"),
    "phi": (8, 2, 80, 80, BF16, F32, "half"),  # halves begin within a sector
    "phi_partial": (8, 2, 80, 32, BF16, BF16, "half"),
    "stablelm": (8, 8, 80, 20, BF16, F32, "half"),
    "neox": (16, 1, 96, 32, torch.float16, F32, "half"),
    "gpt_j": (8, 8, 256, 64, BF16, BF16, "interleaved"),
    "gemma": (8, 1, 512, 512, BF16, F32, "half"),
    "f32": (8, 2, 64, 64, F32, F32, "half"),
    "one_head": (1, 1, 64, 64, BF16, F32, "half"),
}


@pytest.mark.parametrize("case", ROPE_SIZES)
def test_rope_reads_and_writes_once(case: str, emulator: CudaOfCpuTensors) -> None:
    q_heads, k_heads, d, r, dtype, table, layout = ROPE_SIZES[case]
    rows = 256
    q, k = (torch.randn(1, rows, h, d).to(dtype).transpose(1, 2) for h in (q_heads, k_heads))
    cos, sin = angles(rows, r // 2, dtype=table)
    pyfuse.rope_pair(q, k, cos, sin, layout=layout, backend="cuda")
    (report,) = emulator.reports
    assert_traffic(report, nbytes(q, q, k, k, cos, sin))


EMBED_SIZES = {
    "bert": (768, BF16, "bert"),
    "f32": (768, F32, "bert"),
    "gpt2": (1600, BF16, "learned"),
    "vaswani": (512, BF16, "vaswani"),
    "sinusoidal_norm": (1024, BF16, "sinusoidal_at"),
    "f32_norm": (4096, BF16, "f32_norm"),
}


@pytest.mark.parametrize("case", EMBED_SIZES)
def test_embed_reads_and_writes_once(case: str, emulator: CudaOfCpuTensors) -> None:
    """The gradients' kernels: as few sectors as their bytes can have."""
    emulator.multiprocessors = 1
    d, dtype, chosen = EMBED_SIZES[case]
    weight, token_ids = torch.randn(200, d).to(dtype), torch.randint(0, 200, (16, 32))
    given = options(d, (16, 32), dtype=dtype, **CASES[chosen])
    y, saved = cuda_embed.forward(token_ids, weight, **given)
    names = ("position_weight", "segment_weight")
    tables = 1 + sum(given.get(name) is not None for name in names)
    once = (1 + tables) * nbytes(y) + 4 * d * ("sinusoidal" in given)
    once += nbytes(token_ids) * (1 + ("segment_ids" in given) + (given["positions"] is not None))
    once += nbytes(*(t for name, t in given.items() if name.startswith("norm")))
    once += nbytes(*(t for t in saved if t is not None))
    assert_traffic(emulator.reports[0], once)
    needs = frozenset(leaves_of(weight, given))
    cuda_embed_gradient.backward((y,), (token_ids, weight), given, saved, needs)
    for report in emulator.reports[1:]:
        assert_traffic(report, 32 * report.counters["sectors_ideal"])


# ---- machine code ---------------------------------------------------------------------------------


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("arch", ["80", "89", "90a", "120"])
@pytest.mark.parametrize("source", ["rope", "embed", "embed_bwd", "row_sums"])
def test_nothing_spills(source: str, arch: str) -> None:
    for code in kernels_of(f"{source}_bf16", arch).values():
        assert code.in_registers, (code.name, code.registers)


# ---- ids and positions outside of their tables ----------------------------------------------------


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.parametrize(("d", "pairs"), [(8, 3), (16, 4)], ids=["elements", "vectors"])
def test_position_outside_the_table_gives_nan(
    d: int, pairs: int, bad: int, layout: str, emulator: CudaOfCpuTensors
) -> None:
    x, (cos, sin) = torch.randn(1, 2, 3, d), angles(40, pairs)
    positions, good = torch.tensor([3, bad, 39]), [0, 2]
    y = pyfuse.rope(x, cos, sin, layout=layout, positions=positions, backend="cuda")
    turned = 2 * pairs
    assert y[:, :, 1, :turned].isnan().all() and torch.equal(y[..., turned:], x[..., turned:])
    expected = pyfuse.rope(
        x[:, :, good], cos, sin, layout=layout, positions=positions[good], backend="cuda"
    )
    assert_bitwise_equal(y[:, :, good], expected, "the others")


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["token_ids", "positions", "segment_ids"])
def test_id_outside_its_table_gives_nan(name: str, bad: int, emulator: CudaOfCpuTensors) -> None:
    table, good = torch.randn(50, 8), torch.arange(6).view(2, 3)
    wrong = good.clone()
    wrong[1, 1] = bad
    ids = {"token_ids": good, "positions": good, "segment_ids": good}
    tables = {"weight": table, "position_weight": table, "segment_weight": table}
    y = pyfuse.embed(**ids | {name: wrong}, **tables, backend="cuda")
    expected = pyfuse.embed(**ids, **tables, backend="cuda")
    nan = wrong != good
    assert y[nan].isnan().all()
    assert_bitwise_equal(y[~nan], expected[~nan], "the others")
    given = {**ids, **tables, name: wrong}
    point = (given.pop("token_ids"), given.pop("weight"))
    found = kernel_gradients(CUDA, torch.ones(2, 3, 8), *point, given)
    theirs = {"token_ids": "weight", "positions": "position_weight"}.get(name, "segment_weight")
    for key, gradient in found.items():
        rows = torch.zeros(50)
        rows[[0, 1, 2, 3, 5] if key == theirs else range(6)] = 1.0
        assert torch.equal(gradient, rows[:, None].expand(50, 8)), key


# ---- sinusoids, wide rows, long runs --------------------------------------------------------------


def test_sinusoids_of_far_positions(emulator: CudaOfCpuTensors) -> None:
    """As exact as float32 is, where float32 angles would be off by whole turns."""
    near, far = torch.arange(40), torch.randint(-(10**9), 10**9, (80,))
    positions = torch.cat([near, 10**7 + near, far])
    for d in (64, 7):
        weight, ids = torch.zeros(1, d), torch.zeros(len(positions), dtype=torch.long)
        y = cuda_embed.embed(ids, weight, sinusoidal=True, positions=positions)
        error = (y - sinusoids(positions, d, 10000.0, torch.float64)).abs()
        assert error.max() < 3e-7  # float64's own products are off by 6e-8 at 10^9
        assert (error[:40] <= 2**-22 * y[:40].abs()).all()


@pytest.mark.parametrize("case", ["bert", "sinusoidal_at", "vaswani"])
def test_wide_rows(case: str, emulator: CudaOfCpuTensors) -> None:
    """More columns than a block holds; and the most that one holds."""
    for d in (8192, 8200, 4097):
        weight, token_ids = torch.randn(9, d), torch.randint(0, 9, (1, 3))
        given = options(d, (1, 3), dtype=F32, **CASES[case])
        check_call(CUDA, token_ids, weight, given, f"D = {d}")
        check_gradients(CUDA, [(torch.randn(1, 3, d), token_ids, weight, given)], f"D = {d}")


def test_a_row_that_all_tokens_have_is_summed_by_many(emulator: CudaOfCpuTensors) -> None:
    tokens, d = 10000, 8
    ids, weight = torch.ones(tokens, dtype=torch.long), torch.zeros(2, d)
    dy = torch.randn(tokens, d)
    found = kernel_gradients(CUDA, dy, ids, weight, {})["weight"]
    exact = dy.double().sum(0)
    assert (found[0] == 0).all() and (found[1] - exact).abs().max() < 2**-22 * dy.abs().sum(0).max()
    chunks, launches = (
        -(-tokens // cuda_embed_gradient.CHUNK),
        2,
    )  # the forward and the first of these
    while chunks > 1:
        chunks, launches = -(-2 * chunks // cuda_embed_gradient.CHUNK), launches + 1
    assert len(emulator.reports) == launches


def test_many_tokens_share_the_norms_gradients_out(
    emulator: CudaOfCpuTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows of threads have more tokens than others."""
    monkeypatch.setattr(cuda_embed_gradient, "COLUMNS", 65 * 7)
    for d in (64, 65):
        weight, token_ids = torch.randn(50, d), torch.randint(0, 50, (4, 9))
        given = options(d, (4, 9), dtype=F32, **CASES["bert"])
        check_gradients(CUDA, [(torch.randn(4, 9, d), token_ids, weight, given)], f"D = {d}")


# ---- what would crash -----------------------------------------------------------------------------


def test_kernel_entries_refuse_what_would_crash() -> None:
    cuda, on, strides = cuda_device.module(), (80, 1, 0), (8, 8, 8)
    part = (1, 0, strides, 16, strides)
    table = (16, 16, 1, (0, 4), 1, 0, 0, (0, 0), 0, 1.0)
    with pytest.raises(ValueError, match="x: null data pointer"):
        cuda.rope(on, (0, 1, 1, 8, 8, *part, *part, *table))
    with pytest.raises(ValueError, match="cannot rotate 10 of 8"):
        good = (1, 16, strides, 16, strides)
        cuda.rope(on, (0, 1, 1, 8, 10, *good, *good, *table))
    row, none = (16, 8, 2, 16, 1), (0, 0, -1, 0, 0)
    rest = (1, 0, 0, 0, 0, 0, 1.0, 1e-5, 0, 0, 0, 1.0)
    with pytest.raises(ValueError, match="y: null data pointer"):
        cuda.embed(on, (0, 1, 8, *row, *none, *none, *rest, 0, 0))
    with pytest.raises(ValueError, match="token_ids: null data pointer"):
        cuda.embed(on, (0, 1, 8, 16, 8, 2, 0, 0, *none, *none, *rest, 16, 0))
    sums = (16, 8, 0, 0, 0, 1, 0, 100, 8, 16, 1, 1.0, 0, 0, 0, 0, 0, 1.0)
    with pytest.raises(ValueError, match="edges for many"):
        cuda.row_sums(on, (0, 0, *sums))
    with pytest.raises(ValueError, match="the table's dtype or float32"):
        cuda.row_sums(on, (0, 1, *sums[:7], 1, *sums[8:]))
