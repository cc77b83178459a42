"""A backend with kernels for every gradient, which counts how often they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyfuse import dispatch
from pyfuse.backends import BACKENDS, eager
from pyfuse.dispatch import Gradient, Impl


class Recorder:
    """A backend whose kernels are the formula in float64, out of autograd's sight; it counts their calls.

    They save the first result (o, y), which autograd must not find in a cycle, or nothing.
    """

    def __init__(self, saves: bool = True, restores: bool = True) -> None:
        self.saves, self.restores = saves, restores
        self.calls: list[str] = []
        self.objection: str | None = None
        gradient = {op: self._gradient(op) for op in eager.OPS}
        self.OPS = {
            op: Impl(self._forward(op), lambda *_, **__: None, gradient[op]) for op in eager.OPS
        }

    def why_unavailable(self) -> None:
        return None

    def _forward(self, op: str) -> Callable[..., Any]:
        def forward(*tensors: Any, **options: Any) -> Any:
            self.calls.append(f"{op} forward")
            return _in_float64(op, tensors, options)

        return forward

    def _gradient(self, op: str) -> Gradient:
        def forward(*tensors: Any, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
            result = self.OPS[op].fn(*tensors, **options)
            return result, restore(tuple(result) if isinstance(result, tuple) else (result,))

        def restore(results: tuple[Tensor, ...], *_: Any) -> tuple[Tensor, ...]:
            return results[:1] if self.saves else ()

        def backward(
            grads: Any, tensors: Any, options: Any, saved: Any, needs: frozenset[str]
        ) -> dict[str, Tensor]:
            self.calls.append(f"{op} backward")
            assert not torch.is_grad_enabled()
            assert [type(t) for t in saved] == [Tensor] * self.saves
            return _gradients_in_float64(op, grads, tensors, options, needs)

        return Gradient(
            forward, backward, lambda *_, **__: self.objection, restore if self.restores else None
        )


def _wide(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _in_float64(op: str, tensors: Any, options: Any) -> Any:
    fn = eager.OPS[op].fn
    dtypes = [r.dtype for r in _tuple(fn(*tensors, **options))]
    wide = _tuple(fn(*map(_wide, tensors), **{name: _wide(x) for name, x in options.items()}))
    # New memory for each, that of o as a view.
    results = tuple(_copy(r.detach().to(d)) for r, d in zip(wide, dtypes, strict=True))
    return results[0] if len(results) == 1 else results


def _copy(r: Tensor) -> Tensor:
    return r.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _gradients_in_float64(
    op: str, grads: Any, tensors: Any, options: Any, needs: frozenset[str]
) -> dict[str, Tensor]:
    names = dispatch.tensor_names(op)[: len(tensors)]
    arguments = {
        k: _wide(x) for k, x in {**dict(zip(names, tensors, strict=True)), **options}.items()
    }
    leaves = {name: arguments[name].clone().requires_grad_() for name in sorted(needs)}
    arguments |= leaves
    with torch.enable_grad():
        results = _tuple(eager.OPS[op].fn(**arguments))
    flows = [(r, _wide(g)) for r, g in zip(results, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [r for r, _ in flows], list(leaves.values()), [g for _, g in flows], materialize_grads=True
    )
    given = dict(zip(names, tensors, strict=True)) | options
    return {name: g.to(given[name].dtype) for name, g in zip(leaves, found, strict=True)}


@contextmanager
def only_backends(**modules: Any) -> Iterator[None]:
    """These backends before eager, and no others."""
    before = dict(BACKENDS)
    known = (dispatch.load, dispatch._unavailable, dispatch._offer)

    BACKENDS.clear()
    for name, module in modules.items():
        BACKENDS[name] = f"pyfuse_test_{name}"
        sys.modules[BACKENDS[name]] = module
    BACKENDS["eager"] = before["eager"]
    for cached in known:
        cached.cache_clear()
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[f"pyfuse_test_{name}"]
        BACKENDS.clear()
        BACKENDS.update(before)
        for cached in known:
            cached.cache_clear()
