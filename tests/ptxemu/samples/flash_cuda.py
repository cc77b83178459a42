"""Launches of flash attention's forward in CUDA C++: flash_fwd.cu from sm_80 on, flash_fwd_sm90.cu on sm_90."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ptxemu import Report, TensorMap, nvcc_run, struct
from ptxemu.gpu import Emulator, Gpu

FOLDER = Path(__file__).parent
GENERAL, SM90 = FOLDER / "flash_fwd.cu", FOLDER / "flash_fwd_sm90.cu"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SM90_SHARED = 84992

Result = tuple[torch.Tensor, torch.Tensor, Report]


def flash_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None,
    gpu: Gpu | None = None, seed: int = 0, check: bool = True, source: Path = GENERAL,
    defines: Mapping[str, str] | None = None,
) -> Result:  # fmt: skip
    """o like q, lse [B, H, M] in float32, and the report.

    q [B, H, M, D]; k, v [B, H, N, D]; D of 32, 64, 128; float32, bfloat16 or float16; unit stride in D, rows of
    multiples of 16 bytes. scale > 0, D^-1/2 by default. source, defines: of a variant of the kernel.
    """
    batch, heads, M, D = q.shape
    N, scale = k.shape[2], D**-0.5 if scale is None else scale
    o, lse = _outputs(q)
    strides = [s for x in (q, k, v, o) for s in x.stride()[:3]]
    params = struct("<5Q12q3if", q, k, v, o, lse, *strides, M, N, int(causal), scale)
    block_n = 32 if q.dtype == torch.float32 and D >= 64 else 64
    report = nvcc_run.launch(
        source, f"flash_fwd_{_NAMES[q.dtype]}_d{D}", (math.ceil(M / 64), heads, batch), 128, params,
        gpu=gpu or Emulator(80), shared=(64 + 4 * block_n) * D * q.element_size(), seed=seed, check=check,
        defines=defines,
    )  # fmt: skip
    return o, lse, report


def flash_fwd_sm90(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None,
    gpu: Gpu | None = None, seed: int = 0, check: bool = True, source: Path = SM90,
    defines: Mapping[str, str] | None = None,
) -> Result:  # fmt: skip
    """The same by TMA and wgmma, for D = 64 in bfloat16 and float16 on sm_90."""
    batch, heads, M, D = q.shape
    scale = D**-0.5 if scale is None else scale
    o, lse = _outputs(q)
    maps = [
        TensorMap(x, (1, 1, rows, D), "128B") for x, rows in ((q, 64), (k, 128), (v, 128), (o, 64))
    ]
    report = nvcc_run.launch(
        source, f"flash_fwd_sm90_{_NAMES[q.dtype]}_d{D}", (math.ceil(M / 128), heads, batch), 384,
        struct("<Q3if", lse, M, k.shape[2], int(causal), scale), *maps,
        gpu=gpu or Emulator(90), shared=_SM90_SHARED, seed=seed, check=check, defines=defines,
    )  # fmt: skip
    return o, lse, report


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    o = torch.full_like(q, math.nan)
    return o, torch.full(q.shape[:3], math.nan)
