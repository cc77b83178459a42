"""Cross-entropy of the rows of a chunk of logits, and its gradient, which takes the place of the logits in memory.

For a row with products r [V], logits l = r or c·tanh(r / c), target y, lse = log(sum exp l), label smoothing e, z-loss
factor z and the gradient g that arrives at its loss (Liger, arXiv:2410.10989):

    loss = (1 - e) (lse - l[y]) + e (lse - mean l) + z lse²
    dl = g ((1 + 2 z lse) exp(l - lse) - (1 - e) onehot(y) - e / V)        dr = dl (1 - (l / c)²)

A program has one row and goes through it once for the loss and, for the gradient, once more. In the first pass each
element of a block keeps a maximum and a sum of its own (Milakov and Gimelshein, arXiv:1805.02867), so that lanes meet
only at its end. All is in float32; dr is rounded once. exp(l - lse) is exp(l - max) / sum: rounding lse would cost
several bits.

Rows have unit stride and begin at multiples of UNIT elements, as many as a lane reads together; the vocabulary is a
multiple of EVEN elements. What is None isn't there.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from pyfuse.kernels.tiles import LN2, LOG2E, tanh, wide

LOWEST = tl.constexpr(-3.4028234663852886e38)  # minus infinity less itself would be NaN


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def load_logits(pointers, cols, row, TAIL: tl.constexpr):
    """(l, tanh(r / c)) of a block in float32, the latter only with a softcap. TAIL: the block ends beyond the row, and
    there l is minus infinity. row: (its first element, V, c)."""
    _, vocabulary, softcap = row
    if TAIL:
        logit = tl.load(pointers, mask=cols < vocabulary, other=0.0).to(tl.float32)
    else:
        logit = tl.load(pointers).to(tl.float32)
    t = logit
    if softcap is not None:
        t = tanh(logit * (1.0 / softcap))
        logit = softcap * t
    if TAIL:
        logit = tl.where(cols < vocabulary, logit, float("-inf"))
    return logit, t


@triton.jit
def fold(state, row, first, smoothing, BLOCK_V: tl.constexpr, TAIL: tl.constexpr):
    """The state with a block of logits more: for each element of a block the maximum, the sum of exp(l - maximum) and,
    with label smoothing, the sum of l."""
    largest, total, plain = state
    cols = first + tl.arange(0, BLOCK_V)
    logit, _ = load_logits(row[0] + cols, cols, row, TAIL)
    # Of exp(largest - new) and exp(l - new) one is 1: this is the other.
    other = exp(-tl.abs(largest - logit))
    total = tl.where(logit > largest, total * other + 1.0, total + other)
    largest = tl.maximum(largest, logit)
    if smoothing is not None:
        if TAIL:
            logit = tl.where(cols < row[1], logit, 0.0)
        plain += logit
    return largest, total, plain


@triton.jit
def statistics(row, smoothing, BLOCK_V: tl.constexpr):
    """The row's maximum, its sum of exp(l - maximum) and, with label smoothing, its sum of l; else anything."""
    zero = tl.zeros([BLOCK_V], tl.float32)
    largest, total, plain = zero + LOWEST, zero, zero
    whole = row[1] // BLOCK_V * BLOCK_V
    for first in range(0, whole, BLOCK_V):
        largest, total, plain = fold((largest, total, plain), row, first, smoothing, BLOCK_V, False)
    if whole < row[1]:
        largest, total, plain = fold((largest, total, plain), row, whole, smoothing, BLOCK_V, True)
    top = tl.max(largest, 0)
    return top, tl.sum(total * exp(largest - top), 0), tl.sum(plain, 0)


@triton.jit
def store_block(row, first, d, BLOCK_V: tl.constexpr, TAIL: tl.constexpr):
    cols = first + tl.arange(0, BLOCK_V)
    d = d.to(row[0].dtype.element_ty)
    if TAIL:
        tl.store(row[0] + cols, d, mask=cols < row[1])
    else:
        tl.store(row[0] + cols, d)


@triton.jit
def store_gradient(
    row, first, y, terms, smoothing, z_loss, BLOCK_V: tl.constexpr, TAIL: tl.constexpr
):
    """dr of a block, written over it. terms: (maximum, 1 / sum, g, g e / V, g e / V - g e, 2 z lse).

    Where p is near 1, p - 1 is exact; what is added to it comes after.
    """
    top, scale, g, even, rest, bend = terms
    cols = first + tl.arange(0, BLOCK_V)
    logit, t = load_logits(row[0] + cols, cols, row, TAIL)
    p = g * (scale * exp(logit - top))
    d = tl.where(cols == y, p - g, p)
    if smoothing is not None:
        d -= tl.where(cols == y, rest, even)
    if z_loss is not None:
        d += p * bend
    if row[2] is not None:
        d *= 1.0 - t * t
    store_block(row, first, d, BLOCK_V, TAIL)


@triton.jit
def clear(row, BLOCK_V: tl.constexpr):
    zero = tl.zeros([BLOCK_V], tl.float32)
    whole = row[1] // BLOCK_V * BLOCK_V
    for first in range(0, whole, BLOCK_V):
        store_block(row, first, zero, BLOCK_V, False)
    if whole < row[1]:
        store_block(row, whole, zero, BLOCK_V, True)


@triton.jit(do_not_specialize=["stride", "vocabulary", "ignore_index"])
def cross_entropy_kernel(
    logits, target, flow, losses, stride, vocabulary, ignore_index, smoothing, z_loss, softcap,
    BLOCK_V: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """losses [C] float32 of r = logits [C, V], and dr in their place if GRADIENT. stride: of rows, in units of UNIT;
    vocabulary: V in units of EVEN. target [C] int64; flow [C] float32: g, None for ones.

    A row whose target is ignore_index is not read: its loss and dr are 0. One with a target outside of the vocabulary
    has NaN.
    """
    token = wide(tl.program_id(0))
    vocabulary = vocabulary * EVEN
    row = (logits + token * stride * UNIT, vocabulary, softcap)
    y = tl.load(target + token)
    if y == ignore_index:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            clear(row, BLOCK_V)
    else:
        known = (y >= 0) & (y < vocabulary)
        tl.device_assert(known, "target: outside of the vocabulary")
        own, _ = load_logits(row[0] + tl.where(known, y, 0), 0, row, False)
        top, total, plain = statistics(row, smoothing, BLOCK_V)
        from_top = tl.log2(total) * LN2
        lse = top + from_top
        less = own - top
        if smoothing is not None:
            less = (1.0 - smoothing) * less + smoothing * (plain / vocabulary - top)
        loss = from_top - less
        if z_loss is not None:
            loss += z_loss * lse * lse
        tl.store(losses + token, tl.where(known, loss, float("nan")))
        if GRADIENT:
            g = 1.0
            if flow is not None:
                g = tl.load(flow + token)
            g = tl.where(known, g, float("nan"))
            even, rest, bend = 0.0, 0.0, 0.0
            if smoothing is not None:
                even = g * smoothing / vocabulary
                rest = even * (1 - vocabulary)  # 0 with a vocabulary of 1
            if z_loss is not None:
                bend = 2.0 * z_loss * lse
            terms = (top, 1.0 / total, g, even, rest, bend)
            word = y.to(tl.int32)
            whole = vocabulary // BLOCK_V * BLOCK_V
            for first in range(0, whole, BLOCK_V):
                store_gradient(row, first, word, terms, smoothing, z_loss, BLOCK_V, False)
            if whole < vocabulary:
                store_gradient(row, whole, word, terms, smoothing, z_loss, BLOCK_V, True)
