"""Bugs in the Triton samples: flash_fwd.py and layer_norm_bwd.py."""

from __future__ import annotations

from ptxemu.mutations import mutant

_FLASH, _NORM = "flash_fwd.py", "layer_norm_bwd.py"

ATTENTION = [
    mutant("keys beyond the last are read", "triton flash", _FLASH,
           "x = tl.load(pointers, mask=rows[:, None] < T, other=0.0)", "x = tl.load(pointers)", "out-of-bounds"),
    mutant("rows beyond the last are written", "triton flash", _FLASH,
           "o_mask = (m[:, None] < M) & (d[None, :] < D)\n    tl.store(tile(o", "o_mask = (m[:, None] >= 0) & (d[None, :] < D)\n    tl.store(tile(o",
           "out-of-bounds"),
    mutant("lse beyond the last row is written", "triton flash", _FLASH,
           "out.to(o.dtype.element_ty), mask=o_mask)\n    tl.store(lse + b * lse_strides[0] + hq * lse_strides[1] + m, lse_m, mask=m < M)",
           "out.to(o.dtype.element_ty), mask=o_mask)\n    tl.store(lse + b * lse_strides[0] + hq * lse_strides[1] + m, lse_m)",
           "out-of-bounds"),
    mutant("row offset is computed in 32 bits", "triton flash", _FLASH,
           "start + rows.to(tl.int64)[:, None] * strides[2]", "start + rows[:, None] * strides[2]", "out-of-bounds"),
    mutant("queries of a group take the key head of their own", "triton flash", _FLASH,
           "return block * BLOCK_M, head // Hq, h, h // group", "return block * BLOCK_M, head // Hq, h, h", "out-of-bounds"),
    mutant("batch and head are mixed up", "triton flash", _FLASH, "h = head % Hq", "h = head // Hq", "numerics"),
    mutant("mask of a ragged tile is lost", "triton flash", _FLASH, "seen = n[None, :] < N\n", "seen = n[None, :] >= 0\n", "numerics"),
    mutant("mask of a ragged tile is off by one", "triton flash", _FLASH, "seen = n[None, :] < N\n", "seen = n[None, :] <= N\n", "numerics"),
    mutant("causal mask is off by one", "triton flash", _FLASH,
           "n[None, :] <= m[:, None] + (N - M)", "n[None, :] < m[:, None] + (N - M)", "numerics"),
    mutant("too many tiles go without a mask", "triton flash", _FLASH,
           "full = tl.minimum(tl.maximum(m0 + N - M + 1, 0), N)", "full = tl.minimum(tl.maximum(m0 + N - M + BLOCK_M, 0), N)", "numerics"),
    mutant("last tile is dropped", "triton flash", _FLASH,
           "return full // BLOCK_N * BLOCK_N, end", "return full // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N", "numerics"),
    mutant("accumulator is not rescaled", "triton flash", _FLASH,
           "values = load_tile(v_tile, n, N, d, D, MASKED, cut)\n        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None]",
           "values = load_tile(v_tile, n, N, d, D, MASKED, cut)\n        acc = tl.dot(p.to(values.dtype), values, acc", "numerics"),
    mutant("values advance by the stride of the keys", "triton flash", _FLASH,
           "v_step = BLOCK_N * wide(v_strides[2])", "v_step = BLOCK_N * wide(k_strides[1])", "numerics out-of-bounds"),
    mutant("lse in base 2", "triton flash", _FLASH, "(m_i + tl.log2(l_i)) * LN2", "m_i + tl.log2(l_i)", "numerics"),
    mutant("rows without keys give NaN", "triton flash", _FLASH,
           'pivot = tl.where(m_new == float("-inf"), 0.0, m_new)', "pivot = m_new", "numerics"),
]  # fmt: skip

_LOCK = "    while tl.atomic_cas(locks + group, 0, 1) == 1:\n        pass\n"

NORMALISATION = [
    mutant("lock is not taken", "triton lock", _NORM, _LOCK, "", "race"),
    mutant("lock is opened by an ordinary store", "triton lock", _NORM, "tl.atomic_xchg(locks + group, 0)", "tl.store(locks + group, 0)", "race"),
    mutant("lock is never opened", "triton lock", _NORM, "    tl.atomic_xchg(locks + group, 0)\n", "", "deadlock"),
    mutant("lock of another group is opened", "triton lock", _NORM,
           "tl.atomic_xchg(locks + group, 0)", "tl.atomic_xchg(locks + (group + 1) % groups, 0)", "deadlock"),
    mutant("one sum is added outside of the lock", "triton lock", _NORM,
           "    add_to(db_part + group * D, db_row, d, D)\n    # Every thread's stores come before the one thread that opens the lock.\n"
           "    tl.debug_barrier()\n    tl.atomic_xchg(locks + group, 0)\n",
           "    tl.debug_barrier()\n    tl.atomic_xchg(locks + group, 0)\n    add_to(db_part + group * D, db_row, d, D)\n", "race"),
    mutant("all programs write the same partial sums", "triton partial", _NORM,
           "tl.store(db_part + p * D + d, db_d, mask=d < D)", "tl.store(db_part + d, db_d, mask=d < D)", "race"),
    mutant("all programs add to the same partial sums", "triton wide", _NORM,
           "            add_to(db_part + p * D, dy_d, d, D)\n", "            add_to(db_part, dy_d, d, D)\n", "race"),
    mutant("partial sums are not initialised", "triton wide", _NORM,
           'tuple(map(ptxemu.Output, parts)) if way == "partial" else tuple(parts)', "tuple(map(ptxemu.Output, parts))", "uninitialised"),
    mutant("last row is dropped", "triton partial", _NORM,
           "    for row in range(p, R, tl.num_programs(0)):\n        dw_row", "    for row in range(p, R - 1, tl.num_programs(0)):\n        dw_row",
           "numerics"),
    mutant("mean over the tile instead of the row", "triton partial", _NORM,
           "along = tl.sum(g * x_hat) / D\n", "along = tl.sum(g * x_hat) / d.shape[0]\n", "numerics"),
    mutant("columns beyond the last are read", "triton partial", _NORM,
           "return tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)", "return tl.load(x + d).to(tl.float32)", "out-of-bounds"),
    mutant("columns beyond the last are written", "triton partial", _NORM,
           "    tl.store(dx + d, dx_d.to(dx.dtype.element_ty), mask=d < D)\n    return", "    tl.store(dx + d, dx_d.to(dx.dtype.element_ty))\n    return",
           "out-of-bounds race"),
]  # fmt: skip

MUTANTS = ATTENTION + NORMALISATION
