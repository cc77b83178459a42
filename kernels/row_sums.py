"""The gradient of a table of which rows were looked up: out[v] = scale · Σ_{j: id[j] = v} rows[token[j]], id ascending.

A program sums CHUNK neighbours j. Runs of one id that lie inside of its chunk are whole, and go to the table; the first
and the last may go on in other chunks: their sums are the rows of the next launch, which does the same with them. So no
id, however often it occurs, is summed up by one program alone, and every sum has one order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.embedding import ragged
from pyfuse.kernels.tiles import keep_tile, wide


@triton.jit
def add_in_run(a, a_begins, b, b_begins):
    """Two neighbouring stretches of a segmented sum; begins: a run begins in it."""
    return tl.where(b_begins, b, a + b), a_begins | b_begins


@triton.jit
def id_of(j, ids, repeat):
    """Of the j-th in order; without ids, the numbers of the runs themselves."""
    if repeat is not None:
        j = j // repeat
    if ids is None:
        return j
    elif ids.dtype.element_ty == tl.int64:
        return tl.load(ids + j)
    else:
        return tl.load(ids + j).to(tl.int32)


@triton.jit
def token_of(j, order, repeat, length):
    """The row that is the j-th in order. repeat: so many tokens, length apart, are neighbours of one id."""
    lap = 0
    if repeat is not None:
        lap = j % repeat * length
        j = j // repeat
    if order is not None:
        j = tl.load(order + j).to(tl.int32)
    return j + lap


@triton.jit
def load_tokens(rows, stride, token, some, cols, D: tl.constexpr, UNIT: tl.constexpr):
    """Rows [ROWS, BLOCK_D] in float32; 0 where there is none, and beyond D."""
    mask = some[:, None]
    if ragged(D, cols.shape[0]):
        mask = mask & (cols[None, :] < D)
    x = tl.load(rows + (wide(token) * stride * UNIT)[:, None] + cols[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_some(base, row, x, some, cols, D: tl.constexpr):
    """Write those rows of x that `some` names to rows of [..., D]."""
    mask = some[:, None]
    if ragged(D, cols.shape[0]):
        mask = mask & (cols[None, :] < D)
    x = x.to(base.dtype.element_ty)
    tl.store(base + (wide(row) * D)[:, None] + cols[None, :], x, mask=mask)


@triton.jit
def store_row(base, row, x, cols, D: tl.constexpr):
    mask = cols < D if ragged(D, cols.shape[0]) else None
    tl.store(base + wide(row) * D + cols, x.to(base.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "stride",
        "repeat",
        "length",
        "count",
        "height",
        "stretches",
        "key0",
        "key1",
        "threshold",
    ]
)
def row_sums_kernel(
    rows, stride, ids, order, repeat, length, count, out, height, scale, edges, edge_ids, key0, key1, threshold,
    keep_scale, stretches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out [height, D] at each id whose run ends here. edges [2·chunks, D] in float32 and edge_ids: the sums of each
    chunk's first and last run; None where there is one chunk. stride: of rows, in UNITs. With key0 rows go through
    dropout first."""
    left = tl.program_id(0) % stretches * BLOCK_D
    # A lane takes UNIT neighbours and no more: it then has whole columns of a tile.
    cols = left + tl.max_contiguous(tl.arange(0, BLOCK_D), UNIT)
    chunk = tl.program_id(0) // stretches
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, count)
    first = id_of(start, ids, repeat)
    last = id_of(end - 1, ids, repeat)
    k = tl.arange(0, ROWS)
    run = tl.zeros([BLOCK_D], tl.float32)  # the sum of the run that the rows before end in
    for at in range(start, end, ROWS):
        # What is beyond the end counts as rows of 0 in the last run.
        some = at + k < end
        j = tl.minimum(at + k, end - 1)
        id = id_of(j, ids, repeat)
        begins = (id != id_of(tl.maximum(j - 1, start), ids, repeat)) & some
        ends = id != id_of(tl.minimum(j + 1, end - 1), ids, repeat)
        token = token_of(j, order, repeat, length)
        x = load_tokens(rows, stride, token, some, cols, D, UNIT)
        if key0 is not None:
            kept = keep_tile(wide(0), wide(0), token, left, key0, key1, threshold, BLOCK_D)
            x = tl.where(kept & some[:, None], x * keep_scale, 0.0)
        x += tl.where(((k == 0) & ~begins)[:, None], run[None, :], 0.0)
        x, _ = tl.associative_scan((x, tl.broadcast_to(begins[:, None], x.shape)), 0, add_in_run)
        run = tl.sum(tl.where((k == ROWS - 1)[:, None], x, 0.0), 0)
        whole = ends & (id >= 0) & (id < height)
        if edges is not None:
            whole = whole & (id != first)
            of_first = ends & (id == first)
            if tl.max(of_first.to(tl.int32), 0) > 0:
                store_some(edges, 2 * chunk + k * 0, x, of_first, cols, D)
        store_some(out, id, x * scale, whole, cols, D)
    if edges is None:
        if (last >= 0) & (last < height):
            store_row(out, last, run * scale, cols, D)
    else:
        if first == last:
            store_row(edges, 2 * chunk, run, cols, D)
            run = tl.zeros([BLOCK_D], tl.float32)
        store_row(edges, 2 * chunk + 1, run, cols, D)
        if left == 0:
            tl.store(edge_ids + 2 * chunk, first)
            tl.store(edge_ids + 2 * chunk + 1, last)
