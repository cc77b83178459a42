"""The checks that the attention operations share: their options against q, k and v."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Window = int | tuple[int | None, int | None] | None

_LENGTHS = (torch.int32, torch.int64)
_is_compiling = torch.compiler.is_compiling


def check_heads(dims: dict[str, int], k_name: str = "k") -> None:
    heads, groups = dims["Hq"], dims["Hk"]
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"{k_name}: Hk is {groups}, but q has Hq = {heads}, needs a divisor of it")


def resolve_window(window: Window) -> tuple[int, int] | None:
    """(left, right) with -1 for unbounded, or None if both are: the form that backends take."""
    if window is None:
        return None
    if isinstance(window, int):
        if window == 0 or window < -1:
            raise ValueError(f"window: got {window}, needs 1 or more keys (or -1 for no limit)")
        return None if window == -1 else (window - 1, 0)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window: expected None, an int or (left, right), got {window!r}")
    left, right = (-1 if side is None else side for side in window)
    for side in (left, right):
        if not isinstance(side, int):
            raise TypeError(f"window: expected two ints (or None), got {window!r}")
        if side < -1:
            raise ValueError(f"window: got {window!r}, needs sides of 0 or more (or -1: no limit)")
    return None if left == right == -1 else (left, right)


def resolve_scale(scale: float | None, d: int) -> float:
    """scale, or D**-0.5."""
    if scale is None:
        return d**-0.5 if d else 1.0
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a float, got a Tensor")
    return scale


def check_softcap(softcap: float) -> None:
    if not 0.0 < softcap < math.inf:  # not math.isfinite: Dynamo has no symbolic one
        raise ValueError(f"softcap: got {softcap}, needs a finite number above 0 (None for no cap)")


def check_dropout(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: got {p}, needs 0 <= dropout_p < 1")


def check_mask(mask: Tensor, q: Tensor, shape: tuple[int, int, int, int]) -> None:
    """bool, q's dtype or float32; sizes, counted from the last, 1 or those of [B, Hq, M, N]."""
    _check_tensor("mask", mask, q)
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        raise TypeError(
            f"mask: dtype {mask.dtype}, needs torch.bool (True = attend), or q's {q.dtype} "
            "or torch.float32 (added to the scores)"
        )
    given = mask.shape
    if len(given) <= 4:
        for size, full in zip(reversed(given), reversed(shape), strict=False):
            if size not in (1, full):
                break
        else:
            return
    raise ValueError(
        f"mask: shape {tuple(given)} does not broadcast to [B, Hq, M, N] = {tuple(shape)}"
    )


def check_per_head(name: str, values: Tensor, q: Tensor, heads: int) -> None:
    """sinks and alibi_slopes: [Hq], in q's dtype or float32."""
    _check_tensor(name, values, q)
    if values.shape != (heads,):
        raise ValueError(f"{name}: expected shape [Hq] = ({heads},), got {tuple(values.shape)}")
    if values.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name}: dtype {values.dtype}, needs q's {q.dtype} or torch.float32")


def check_scores(
    q: Tensor,
    heads: int,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    """What acts on the scores of any of the three."""
    if softcap is not None:
        check_softcap(softcap)
    if sinks is not None:
        check_per_head("sinks", sinks, q, heads)
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, q, heads)


def check_lengths(name: str, lengths: Tensor, q: Tensor, letter: str, size: int) -> None:
    """seqlens_k [B], or cu_seqlens [B+1]: int32 or int64."""
    _check_tensor(name, lengths, q)
    if lengths.shape != (size,):
        raise ValueError(
            f"{name}: expected shape [{letter}] = ({size},), got {tuple(lengths.shape)}"
        )
    check_integers(name, lengths)


def check_capacity(lengths: Tensor, capacity: int, new: int = 0) -> None:
    """No sequence is longer than the cache, nor shorter than the `new` keys that it is said to include.

    Looked at only where that costs no device sync and no graph break.
    """
    if (
        _is_compiling()
        or type(lengths) is not Tensor
        or not lengths.is_cpu
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or lengths.shape[0] == 0
    ):
        return
    values = lengths.tolist()  # two reductions would take longer than a short cache's attention
    high, low = max(values), min(values)
    if high > capacity:
        raise ValueError(
            f"seqlens_k: a sequence has {high} keys, but the cache has room for {capacity}"
        )
    if low < new:
        reason = f", the {new} of k_new included" if new else ""
        raise ValueError(f"seqlens_k: a sequence has {low} keys, needs {new} or more{reason}")


def check_integers(name: str, values: Tensor) -> None:
    if values.dtype not in _LENGTHS:
        raise TypeError(f"{name}: dtype {values.dtype}, needs torch.int32 or torch.int64")


def _check_tensor(name: str, value: Tensor, q: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != q.device:
        raise ValueError(f"{name}: on {value.device}, but q is on {q.device}")


def check_block_table(block_table: Tensor, q: Tensor) -> None:
    """[B, pages_per_seq], int32 or int64."""
    _check_tensor("block_table", block_table, q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table: expected shape [B, pages_per_seq] = ({q.shape[0]}, ...), "
            f"got {tuple(block_table.shape)}"
        )
    check_integers("block_table", block_table)
