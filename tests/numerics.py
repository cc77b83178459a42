"""The accuracy rule: a kernel is held to the error that plain torch makes in the same dtype.

Truth is the eager formula in float64, on the same (already rounded) inputs. Over all elements:

    largest error  <=  2 (gradients: 3) x eager's largest error  +  2 ulp of the largest value
    mean error     <=  1.5 x eager's mean error  +  1/4 ulp of the mean value

The last terms are for where eager happens to be exact: a quarter of an ulp is the mean error of
rounding once. The mean sees a bias that the maximum hides; it is asked of 32 elements and more, since
the mean of eager's three errors for three sinks is luck.
For float64 eager is the truth itself, so its own rounding is allowed for: 64 ulp.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["output", "gradient"]

_MAX_FACTOR: dict[Kind, float] = {"output": 2.0, "gradient": 3.0}
_MEAN_FACTOR = 1.5
_ULPS, _MEAN_ULPS = 2.0, 0.25
_FLOAT64_ULPS = 64.0
_MEAN_NEEDS = 32
_RANDOM_FACTOR = 3.0


def check(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    name: str,
    kind: Kind = "output",
    random: bool = False,
) -> None:
    """Assert the rule for `actual`; `eager` was computed in its dtype, `exact` in float64.

    random: one of very many cases, drawn by chance. Some are so small, or have sums that cancel so far, that
    eager's error is luck: both budgets are three times as large then.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, needs {eager.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the truth is in {exact.dtype}, needs float64"
    actual, exact, eager = _finite_alike(actual.detach(), exact.detach(), eager.detach(), name)
    if exact.numel() == 0:
        return
    error, own = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    eps, wide = torch.finfo(actual.dtype).eps, actual.dtype == torch.float64
    largest_ulps, mean_ulps = (_FLOAT64_ULPS,) * 2 if wide else (_ULPS, _MEAN_ULPS)
    largest = _MAX_FACTOR[kind] * own.max().item() + largest_ulps * eps * exact.abs().max().item()
    mean = _MEAN_FACTOR * own.mean().item() + mean_ulps * eps * exact.abs().mean().item()
    if random:
        largest, mean = _RANDOM_FACTOR * largest, _RANDOM_FACTOR * mean
    where = int(error.argmax())
    assert error.max().item() <= largest, (
        f"{name}: largest error {error.max().item():.2e}, budget {largest:.2e} (eager: "
        f"{own.max().item():.2e}), at element {where} of the finite ones: "
        f"{actual[where].item():.6g}, needs {exact[where].item():.6g}"
    )
    assert error.numel() < _MEAN_NEEDS or error.mean().item() <= mean, (
        f"{name}: mean error {error.mean().item():.2e}, budget {mean:.2e} "
        f"(eager: {own.mean().item():.2e})"
    )


def _finite_alike(
    actual: Tensor, exact: Tensor, eager: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The elements where the truth is finite; the others (lse of an empty row) must be equal."""
    finite = exact.isfinite()
    wrong = ~finite & ~torch.isclose(actual.double(), exact, equal_nan=True)
    lost = finite & ~actual.isfinite()
    assert not wrong.any(), f"{name}: {int(wrong.sum())} elements differ from a truth of inf or NaN"
    assert not lost.any(), (
        f"{name}: {int(lost.sum())} of {actual.numel()} elements are NaN or inf, the first at "
        f"{lost.nonzero()[0].tolist()}"
    )
    return actual[finite], exact[finite], eager[finite]


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal in every bit of every element, NaN and the sign of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    size = actual.element_size()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    a, b = actual.contiguous().view(bits), expected.contiguous().view(bits)
    assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"
