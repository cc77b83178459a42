"""Which backend runs an operation, and why the others do not.

The first backend of ``BACKENDS`` without an objection is taken. A backend that the caller names
(``backend=``, :func:`use_backend` or the environment variable ``PYFUSE_BACKEND``, in this order)
never falls back: it runs, or the call raises with its reason.

Gradients: the kernels compute values only. When a call needs more (autograd, a functorch transform
such as ``vmap`` or ``jvp``, forward-mode AD) it runs the eager formula, which is plain differentiable torch
and so right for every such use, second derivatives included.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from pyfuse.backends import BACKENDS


class Gradient(NamedTuple):
    """How one operation of one backend is differentiated by kernels.

    Arguments are those of the operation: positional ``tensors`` and keyword ``options``, checked.
    """

    # (*tensors, **options) -> (result as fn returns it, saved): what backward needs beside the arguments.
    forward: Callable[..., tuple[Any, tuple[torch.Tensor | None, ...]]]
    # (grads, tensors, options, saved, needs) -> {argument's name: its gradient} for every name in needs.
    # grads: one for each tensor of the result, None where nothing depends on it. A gradient has its argument's
    # shape and dtype.
    backward: Callable[..., dict[str, torch.Tensor]]
    # (needs, *tensors, **options) -> why these kernels cannot differentiate this call; None if they can.
    why_not: Callable[..., str | None]


class Impl(NamedTuple):
    """One operation of one backend. All take the operation's tensors and options, without ``backend``."""

    fn: Callable[..., Any]
    why_not: Callable[..., str | None]
    gradient: Gradient | None = None


@dataclass(frozen=True)
class Candidate:
    """One backend asked: ``reason`` is None for the one that runs."""

    backend: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The whole chain of backends asked for one call, in order, up to the one that runs."""

    op: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str | None:
        last = self.candidates[-1]
        return last.backend if last.reason is None else None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can run it'}"]
        lines += [f"  {c.backend}: {c.reason or 'runs'}" for c in self.candidates]
        return "\n".join(lines)


_named: ContextVar[str | None] = ContextVar("pyfuse_backend", default=None)
_explaining: ContextVar[bool] = ContextVar("pyfuse_explaining", default=False)


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, needs one of {', '.join(BACKENDS)}")
    return name


# Read once; a wrong name is reported by the first call, so that `pyfuse doctor` still runs.
_default_name = os.environ.get("PYFUSE_BACKEND") or None


def _name_of(backend: str | None) -> str | None:
    """The backend that the caller names: by argument, by context or in the environment."""
    if backend is not None:
        return _checked_name(backend, "backend")
    named = _named.get()
    if named is None and _default_name is not None:
        return _checked_name(_default_name, "PYFUSE_BACKEND")
    return named


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every pyfuse operation runs on the backend ``name``, or raises."""
    token = _named.set(_checked_name(name, "use_backend"))
    try:
        yield
    finally:
        _named.reset(token)


@cache
def load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


@cache
def _unavailable(name: str) -> str | None:
    reason: str | None = load(name).why_unavailable()
    return reason


def backend_status() -> dict[str, str | None]:
    """For each backend, None if it can run on this machine, else the reason why not."""
    return {name: _unavailable(name) for name in BACKENDS}


def formula_reason(tensors: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Why this call has to run the differentiable eager formula; None if a kernel's values will do."""
    # Not peek_interpreter_stack(): Dynamo folds that to a constant "not None".
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform needs the differentiable formula"
    if forward_ad._current_level >= 0:
        return "forward-mode AD needs the differentiable formula"
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return "a gradient is wanted, and this backend has no backward yet"
        for t in options.values():
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return "a gradient is wanted, and this backend has no backward yet"
    return None


@cache
def _offer(name: str, op: str) -> Impl | str:
    """What the backend ``name`` has for ``op``, or the reason why it never runs it on this machine."""
    reason = _unavailable(name)
    if reason is not None:
        return reason
    impl: Impl | None = load(name).OPS.get(op)
    return f"does not implement {op}" if impl is None else impl


def _ask(
    name: str, op: str, tensors: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Impl | None, str | None]:
    """(the implementation, None) if this backend runs the call, else (None, its reason)."""
    offer = _offer(name, op)
    if isinstance(offer, str):
        return None, offer
    reason = None if name == "eager" else formula_reason(tensors, options)
    if reason is None:
        reason = offer.why_not(*tensors, **options)
    return (offer, None) if reason is None else (None, reason)


def choose(op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Impl:
    """The implementation that runs this call; NotImplementedError with every reason if there is none."""
    named = _name_of(backend)
    reasons = []
    for name in BACKENDS if named is None else (named,):
        impl, reason = _ask(name, op, tensors, options)
        if impl is not None:
            return impl
        reasons.append(f"\n  {name}: {reason}")
    raise NotImplementedError(f"no backend can run {op}:{''.join(reasons)}")


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack


def _plain(tensors: tuple[Any, ...]) -> bool:
    """No tensor subclass (FakeTensor, DTensor, ...), no lazy negation (``x.imag`` of a conjugate) and no dispatch
    mode: memory can be handed to a kernel as it is."""
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return _modes() == 0


def run(op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Any:
    """Run a checked call of ``op``: straight to a backend, or as a torch.library operator in a graph."""
    compiling = _is_compiling()
    if not compiling and _explaining.get():
        raise _Explained(_ask_all(op, tensors, options, backend))
    if compiling or not _plain(tensors):
        from pyfuse.ops import _library

        # use_backend() is a context variable, which a graph cannot read: the operator asks it when it runs.
        named = backend or _default_name
        if op in _library.SCHEMAS and formula_reason(tensors, options) is None and named != "eager":
            return _library.call(op, tensors, options, named)
        from pyfuse.backends import eager

        return eager.OPS[op].fn(*tensors, **options)
    return choose(op, tensors, options, backend).fn(*tensors, **options)


class _Explained(Exception):
    """Carries the answer of :func:`explain` out of the operation that it called."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def _ask_all(
    op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None
) -> Explanation:
    named = _name_of(backend)
    candidates = []
    for name in BACKENDS if named is None else (named,):
        _, reason = _ask(name, op, tensors, options)
        candidates.append(Candidate(name, reason))
        if reason is None:
            break
    return Explanation(op, tuple(candidates))


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, and the reason of each one passed over.

    ``op`` is a public operation of pyfuse or its name. The arguments are checked as in the call
    itself (and raise alike); nothing is computed.
    """
    from pyfuse import ops

    fn = getattr(ops, op) if isinstance(op, str) else op
    token = _explaining.set(True)
    try:
        fn(*args, **kwargs)
    except _Explained as answer:
        return answer.explanation
    finally:
        _explaining.reset(token)
    raise TypeError(f"op: {fn!r} is not an operation of pyfuse")
