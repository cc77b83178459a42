"""The gradient of an additive mask: ds, summed over what the mask was broadcast along.

It takes both products of a tile once more rather than memory for ds [B, Hq, M, N], and sums in one order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.attention_gradient import pair_gradients
from pyfuse.kernels.attention_tile import key_ranges
from pyfuse.kernels.tiles import LOG2E, head, load_tile, tile, wide


@triton.jit(
    do_not_specialize=["M", "N", "left", "right", "batches", "heads", "key0", "key1", "threshold"]
)
def flash_bwd_dmask_kernel(
    q, k, v, do, lse2, rest, delta, dmask, q_strides, k_strides, v_strides, do_strides, row_strides, dmask_strides,
    Hq, G, M, N, batches, heads, scale, softcap, left, right, slopes, lengths, mask, mask_strides, key0, key1,
    threshold, keep_scale, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dmask of one tile of an additive mask: the sum of ds over `batches` sequences and `heads` heads that share it.

    ROWS, COLS: dmask has rows and columns of its own; without, they are summed, and a program owns all of them."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    col_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_row = 0
    last_row = row_blocks
    if ROWS:
        first_row = pid % row_blocks
        last_row = first_row + 1
        pid = pid // row_blocks
    first_col = 0
    last_col = col_blocks
    if COLS:
        first_col = pid % col_blocks
        last_col = first_col + 1
        pid = pid // col_blocks
    mask_heads = Hq // heads
    mask_h = wide(pid % mask_heads)
    mask_b = wide(pid // mask_heads)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(mask_b * batches, mask_b * batches + batches):
        end = N
        if lengths is not None:
            end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), N).to(tl.int32)
        for h in range(mask_h * heads, mask_h * heads + heads):
            slope = slopes
            if slopes is not None:
                slope = tl.load(slopes + h).to(tl.float32) * LOG2E
            k_start = head(k, k_strides, b, h // G)
            v_start = head(v, v_strides, b, h // G)
            for row in range(first_row, last_row):
                m = row * BLOCK_M + tl.arange(0, BLOCK_M)
                queries = load_tile(
                    tile(head(q, q_strides, b, h), q_strides[2], m, d), m, M, d, D, True
                )
                d_out = load_tile(
                    tile(head(do, do_strides, b, h), do_strides[2], m, e), m, M, e, Dv, True
                )
                rows = b * row_strides[0] + h * row_strides[1] + m
                row_lse2 = tl.load(lse2 + rows, mask=m < M, other=float("inf"))
                row_delta = tl.load(delta + rows, mask=m < M, other=0.0)
                row_rest = rest
                if rest is not None:
                    row_rest = tl.load(rest + rows, mask=m < M, other=0.0)[:, None]
                lo, a, c, hi = key_ranges(row * BLOCK_M, M, N, end, left, right, BLOCK_M, BLOCK_N)
                from_col = tl.maximum(first_col, lo // BLOCK_N)
                to_col = tl.minimum(last_col, tl.cdiv(hi, BLOCK_N))
                for col in range(from_col, to_col):
                    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
                    keys = load_tile(tile(k_start, k_strides[2], n, d), n, end, d, D, True)
                    values = load_tile(tile(v_start, v_strides[2], n, e), n, end, e, Dv, True)
                    p, stays, ds, t = pair_gradients(
                        queries, keys, d_out, values, row_lse2[:, None], row_rest, row_delta[:, None], m[:, None],
                        n[None, :], m, col * BLOCK_N, M, N, end, left, right, scale, softcap, slope,
                        head(mask, mask_strides, b, h), mask_strides, key0, key1, threshold, keep_scale, b, h,
                        BLOCK_N, True, False, False, PRECISION,
                    )  # fmt: skip
                    total += ds
    m = first_row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first_col * BLOCK_N + tl.arange(0, BLOCK_N)
    start = head(dmask, dmask_strides, mask_b, mask_h)
    if ROWS and COLS:
        place = start + m.to(tl.int64)[:, None] * dmask_strides[2] + n[None, :]
        tl.store(place, total.to(dmask.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
    elif ROWS:
        tl.store(start + m, tl.sum(total, 1).to(dmask.dtype.element_ty), mask=m < M)
    elif COLS:
        tl.store(start + n, tl.sum(total, 0).to(dmask.dtype.element_ty), mask=n < N)
    else:
        tl.store(start, tl.sum(tl.sum(total, 1), 0).to(dmask.dtype.element_ty))
