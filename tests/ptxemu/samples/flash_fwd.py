"""Flash attention's forward in Triton: by plain pointers, and by tensor descriptors (TMA where the GPU has it).

    s[m, n] = scale q[m]·k[n],  lse[m] = ln Σ_n exp s[m, n],  o[m] = Σ_n exp(s[m, n] - lse[m]) v[n]

over the keys n that query m sees: all, or with causal n <= m + N - M, so that the last query sees the last key.
A query that sees no key has o = 0 and lse = -inf. Online softmax as in Dao, arXiv:2307.08691: the tiles of keys that
every query of a block sees come first and carry no mask. One program owns BLOCK_M queries of one head.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

import ptxemu
from ptxemu import triton_run

if TYPE_CHECKING:
    from ptxemu import Report
    from ptxemu.gpu import Gpu

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def key_tiles(m0, M, N, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys [0, full) are whole tiles that all queries of the block at m0 see; beyond `end` none of them sees any."""
    if CAUSAL:
        full = tl.minimum(tl.maximum(m0 + N - M + 1, 0), N)
        end = tl.minimum(tl.maximum(tl.minimum(m0 + BLOCK_M, M) + N - M, 0), N)
    else:
        full = N
        end = N
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def softmax_step(s, m_i, l_i, scale, MASKED: tl.constexpr):
    """Weights p = 2^(scale s - max) of scores s [BM, BN], the new maximum and sum, and what older sums shrink by."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    pivot = m_new
    if MASKED:
        # A row that has seen no key yet would give inf - inf.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - pivot[:, None])
    shrink = tl.exp2(m_i - pivot)
    return p, m_new, l_i * shrink + tl.sum(p, 1), shrink


@triton.jit
def visible(s, m, n, M, N, CAUSAL: tl.constexpr):
    """Scores with the keys that query m [BM] does not see at -inf."""
    seen = n[None, :] < N
    if CAUSAL:
        seen &= n[None, :] <= m[:, None] + (N - M)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def finish(acc, m_i, l_i):
    """o [BM, D] and lse [BM] from the running sums."""
    o = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    return o, (m_i + tl.log2(l_i)) * LN2


@triton.jit
def program(M, Hq, group, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """First query, batch, query head and key head of this program (b and heads in 64 bits)."""
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    head = (pid // blocks).to(tl.int64)
    h = head % Hq
    return block * BLOCK_M, head // Hq, h, h // group


@triton.jit
def tile(base, strides, b, h, rows, cols):
    """Pointers to rows x cols of head (b, h) in a [B, H, T, D] tensor of any layout; b, h in 64 bits."""
    start = base + b * strides[0] + h * strides[1]
    return start + rows.to(tl.int64)[:, None] * strides[2] + cols[None, :] * strides[3]


@triton.jit
def wide(x):
    """x in 64 bits; a stride of 1 comes as a constant, which has no .to()."""
    return x + tl.full((), 0, tl.int64)


@triton.jit
def load_tile(pointers, rows, T, cols, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile, zero outside of T rows and D columns; ROWS and COLS say which of the two limits can be crossed."""
    if ROWS and COLS:
        x = tl.load(pointers, mask=(rows[:, None] < T) & (cols[None, :] < D), other=0.0)
    elif ROWS:
        x = tl.load(pointers, mask=rows[:, None] < T, other=0.0)
    elif COLS:
        x = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def attend(
    acc, m_i, l_i, q, k, v, k_strides, v_strides, b, h, m, d, lo, hi, M, N, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys [lo, hi) into the running sums of one block of queries."""
    tile_n = tl.arange(0, BLOCK_N)
    cut: tl.constexpr = d.shape[0] != D
    k_tile = tile(k, k_strides, b, h, lo + tile_n, d)
    v_tile = tile(v, v_strides, b, h, lo + tile_n, d)
    k_step = BLOCK_N * wide(k_strides[2])
    v_step = BLOCK_N * wide(v_strides[2])
    for n0 in range(lo, hi, BLOCK_N):
        n = n0 + tile_n
        s = tl.dot(q, load_tile(k_tile, n, N, d, D, MASKED, cut).T, input_precision=PRECISION)
        if MASKED:
            s = visible(s, m, n, M, N, CAUSAL)
        p, m_i, l_i, shrink = softmax_step(s, m_i, l_i, scale, MASKED)
        values = load_tile(v_tile, n, N, d, D, MASKED, cut)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        k_tile += k_step
        v_tile += v_step
    return acc, m_i, l_i


@triton.jit
def flash_fwd_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, lse_strides, Hq, group, M, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0, b, hq, hk = program(M, Hq, group, CAUSAL, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    cut: tl.constexpr = D != BLOCK_D
    queries = load_tile(tile(q, q_strides, b, hq, m, d), m, M, d, D, True, cut)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_tiles(m0, M, N, CAUSAL, BLOCK_M, BLOCK_N)
    acc, m_i, l_i = attend(
        acc, m_i, l_i, queries, k, v, k_strides, v_strides, b, hk, m, d, 0, full, M, N, scale * LOG2E,
        D, BLOCK_N, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = attend(
        acc, m_i, l_i, queries, k, v, k_strides, v_strides, b, hk, m, d, full, end, M, N, scale * LOG2E,
        D, BLOCK_N, CAUSAL, True, PRECISION,
    )  # fmt: skip
    out, lse_m = finish(acc, m_i, l_i)
    o_mask = (m[:, None] < M) & (d[None, :] < D)
    tl.store(tile(o, o_strides, b, hq, m, d), out.to(o.dtype.element_ty), mask=o_mask)
    tl.store(lse + b * lse_strides[0] + hq * lse_strides[1] + m, lse_m, mask=m < M)


@triton.jit
def attend_tma(
    acc, m_i, l_i, q, k, v, m, lo, hi, M, N, scale,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`attend` over descriptors of one head's keys and values, which read 0 beyond N and D."""
    for n0 in range(lo, hi, BLOCK_N):
        s = tl.dot(q, k.load([n0, 0]).T, input_precision=PRECISION)
        if MASKED:
            s = visible(s, m, n0 + tl.arange(0, BLOCK_N), M, N, CAUSAL)
        p, m_i, l_i, shrink = softmax_step(s, m_i, l_i, scale, MASKED)
        values = v.load([n0, 0])
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def head(base, strides, b, h, T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Descriptor of head (b, h) of a [B, H, T, D] tensor with unit stride in D, in tiles of BLOCK_T rows."""
    start = base + b * strides[0] + h * strides[1]
    return tl.make_tensor_descriptor(start, [T, D], [wide(strides[2]), 1], [BLOCK_T, BLOCK_D])


@triton.jit
def flash_fwd_tma_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, lse_strides, Hq, group, M, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0, b, hq, hk = program(M, Hq, group, CAUSAL, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    queries = head(q, q_strides, b, hq, M, D, BLOCK_M, BLOCK_D).load([m0, 0])
    keys = head(k, k_strides, b, hk, N, D, BLOCK_N, BLOCK_D)
    values = head(v, v_strides, b, hk, N, D, BLOCK_N, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_tiles(m0, M, N, CAUSAL, BLOCK_M, BLOCK_N)
    acc, m_i, l_i = attend_tma(
        acc, m_i, l_i, queries, keys, values, m, 0, full, M, N, scale * LOG2E, BLOCK_N, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = attend_tma(
        acc, m_i, l_i, queries, keys, values, m, full, end, M, N, scale * LOG2E, BLOCK_N, CAUSAL, True, PRECISION,
    )  # fmt: skip
    out, lse_m = finish(acc, m_i, l_i)
    head(o, o_strides, b, hq, M, D, BLOCK_M, BLOCK_D).store([m0, 0], out.to(o.dtype.element_ty))
    tl.store(lse + b * lse_strides[0] + hq * lse_strides[1] + m, lse_m, mask=m < M)


@dataclass(frozen=True)
class Tiles:
    """Block sizes and Triton options of one launch."""

    block_m: int = 64
    block_n: int = 64
    warps: int = 4
    stages: int = 2


def flash_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None,
    tma: bool = False, precision: str = "ieee", tiles: Tiles | None = None, arch: int = 80,
    gpu: Gpu | None = None, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Report]:  # fmt: skip
    """o like q, lse [B, Hq, M] in float32, and the emulator's report.

    q [B, Hq, M, D]; k, v [B, Hk, N, D], Hq a multiple of Hk, one dtype (float32, bfloat16, float16), any strides; with
    `tma` unit stride in D and 16-byte rows. scale > 0, D^-1/2 by default. precision: of float32 products, "ieee",
    "tf32" or "tf32x3".
    """
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    kernel, args, options = plan(
        q, k, v, o, lse, causal=causal, scale=scale, tma=tma, precision=precision, tiles=tiles
    )
    programs = triton.cdiv(q.shape[2], options["BLOCK_M"]) * q.shape[0] * q.shape[1]
    return (
        o,
        lse,
        triton_run.launch(kernel, (programs,), *args, arch=arch, gpu=gpu, seed=seed, **options),
    )


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, *, causal: bool = False,
    scale: float | None = None, tma: bool = False, precision: str = "ieee", tiles: Tiles | None = None,
) -> tuple[triton.JITFunction, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Kernel, arguments and options of one launch."""
    _, heads, queries, size = q.shape
    scale = size**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale: {scale}, needs a positive one")
    for name, x in {"q": q, "k": k, "v": v, "o": o}.items():
        if tma and (x.stride(3) != 1 or any(x.stride(i) * x.element_size() % 16 for i in range(3))):
            raise ValueError(f"{name}: strides {x.stride()}, a tensor map needs rows of 16 bytes")
    tiles = tiles or Tiles()
    args = (
        *(q, k, v, ptxemu.Output(o), ptxemu.Output(lse)),
        *(tuple(x.stride()) for x in (q, k, v, o)),
        *(tuple(lse.stride()[:2]), heads, heads // k.shape[1], queries, k.shape[2], float(scale)),
    )
    options = {
        "D": size,
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CAUSAL": causal,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }
    return flash_fwd_tma_kernel if tma else flash_fwd_kernel, args, options
