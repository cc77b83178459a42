"""Choosing tokens by their logits: the likeliest, or drawn; and their log-probabilities.

From the weights on everything is exact arithmetic of integers, so a token depends on its row's logits, seed and step
alone: not on the batch, its order, the threads or the device. This is the definition that the native kernel
(csrc/cpu/sample.cpp) and the tensors below share; typical-p is with the latter alone.

1. Temperature: x = logits / temperature, of float32 numbers.
2. top-k: x below the k-th largest become -inf, so equals of that one stay.
3. Weight of token i, with d = max(x[i] - max x, -32), all in float32 and every operation rounded (no fused ones):
       y = d · LOG2_E;   n = round(y), half to even;   f = y - n
       e = 1 + f·((C[0] + C[1]·f) + (f·f)·((C[2] + C[3]·f) + (f·f)·(C[4] + C[5]·f)))
       weight = (integer(e · 2^24) · 2^16) >> -n, of 64 bits
   That is exp(d) · 2^40, the error of which is below 1e-7 · 2^40. Less than 2^-40 of the likeliest becomes nothing.
4. top-p, in falling order of x, of equals the lower id first: tokens are dropped from which on those before weigh
   integer(top_p · float64(sum of weights)) or more; the first one always stays.
5. min-p: tokens that weigh less than ceil(min_p · 2^40) are dropped.
6. typical-p, with q = weight / sum and information I[i] = ln(sum / 2^40) - (x[i] - max x) = -ln q in float64: in rising
   order of |I - sum(q · I)|, of equals the lower id first, the first tokens that together weigh integer(typical_p ·
   float64(sum)) or more stay, with all that are as far away as the last of them; the others are dropped.
7. The token is the first id, in rising order, at which the running sum of the weights left exceeds (u · sum) >> 64.
   u is 64 bits of Philox4x32-10 with the key (seed mod 2^32, sequence) and the counter (step, 0, 0, seed >> 32): its
   first word is the high half, its second the low one.

These are Hugging Face's processors but for their rounding, and for the order of equals in top-p, which they leave open.
The largest x stays in 2, 4 and 5, so that weights are the same before and after; 7 takes the maximum of what is left.

Log-probabilities are ln softmax of the logits of the model, before any processor and temperature:
(x[i] - max x) - ln(sum of weights / 2^40) in float64, the error of which is below 5e-7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import cpu_sample
from pyfuse.backends.cpu_sample import ONE
from pyfuse.generation.options import Options
from pyfuse.philox import philox4x32

MOST_TOKENS = 1 << 22  # of a vocabulary: the sum of all weights has to fit into 63 bits

# Of float32: log2 e, and 2^f for |f| ≤ 1/2 with a relative error below 2e-8.
LOG2_E = 1.442695
C = (0.6931472, 0.24022648, 0.055503324, 0.009618438, 0.0013398888, 0.00015353352)
_LEAST = -32.0
_WORD = 0xFFFFFFFF

Seeds = Sequence[tuple[int, int]]  # of each row: (seed, which of the sequences with this seed)
_GREEDY, _AS_THEY_ARE = Options(), Options(temperature=1.0)


class Logprob(NamedTuple):
    """ln p of a token by the model's own logits; `top`: the likeliest, best first (of equals the lower id)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Drawn(NamedTuple):
    """A token for each row, and what options.logprobs asks to know of it."""

    tokens: list[int]
    logprobs: list[Logprob] | None


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """TypeError, ValueError: not float32 [R, V]."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype != torch.float32:
        raise TypeError(f"{name}: got {logits.dtype}, needs torch.float32")
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MOST_TOKENS:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, needs [R, V], 1 ≤ V ≤ 2^22")


def sample(
    logits: Tensor, options: Options, seeds: Seeds, steps: Sequence[int], raw: Tensor | None = None
) -> Drawn:
    """All of it at once: a token of each row, the likeliest or drawn, by temperature, top_k, top_p, min_p, typical_p.

    logits: float32 [R, V], penalized; seeds and steps as for `draw`. raw: the model's own, which log-probabilities are
    taken of, where they differ. Equal to `draw(warp(logits, options), seeds, steps)`, or `greedy(logits)`, and
    `log_probabilities(raw, ...)`; on a CPU it is one native call, without a sort. ValueError as `draw`.
    """
    check_logits(logits)
    raw = logits if raw is None else raw
    if raw is not logits:
        check_logits(raw, "raw")
        if raw.shape != logits.shape:
            raise ValueError(f"raw: got shape {tuple(raw.shape)}, needs {tuple(logits.shape)}")
    _check_rows(logits, seeds, steps)
    if logits.shape[0] == 0:
        return Drawn([], None if options.logprobs is None else [])
    typical = options.typical_p is not None and options.typical_p < 1.0
    if typical or cpu_sample.why_not_sample(logits, raw) is not None:
        return by_tensors(logits, options, seeds, steps, raw)
    tokens, logprobs = cpu_sample.sample(
        logits,
        seeds,
        steps,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        raw=None if options.logprobs is None else raw,
        top=options.logprobs or 0,
    )
    return Drawn(tokens, None if logprobs is None else [Logprob(*row) for row in logprobs])


def by_tensors(
    logits: Tensor, options: Options, seeds: Seeds, steps: Sequence[int], raw: Tensor
) -> Drawn:
    """The same of checked arguments, on any device."""
    warped = warp(logits, options)
    tokens = _draw(warped, seeds, steps) if options.samples else _likeliest_of_each(warped)
    if options.logprobs is None:
        return Drawn(tokens, None)
    return Drawn(tokens, log_probabilities(raw, tokens, options.logprobs))


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row, of equals the lowest. logits: float32 [R, V]; ValueError as `draw`."""
    check_logits(logits)
    rows = logits.shape[0]
    return sample(logits, _GREEDY, [(0, 0)] * rows, [0] * rows).tokens


def draw(logits: Tensor, seeds: Seeds, steps: Sequence[int]) -> list[int]:
    """A token of each row, drawn with the probabilities softmax(logits).

    logits: float32 [R, V], processed: -inf where a token cannot be. seeds[r]: (seed, sequence), as many bits of each as
    64 and 32. steps[r]: how many tokens the row has drawn before. ValueError: a logit is NaN or +inf, or all of a row's
    are -inf.
    """
    return sample(logits, _AS_THEY_ARE, seeds, steps).tokens


def _likeliest_of_each(logits: Tensor) -> list[int]:
    ids: list[int] = _checked_max(logits).indices.tolist()
    return ids


def _draw(logits: Tensor, seeds: Seeds, steps: Sequence[int]) -> list[int]:
    sums = weights(logits).cumsum(1)
    totals: list[int] = sums[:, -1].tolist()
    words = random_words(seeds, steps)
    targets = [(u * total) >> 64 for u, total in zip(words, totals, strict=True)]
    target = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    ids: list[int] = torch.searchsorted(sums, target[:, None], right=True)[:, 0].tolist()
    return ids


def log_probabilities(logits: Tensor, tokens: Sequence[int], top: int = 0) -> list[Logprob]:
    """Of one token of each row, and of the `top` likeliest. logits: float32 [R, V], those of the model."""
    check_logits(logits)
    if logits.shape[0] == 0:
        return []
    largest = _checked_max(logits).values[:, None].double()
    ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    if top > 0:
        ids = torch.cat([ids, torch.stack([_likeliest(row, top) for row in logits])], 1)
    below = logits.gather(1, ids).double() - largest
    total = weights(logits).sum(1).double() / ONE
    rows = []
    for row, x, t in zip(ids.tolist(), below.tolist(), total.tolist(), strict=True):
        token, *best = zip(row, (value - math.log(t) for value in x), strict=True)
        rows.append(Logprob(*token, tuple(best)))
    return rows


def _likeliest(x: Tensor, count: int) -> Tensor:
    """Ids of the largest of x [V], of equals the lower ones first; topk leaves that open."""
    ids = (x >= x.topk(count).values[-1]).nonzero()[:, 0]
    return ids[x[ids].sort(descending=True, stable=True).indices[:count]]


def warp(logits: Tensor, options: Options) -> Tensor:
    """Temperature, top-k, top-p, min-p and typical-p of float32 [R, V]; as they are where nothing is drawn."""
    if not options.samples or logits.numel() == 0:
        return logits
    assert options.temperature is not None
    # The divisor is a tensor there: by a number, GPUs multiply its reciprocal.
    x = logits / torch.tensor(options.temperature, dtype=logits.dtype, device=logits.device)
    if options.top_k is not None and options.top_k < x.shape[1]:
        least = x.topk(options.top_k).values[:, -1:]
        x = x.masked_fill(x < least, -math.inf)
    if options.top_p is not None and options.top_p < 1.0:
        x = _top_p(x, options.top_p)
    if options.min_p is not None:
        x = x.masked_fill(weights(x) < math.ceil(options.min_p * ONE), -math.inf)
    if options.typical_p is not None and options.typical_p < 1.0:
        x = _typical(x, options.typical_p)
    return x


def _share(w: Tensor, share: float) -> Tensor:
    """[R, 1]: what a share of all weights [R, V] comes to."""
    return (w.sum(1, keepdim=True).double() * share).long()


def _top_p(x: Tensor, p: float) -> Tensor:
    order = x.sort(dim=1, descending=True, stable=True).indices
    w = weights(x).gather(1, order)
    dropped = w.cumsum(1) - w >= _share(w, p)
    dropped[:, 0] = False
    return x.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), -math.inf)


def _typical(x: Tensor, p: float) -> Tensor:
    w = weights(x)
    total = w.sum(1, keepdim=True).double()
    largest = x.amax(1, keepdim=True).double()
    information = (total / ONE).log() - (x.double() - largest)  # -ln p
    terms = torch.where(w > 0, w / total * information, 0.0)
    entropy = terms.cumsum(1)[:, -1:]  # what sum() gives depends on the threads
    distance, order = (information - entropy).abs().sort(dim=1, stable=True)
    before = w.gather(1, order).cumsum(1) < _share(w, p)
    last = before.sum(1, keepdim=True).clamp_(max=x.shape[1] - 1)
    dropped = distance > distance.gather(1, last)
    return x.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), -math.inf)


def weights(x: Tensor) -> Tensor:
    """int64 [R, V] ≥ 0, in proportion to softmax(x), the largest being ONE; see step 3. ValueError as `draw`."""
    d = x - _checked_max(x).values[:, None]
    y = d.clamp_(min=_LEAST) * LOG2_E
    n = y.round()
    f = y - n
    f2 = f * f
    e = (C[0] + C[1] * f) + f2 * ((C[2] + C[3] * f) + f2 * (C[4] + C[5] * f))
    return (((1.0 + f * e) * (1 << 24)).long() << 16) >> -n.long()


def random_words(seeds: Seeds, steps: Sequence[int]) -> list[int]:
    """The 64 random bits of each row's draw, see step 7."""
    columns = [
        (step, seed & _WORD, seed >> 32, sequence)
        for (seed, sequence), step in zip(seeds, steps, strict=True)
    ]
    step, low, high, sequence = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).unbind(1)
    zero = torch.zeros_like(step)
    first, second, _, _ = philox4x32((step, zero, zero, high), (low, sequence))
    return [a << 32 | b for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def _check_rows(logits: Tensor, seeds: Seeds, steps: Sequence[int]) -> None:
    for name, given in (("seeds", seeds), ("steps", steps)):
        if len(given) != logits.shape[0]:
            raise ValueError(f"{name}: got {len(given)}, but logits has {logits.shape[0]} rows")
    for seed, sequence in seeds:
        if not (0 <= seed < 1 << 64 and 0 <= sequence <= _WORD):
            raise ValueError(f"seeds: got {(seed, sequence)}, needs less than 2^64 and 2^32")
    for step in steps:
        if not 0 <= step <= _WORD:
            raise ValueError(f"steps: got {step}, needs at least 0 and less than 2^32")


def _checked_max(logits: Tensor) -> torch.return_types.max:
    """Of each row, and the first token that has it. ValueError where it is not finite; NaN would be it."""
    largest = logits.max(1)
    right = largest.values.isfinite()
    if not bool(right.all()):
        row = right.tolist().index(False)
        raise ValueError(f"logits: {_bad(float(largest.values[row]))} in row {row}")
    return largest


def _bad(largest: float) -> str:
    if math.isnan(largest):
        return "NaN"
    return "+inf" if largest > 0 else "nothing but -inf, so no token is left,"
