"""The attention kernels as compiled code: they fit every GPU without a spill, and have the shape of fast code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import standing_in
from launches import attention_launches
from ptxemu.sass import Code

import pyfuse
from pyfuse.backends.triton_device import Arch

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.triton

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
BF16 = torch.bfloat16
KERNELS = ("flash_fwd_kernel", "row_terms_kernel", "flash_bwd_dkdv_kernel", "flash_bwd_dq_kernel")
# Which instruction multiplies matrices.
TENSOR_CORES = {
    80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA", "gfx90a": "v_mfma",
    "gfx942": "v_mfma",
}  # fmt: skip


def code_of(arch: Arch, kernel: str, **call: Any) -> Code:
    return attention_launches(arch, **call)[kernel].compiled(arch).code


# Hopper's tiles are the fastest on an H100, spills or not (kernels/configs.py): accesses to memory that stands in for
# registers, of the calls below the most. And of float32: bytes of a thread.
HOPPER_SPILLS = {
    ("flash_bwd_dq_kernel", 64): 58,
    ("flash_bwd_dkdv_kernel", 128): 194,
    ("flash_bwd_dkdv_kernel", 256): 297,
    ("flash_bwd_dq_kernel", 256): 138,
}
HOPPER_STACK = {("flash_bwd_dkdv_kernel", 64): 432, ("flash_bwd_dkdv_kernel", 128): 848}


def assert_in_registers(code: Any, arch: Arch, kernel: str, d: int) -> None:
    allowed = HOPPER_SPILLS.get((kernel, d), 0) if arch == 90 else 0
    assert code.in_registers or 0 < code.spills <= allowed, code.spills


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_half_precision_stays_in_registers(arch: Arch, d: int, kernel: str) -> None:
    code = code_of(arch, kernel, d=d, dtype=BF16, causal=True)
    assert_in_registers(code, arch, kernel, d)
    if kernel == "flash_fwd_kernel":
        assert code.body.count(TENSOR_CORES[arch]) > 0
    elif kernel != "row_terms_kernel":
        assert code.body.mma > 0


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "row_terms_kernel"])
@pytest.mark.parametrize("d, stack", [(64, 0), (128, 64), (256, 400)])
@pytest.mark.parametrize("arch", [80, 90])
def test_float32_spills_no_more_than_its_table_says(
    arch: int, d: int, stack: int, kernel: str
) -> None:
    code = code_of(arch, kernel, d=d, dtype=torch.float32, causal=True)
    allowed = HOPPER_STACK.get((kernel, d), stack) if arch == 90 else stack
    assert code.stack <= allowed and code.body.mma > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": (100, 0)},
    "softcap": {"causal": True, "softcap": 30.0},
    "alibi": {"causal": True, "alibi_slopes": torch.ones(8)},
    "dropout": {"causal": True, "dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])},
    "sinks": {"window": (127, 0), "sinks": torch.ones(8)},
    "bool-mask": {"mask": torch.ones(2048, 2048, dtype=torch.bool)},
    "bias": {"mask": torch.ones(1, 8, 2048, 2048)},
}


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "row_terms_kernel"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_options_stay_in_registers(arch: Arch, d: int, options: str, kernel: str) -> None:
    code = code_of(arch, kernel, d=d, dtype=BF16, **OPTIONS[options])
    extras = options in (
        "softcap",
        "alibi",
        "dropout",
        "bool-mask",
        "bias",
    )  # other tiles, by counts
    assert_in_registers(code, 0 if extras else arch, kernel, d)


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_gradient_of_a_mask_stays_in_registers(arch: Arch, d: int) -> None:
    code = code_of(arch, "flash_bwd_dmask_kernel", d=d, dtype=BF16, **OPTIONS["bias"])
    assert code.in_registers, code.spills


# Instructions in the interior loop for each that multiplies matrices: all, and what must not creep in.
LOOPS: dict[tuple[str, int], float] = {
    ("flash_fwd_kernel", 64): 5.0,
    ("flash_fwd_kernel", 128): 3.8,
    ("flash_bwd_dkdv_kernel", 64): 3.7,
    ("flash_bwd_dkdv_kernel", 128): 3.4,
    ("flash_bwd_dq_kernel", 64): 3.7,
    ("flash_bwd_dq_kernel", 128): 3.5,
}


@pytest.mark.parametrize("kernel, d", LOOPS)
def test_interior_loop_has_no_more_instructions_than(kernel: str, d: int) -> None:
    loop = code_of(80, kernel, d=d, dtype=BF16, causal=True).main_loop
    assert 1.0 < loop.per_mma() <= LOOPS[kernel, d]
    assert loop.count("FSEL", "SEL") == 0, "the interior masks nothing"


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("arch", [90, 100, 120])
def test_the_copy_engine_loads_keys_and_values(arch: int, d: int) -> None:
    loop = code_of(arch, "flash_fwd_kernel", d=d, dtype=BF16, causal=True).main_loop
    assert loop.count("UTMALDG") == 2 and loop.count("LDGSTS", "LDG") == 0


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_shared_memory_has_no_conflicts(arch: int, d: int) -> None:
    q, k, v = (
        torch.randn(1, 192, 1, d, dtype=BF16).transpose(1, 2).requires_grad_() for _ in "qkv"
    )
    with standing_in(arch) as gpu:
        pyfuse.attention(q, k, v, causal=True, backend="triton").sum().backward()
    for report in gpu.reports:
        counted = report.counters
        assert counted["shared_wavefronts"] <= 1.05 * counted["shared_wavefronts_ideal"]
        assert counted["sectors"] <= 1.05 * counted["sectors_ideal"]
