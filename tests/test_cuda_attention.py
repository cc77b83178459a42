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
        # There the assembler is a register or two short, and Triton's kernels go first (gpu_order.py). In float32 each
        # step is added outside of the tensor cores (product.cuh), and the assembler begins more of them than fit.
        allowed = 16 if (arch, d) == ("100", 128) and name == "forward" else 0
        if dtype == "f32":
            allowed = 128
        assert code.stack <= allowed, f"{name}: {code.stack} bytes of stack, {code.spills} spills"


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kernel", ["dkdv", "dq", "dmask"])
def test_the_backward_stays_in_registers(kernel: str, d: int) -> None:
    for name, code in kernels_of(f"attention_bwd_{kernel}_bf16_d{d}", "80").items():
        assert code.in_registers, f"{name}: {code.stack} bytes of stack, {code.spills} spills"


HOPPER = "attention_fwd_hopper_{dtype}_d{d}"
hopper_built = pytest.mark.skipif(
    cuda_device._cuda is None
    or HOPPER.format(dtype="bf16", d=64) not in cuda_device.module().units(),
    reason="pyfuse._cuda is built without code for sm_90a",
)


@hopper_built
@pytest.mark.ahead_of_time
# issue: instructions of the interior loop for 64 queries and 128 keys. 4.5 of them for each of a lane's 64 scores, a
# maximum, a subtraction, 2^x, a sum and half a rounding, are 288; 59 and 91 let sums shrink, in few rounds.
@pytest.mark.parametrize("d, issue", [(64, 450), (128, 495)])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_hopper_s_forward(dtype: str, d: int, issue: int) -> None:
    code = kernels_of(HOPPER.format(dtype=dtype, d=d), "90a")["forward"]
    assert code.in_registers
    loop = code.main_loop
    assert loop.count("HGMMA") == d // 16 + 8  # both products, 16 columns or keys at a time
    assert loop.issue <= issue
    assert loop.count("FSEL") <= 2  # no masks
    assert code.body.count("UTMALDG") == 3 * d // 64  # q, and in a loop k and v, by 64 columns
    # The softmax runs behind the product with the values: nothing of it once that is waited for, up to the next.
    opcodes = [code.instructions[i].opcode for i in sorted(code.main_loop_places)]
    waits = [i for i, x in enumerate(opcodes) if x.startswith("WARPGROUP.DEPBAR")]
    powers = [i for i, x in enumerate(opcodes) if x.startswith("MUFU.EX2")]
    assert len(waits) == 2 and len(powers) >= 64 and min(powers) > waits[1]


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
