"""Rotary embedding in models whose attention calls ``apply_rotary_pos_emb``.

The attention forward of each instance is rebound to a copy of itself whose global
``apply_rotary_pos_emb`` is pyfuse's, so that no other model and no file of transformers is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse.dispatch import run
from pyfuse.hf.guards import values_only
from pyfuse.hf.state import bind
from pyfuse.ops.rope import rope

NAME = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[Tensor, Tensor]]


def uses_rope(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and NAME in code.co_names


def patch_rope(module: nn.Module) -> str | None:
    """Rebind this attention's forward; the reason if it stays as it is."""
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    cls: Any = type(module)
    rebound = rebound_forward(cls)
    if rebound is None:
        return "its apply_rotary_pos_emb is not the half-split rotation of q and k"
    bind(module, "forward", rebound)
    return None


@cache
def rebound_forward(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """``cls.forward`` on pyfuse's rotation; None if its own is not the half-split one."""
    forward = cls.forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    original = forward.__globals__.get(NAME)
    if original is None or not _rotates_halves(original):
        return None
    # Without a __name__: a compiler would look up the names of a module's functions in that module.
    scope = {**forward.__globals__, NAME: fused_rotation(original)}
    del scope["__name__"]
    copied = FunctionType(
        forward.__code__,
        scope,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    copied.__annotations__ = forward.__annotations__
    copied.__doc__ = forward.__doc__
    copied.__module__ = forward.__module__
    return copied


def _rotates_halves(function: Rotate) -> bool:
    """Whether function(q, k, cos, sin) is pyfuse.rope(layout="half") of both, on random numbers."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn((2, 3, 5, 8), generator=draw), torch.randn((2, 1, 5, 8), generator=draw)
    angle = torch.randn((2, 5, 4), generator=draw)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    try:
        theirs = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it takes other arguments, so it means something else
    if not (isinstance(theirs, tuple) and len(theirs) == 2):
        return False
    ours = tuple(rope(x, cos[..., :4], sin[..., :4], layout="half") for x in (q, k))
    return all(
        a.shape == b.shape and bool((a - b).abs().max() < 1e-5)
        for a, b in zip(theirs, ours, strict=True)
    )


class _Tables:
    """The halves of the last (cos, sin): a forward pass hands the same two to every layer."""

    last: tuple[Any, Any, Tensor, Tensor] | None = None


def halves(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor] | None:
    """cos, sin [B or 1, M, R] as pyfuse.rope's [B, M, R/2] or [M, R/2]; None: the halves differ."""
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or sin.shape != cos.shape:
        return None
    last = _Tables.last
    if last is not None and last[0] is cos and last[1] is sin:
        return last[2], last[3]
    half = cos.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    if not (torch.equal(c, cos[..., half:]) and torch.equal(s, sin[..., half:])):
        return None
    if cos.shape[0] == 1:
        c, s = c[0], s[0]
    _Tables.last = (cos, sin, c, s)
    return c, s


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inplace: bool
) -> tuple[Tensor, Tensor] | None:
    """q [B, Hq, M, D] and k [B, Hk, M, D] turned; None where pyfuse.rope_pair is not the formula."""
    if q.ndim != 4 or cos.shape[-1] != q.shape[-1] or not q.dtype == k.dtype == cos.dtype:
        return None
    if (
        k.shape[0] != q.shape[0]
        or k.shape[-1] != q.shape[-1]
        or not q.shape[-2] == k.shape[-2] == cos.shape[-2]
    ):
        return None
    tables = halves(cos, sin, q.shape[0])
    if tables is None:
        return None
    c, s = tables
    # Past the checks of pyfuse.rope_pair, whose conditions hold here: in decoding they would cost as
    # much as the rotation.
    options = {"layout": "half", "positions": None, "inplace": inplace}
    turned: tuple[Tensor, Tensor] = run("rope_pair", (q, k, c, s), options, None)
    return turned


@cache
def fused_rotation(original: Rotate) -> Rotate:
    """``original`` for values only, on pyfuse.rope."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs or not values_only(q) or not values_only(k):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin, inplace=False) or original(q, k, cos, sin)

    return apply_rotary_pos_emb
