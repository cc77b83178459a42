"""Arguments of the attention functions, as flash-attn has them, checked and put into pyfuse's terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def score_options(
    softmax_scale: float | None, causal: bool, window_size: Any, softcap: float
) -> dict[str, Any]:
    """The options of pyfuse's attention operations that these four are."""
    if softmax_scale is not None and not isinstance(softmax_scale, int | float):
        kind = type(softmax_scale).__name__
        raise TypeError(f"softmax_scale: expected a float or None, got {kind}")
    if not isinstance(softcap, int | float):
        raise TypeError(f"softcap: expected a float, got {type(softcap).__name__}")
    return {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": window(window_size),
        "softcap": None if softcap <= 0.0 else float(softcap),
    }


def window(window_size: Any) -> tuple[int, int] | None:
    """(left, right), where every negative number is no limit; None for no limit at all."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}")
    if not all(isinstance(side, int) for side in window_size):
        raise TypeError(f"window_size: expected two ints, got {window_size!r}")
    left, right = (max(side, -1) for side in window_size)
    return None if left == right == -1 else (left, right)


def check_heads(dims: dict[str, int], k_name: str) -> None:
    heads, groups = dims["Hq"], dims["Hk"]
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"{k_name}: Hk is {groups}, but q has Hq = {heads}, needs a divisor of it")


def check_slopes(slopes: Tensor | None, batch: int, heads: int) -> None:
    """[Hq] or [B, Hq]; pyfuse looks at the rest."""
    if slopes is None:
        return
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes: expected a torch.Tensor, got {type(slopes).__name__}")
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected [Hq] = ({heads},) or [B, Hq] = ({batch}, {heads}), got "
            f"{tuple(slopes.shape)}"
        )


def slopes_of_sequences(slopes: Tensor | None, batch: int) -> Tensor | None:
    """slopes [B, Hq] where each sequence has its own and there is one at all, else None."""
    return slopes if slopes is not None and slopes.dim() == 2 and batch > 0 else None


def check_integers(name: str, values: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Lengths, offsets or indices: int32 or int64, of that shape, on q's device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(values).__name__}")
    if values.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(values.shape)}")
    if values.dtype not in INTEGERS:
        raise TypeError(f"{name}: dtype {values.dtype}, needs torch.int32 or torch.int64")
    if values.device != device:
        raise ValueError(f"{name}: on {values.device}, but q is on {device}")


def check_range(name: str, values: Tensor, low: int, high: int, what: str) -> None:
    """All values from low to high; looked at only where that waits for no device."""
    if (
        torch.compiler.is_compiling()
        or type(values) is not Tensor
        or not values.is_cpu
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or values.numel() == 0
    ):
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        wrong = least if least < low else most
        raise ValueError(f"{name}: got {wrong}, needs {low} to {high}, {what}")


def check_longest(name: str, longest: Any) -> None:
    """max_seqlen: an int, or an integer tensor of one element, which is not read here."""
    if isinstance(longest, Tensor):
        if longest.numel() != 1 or longest.is_floating_point():
            raise TypeError(f"{name}: expected an int, got a tensor {tuple(longest.shape)}")
    elif not isinstance(longest, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(longest).__name__}")
    elif longest < 0:
        raise ValueError(f"{name}: got {longest}, needs 0 or more")


def check_probabilities(return_attn_probs: bool, dropout_p: float) -> None:
    if return_attn_probs and dropout_p > 0.0:
        raise NotImplementedError(
            "return_attn_probs: True beside dropout_p > 0 asks for the probabilities with their dropout, which are "
            "never in memory here; pass dropout_p=0.0 for softmax_lse alone"
        )


def check_packed(name: str, packed: Tensor, dims: int, count: int) -> None:
    """qkv or kv: `dims` dimensions, `count` tensors stacked in the last but two."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    layout = f"[B, S, {count}, H, D]" if dims == 5 else f"[T, {count}, H, D]"
    if packed.dim() != dims or packed.shape[-3] != count:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(packed.shape)}")


def dense(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension, copied only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()
