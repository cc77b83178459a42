"""The CUDA kernels of attention as machine code: in registers, few instructions, no conflicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_code import kernels_of
from emulated import standing_in

import pyfuse
from pyfuse.backends import cuda_device

pytestmark = pytest.mark.skipif(cuda_device._cuda is None, reason=cuda_device.NOT_BUILT)

ARCHS = ("80", "86", "89", "90a", "100", "120")


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_forward_stays_in_registers(arch: str, dtype: str, d: int) -> None:
    for name, code in kernels_of(f"attention_fwd_{dtype}_d{d}", arch).items():
        # There the assembler is a register or two short, and Triton's kernels go first (gpu_order.py).
        allowed = 16 if (arch, d) == ("100", 128) and dtype != "f32" and name == "forward" else 0
        assert code.stack <= allowed, f"{name}: {code.stack} bytes of stack, {code.spills} spills"


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kernel", ["dkdv", "dq", "dmask"])
def test_the_backward_stays_in_registers(kernel: str, d: int) -> None:
    for name, code in kernels_of(f"attention_bwd_{kernel}_bf16_d{d}", "80").items():
        assert code.in_registers, f"{name}: {code.stack} bytes of stack, {code.spills} spills"


@pytest.mark.parametrize("d", [32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_memory_is_read_without_conflicts(dtype: torch.dtype, d: int) -> None:
    q, k, v = torch.randn(3, 1, 197, 1, d).to(dtype).transpose(2, 3)
    for options in ({"causal": True}, {"softcap": 20.0}):
        counters = _counters(q, k, v, **options)
        assert counters["shared_wavefronts"] <= 1.01 * counters["shared_wavefronts_ideal"]


def _counters(*tensors: torch.Tensor, **options: Any) -> dict[str, int]:
    with standing_in(80, backend="cuda") as gpu:
        pyfuse.attention(*tensors, **options, backend="cuda")
    counters: dict[str, int] = gpu.reports[-1].counters
    return counters
