"""The embedding sum e = dropout(norm(scale · weight[token] + position row + segment row)), a row for each token.

Tables are [rows, D] with unit stride in D. A row that an id outside of its table would name is not read: the token's
e is NaN. Kernels whose name says wide take the norm of rows that have more columns than a program holds, in two passes.

What all of them share are tuples for (token, position, segment): tables, strides (of rows, in UNITs), heights (numbers
of rows) and ids; length, the tokens after which positions start again (None: every token has its own); turns, of a
sinusoid. Together they are `source`. dropout is (key, key, threshold, 1 / (1 - p)) or four times None.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.tiles import keep_tile, wide


@triton.constexpr_function
def ragged(D, BLOCK_D):
    """Whether the last of D columns' tiles is cut."""
    return D % BLOCK_D != 0


@triton.jit
def sinusoid(turns, place):
    """Columns 0 1 2 3 ... of the encoding of `place` [ROWS]: sin a, cos a, sin a', cos a', ...

    turns [D/2]: of a turn what a position adds to the angle of a pair of columns, in units of 2^-64. Products wrap as
    angles do, so that no position is too far; the first bits say which quarter of a turn is nearest.
    """
    angle = place[:, None] * turns[None, :]
    high = (angle >> 32).to(tl.int32)
    quarter = ((high >> 29) + 1) >> 1  # -2 to 2
    rest = high & 0x3FFFFFFF
    rest = (rest - (rest >> 29 << 30)).to(tl.float32) + angle.to(tl.uint32).to(
        tl.float32
    ) * 2.0**-32
    x = rest * 1.4629180792671596e-09  # 2π 2^-32, |x| <= π/4
    square = x * x
    # Of least greatest relative error, 4e-9 and 1e-10, before rounding.
    s = (-1.9515217e-4 * square + 8.33216123e-3) * square - 1.66666552e-1
    s = s * (square * x) + x
    c = (2.44330816e-5 * square - 1.38873153e-3) * square + 4.16666456e-2
    c = c * (square * square) + (1.0 - 0.5 * square)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return tl.reshape(tl.join(sine, cosine), (place.shape[0], 2 * turns.shape[0]))


@triton.jit
def frequencies(turns, first, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """The angles' steps of the columns from `first` on, if there is a sinusoid."""
    if turns is None:
        return first
    else:
        pair = first // 2 + tl.arange(0, BLOCK_D // 2)
        return tl.load(turns + pair, mask=pair < (D + 1) // 2, other=0)


@triton.jit
def looked_up(table, stride, row, known, cols, D: tl.constexpr, UNIT: tl.constexpr):
    """Rows of a table in float32; 0 where a row is not known, and beyond D."""
    pointers = table + (row * stride * UNIT)[:, None] + cols[None, :]
    mask = known[:, None]
    if ragged(D, cols.shape[0]):
        mask = mask & (cols[None, :] < D)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def known_row(row, height):
    return (row >= 0) & (row < height)


@triton.jit
def summands(source, steps, scale, t, tokens, cols, D: tl.constexpr, UNIT: tl.constexpr):
    """The sum [ROWS, BLOCK_D] of the rows of the tokens t, in float32. steps: what frequencies() gave. Rows beyond the
    last token, and columns beyond D, are 0."""
    tables, strides, heights, ids, length, turns = source
    some = t < tokens
    token = wide(tl.load(ids[0] + t, mask=some, other=0))
    known = known_row(token, heights[0])
    place = t
    if length is not None:
        place = t % length
    if ids[1] is not None:
        place = tl.load(ids[1] + place, mask=some, other=0)
    place = wide(place)
    if tables[1] is not None:
        known &= known_row(place, heights[1])
    if tables[2] is not None:
        segment = wide(tl.load(ids[2] + t, mask=some, other=0))
        known &= known_row(segment, heights[2])
    tl.device_assert(
        known | (t >= tokens), "token_ids, positions or segment_ids: outside of their table"
    )
    known &= some
    factor = tl.where(known | (t >= tokens), scale, float("nan"))
    e = looked_up(tables[0], strides[0], token, known, cols, D, UNIT) * factor[:, None]
    if turns is not None:
        encoding = sinusoid(steps, place)
        if ragged(D, cols.shape[0]):
            encoding = tl.where(cols[None, :] < D, encoding, 0.0)
        e += encoding
    if tables[1] is not None:
        e += looked_up(tables[1], strides[1], place, known, cols, D, UNIT)
    if tables[2] is not None:
        e += looked_up(tables[2], strides[2], segment, known, cols, D, UNIT)
    return e


@triton.jit
def parameter(vector, cols, D: tl.constexpr):
    """Of the norm, [1, BLOCK_D] in float32."""
    if ragged(D, cols.shape[0]):
        p = tl.load(vector + cols, mask=cols < D, other=0.0)
    else:
        p = tl.load(vector + cols)
    return p.to(tl.float32)[None, :]


@triton.jit
def centred(e, mean, cols, D: tl.constexpr):
    """e - mean, 0 beyond column D."""
    if ragged(D, cols.shape[0]):
        return tl.where(cols[None, :] < D, e - mean[:, None], 0.0)
    else:
        return e - mean[:, None]


@triton.jit
def row_sum(x):
    """Σ over columns, the same in all lanes.

    Where a lane has one column, and that is a product, it would be fused with the addition of the next lane's, which
    fuses its own: they would differ in the last bit. An addition of 0 in between takes the fusion.
    """
    if x.shape[1] < 512:
        return tl.sum(x + 0.0, 1)
    else:
        return tl.sum(x, 1)


@triton.jit
def drop(e, t, first, dropout):
    """Dropout of the columns from `first` on of the tokens t."""
    if dropout[0] is not None:
        kept = keep_tile(wide(0), wide(0), t, first, dropout[0], dropout[1], dropout[2], e.shape[1])
        e = tl.where(kept, e * dropout[3], 0.0)
    return e


@triton.jit
def store_tokens(y, e, t, tokens, cols, D: tl.constexpr):
    """Rows t of y [tokens, D], rounded to its dtype."""
    mask = (t < tokens)[:, None]
    if ragged(D, cols.shape[0]):
        mask = mask & (cols[None, :] < D)
    tl.store(y + (wide(t) * D)[:, None] + cols[None, :], e.to(y.dtype.element_ty), mask=mask)


@triton.jit
def store_statistics(statistics, mean, rstd, t, tokens):
    """statistics [tokens, 2]."""
    tl.store(statistics + 2 * wide(t), mean, mask=t < tokens)
    tl.store(statistics + 2 * wide(t) + 1, rstd, mask=t < tokens)


# Apart, since of a tuple's integers Triton compiles those that are 1, or multiples of 16, anew.
UNSPECIALISED = [
    "stride0", "stride1", "stride2", "height0", "height1", "height2", "length", "tokens", "key0", "key1",
    "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=[*UNSPECIALISED, "stretches"])
def embed_kernel(
    tables, stride0, stride1, stride2, height0, height1, height2, ids, length, turns, norm_weight, norm_bias, y,
    statistics, tokens, scale, eps, key0, key1, threshold, keep_scale, stretches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """y [tokens, D]. statistics, where there is a norm and they are wanted: mean and 1/deviation of each token.
    A program has every so many ROWS tokens; without a norm, of one of `stretches` of BLOCK_D columns. HOLD: the norm's
    parameters stay in registers."""
    source = (tables, (stride0, stride1, stride2), (height0, height1, height2), ids, length, turns)
    dropout = (key0, key1, threshold, keep_scale)
    first = tl.program_id(0) % stretches * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    steps = frequencies(turns, first, BLOCK_D, D)
    if HOLD and norm_weight is not None:
        w = parameter(norm_weight, cols, D)
    if HOLD and norm_bias is not None:
        b = parameter(norm_bias, cols, D)
    start = tl.program_id(0) // stretches
    for block in range(start, tl.cdiv(tokens, ROWS), tl.num_programs(0) // stretches):
        t = block * ROWS + tl.arange(0, ROWS)
        e = summands(source, steps, scale, t, tokens, cols, D, UNIT)
        if norm_weight is not None:
            mean = row_sum(e) * (1.0 / D)
            e = centred(e, mean, cols, D)
            rstd = tl.rsqrt(row_sum(e * e) * (1.0 / D) + eps)
            if statistics is not None:
                store_statistics(statistics, mean, rstd, t, tokens)
            e *= rstd[:, None]
            e *= w if HOLD else parameter(norm_weight, cols, D)
            if norm_bias is not None:
                e += b if HOLD else parameter(norm_bias, cols, D)
        store_tokens(y, drop(e, t, first, dropout), t, tokens, cols, D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def embed_wide_kernel(
    tables, stride0, stride1, stride2, height0, height1, height2, ids, length, turns, norm_weight, norm_bias, y,
    statistics, tokens, scale, eps, key0, key1, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same with a norm of wide rows, token by token. Means and squares of stretches are joined as Chan, Golub and
    LeVeque do."""
    source = (tables, (stride0, stride1, stride2), (height0, height1, height2), ids, length, turns)
    dropout = (key0, key1, threshold, keep_scale)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        t = token + tl.arange(0, 1)
        mean = tl.zeros([1], tl.float32)
        squares = tl.zeros([1], tl.float32)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            steps = frequencies(turns, first, BLOCK_D, D)
            e = summands(source, steps, scale, t, tokens, cols, D, UNIT)
            count = tl.minimum(D - first, BLOCK_D).to(tl.float32)
            here = row_sum(e) / count
            e = centred(e, here, cols, D)
            share = count / (first + count)
            step = here - mean
            squares += row_sum(e * e) + step * step * (first * share)
            mean += step * share
        rstd = tl.rsqrt(squares * (1.0 / D) + eps)
        if statistics is not None:
            store_statistics(statistics, mean, rstd, t, tokens)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            steps = frequencies(turns, first, BLOCK_D, D)
            e = summands(source, steps, scale, t, tokens, cols, D, UNIT)
            e = (e - mean[:, None]) * rstd[:, None] * parameter(norm_weight, cols, D)
            if norm_bias is not None:
                e += parameter(norm_bias, cols, D)
            store_tokens(y, drop(e, t, first, dropout), t, tokens, cols, D)
