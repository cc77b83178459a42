"""Which backend runs an operation, and why the others do not.

The first backend of ``BACKENDS`` without an objection is taken. A backend that the caller names
(``backend=``, :func:`use_backend` or the environment variable ``PYFUSE_BACKEND``, in this order)
never falls back: it runs, or the call raises with its reason.

Gradients: a call of which autograd wants one runs on the first backend that has kernels for its forward
and its backward pass (:class:`Gradient`, run by :mod:`pyfuse.autograd`). Program transforms (functorch's
``vmap``, ``grad``, ``jvp``, ... and forward-mode AD) run the eager formula, which is plain differentiable
torch and so right for every such use; second derivatives go through it as well.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pyfuse.backends import BACKENDS
from pyfuse.guards import formula_reason, plain, values_only


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
    # (results, tensors, options) -> what forward saves, from the tensors of the result (those of attention with
    # its lse), of any backend. A compiled graph keeps nothing else; without it forward runs again there.
    restore: Callable[..., tuple[torch.Tensor | None, ...]] | None = None
    # (result, tensors, options) -> what backward (and the formula's derivatives) are given in the place of the tensors,
    # and autograd keeps: where a result that lives on anyway, or shapes without memory, serve as well.
    keep: Callable[..., tuple[torch.Tensor | None, ...]] | None = None


class Impl(NamedTuple):
    """One operation of one backend. All take the operation's tensors and options, without ``backend``."""

    fn: Callable[..., Any]
    why_not: Callable[..., str | None]
    gradient: Gradient | None = None
    # (gradient wanted, *tensors, **options) -> why the backend after this one is the better choice, if it can run the
    # call; None if it is not. Asked only where the caller names no backend.
    yields: Callable[..., str | None] | None = None


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
    # The arguments whose gradient is wanted: forward and backward are chosen together.
    needs: tuple[str, ...] = ()

    @property
    def chosen(self) -> str | None:
        last = self.candidates[-1]
        return last.backend if last.reason is None else None

    def __str__(self) -> str:
        gradient = f", with the gradient of {', '.join(self.needs)}" if self.needs else ""
        lines = [f"{self.op}{gradient}: {self.chosen or 'no backend can run it'}"]
        lines += [f"  {c.backend}: {c.reason or 'runs'}" for c in self.candidates]
        return "\n".join(lines)


# Other tracers come with tensors or modes of their own.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
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


@cache
def tensor_names(op: str) -> tuple[str, ...]:
    """The names of the positional tensors of ``op``: its formula's arguments, in order."""
    return tuple(inspect.signature(load("eager").OPS[op].fn).parameters)


@cache
def tensor_options(op: str) -> tuple[str, ...]:
    """The names of the options of ``op`` that may be tensors."""
    parameters = inspect.signature(load("eager").OPS[op].fn).parameters.values()
    named = (p for p in parameters if p.kind is p.KEYWORD_ONLY)
    return tuple(p.name for p in named if "Tensor" in p.annotation)


class Demand(NamedTuple):
    """What a call has to give beside its values."""

    needs: frozenset[str] = frozenset()  # the arguments whose gradient autograd may ask for
    formula: str | None = None  # why only the differentiable formula will do


VALUES = Demand()


def _demand(op: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> Demand:
    formula = formula_reason()
    if formula is not None:
        return Demand(formula=formula)
    if not torch.is_grad_enabled():
        return VALUES
    names = tensor_names(op)
    needs = [names[i] for i, t in enumerate(tensors) if t is not None and t.requires_grad]
    for name in tensor_options(op):
        t = options[name]
        if isinstance(t, torch.Tensor) and t.requires_grad:
            needs.append(name)
    return Demand(frozenset(needs)) if needs else VALUES


@cache
def _offer(name: str, op: str) -> Impl | str:
    """What the backend ``name`` has for ``op``, or the reason why it never runs it on this machine."""
    reason = _unavailable(name)
    if reason is not None:
        return reason
    impl: Impl | None = load(name).OPS.get(op)
    return f"does not implement {op}" if impl is None else impl


def _why_not(
    name: str, offer: Impl | str, tensors: tuple[Any, ...], options: dict[str, Any], demand: Demand
) -> str | None:
    """Why the backend of this offer cannot run the call; None if it can."""
    if isinstance(offer, str):
        return offer
    if name == "eager" or demand is VALUES:  # eager is the formula itself
        return offer.why_not(*tensors, **options)
    if demand.formula is not None:
        return demand.formula
    if offer.gradient is None:
        return _no_gradient(demand.needs)
    reason = offer.why_not(*tensors, **options)
    return reason or offer.gradient.why_not(demand.needs, *tensors, **options)


@cache
def _no_gradient(needs: frozenset[str]) -> str:
    return f"its kernels do not compute the gradient of {', '.join(sorted(needs))} yet"


def choose(
    op: str,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    backend: str | None,
    demand: Demand = VALUES,
) -> Impl:
    """The implementation that runs this call; NotImplementedError with every reason if there is none."""
    # use_backend() has checked its name; this spares most calls a function.
    named = _named.get() if backend is None and _default_name is None else _name_of(backend)
    reasons = []
    waiting = None  # the backend before, which yields to this one
    for name in BACKENDS if named is None else (named,):
        offer = _offer(name, op)
        if demand is VALUES and not isinstance(offer, str):  # in most calls
            reason = offer.why_not(*tensors, **options)
        else:
            reason = _why_not(name, offer, tensors, options, demand)
        if reason is None:
            assert not isinstance(offer, str)
            if waiting is None and offer.yields is not None and named is None:
                reason = offer.yields(bool(demand.needs), *tensors, **options)
                if reason is not None:
                    waiting = offer
                    continue
            return offer
        if waiting is not None:
            return waiting
        reasons.append(f"\n  {name}: {reason}")
    raise NotImplementedError(f"no backend can run {op}:{''.join(reasons)}")


def run(op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Any:
    """Run a checked call of ``op``: straight to a backend, or as a torch.library operator in a graph."""
    if not _is_dynamo_compiling():
        if _explaining.get():
            raise _Explained(_ask_all(op, tensors, options, backend))
        optional = tensor_options(op)
        if values_only(tensors, options, optional):
            return choose(op, tensors, options, backend).fn(*tensors, **options)
        if plain(tensors) and plain([options[name] for name in optional]):
            return _run_on_demand(op, tensors, options, backend)
    from pyfuse.ops import _library

    # use_backend() is a context variable, which a graph cannot read: the operator asks it when it runs.
    return _library.run(op, tensors, options, backend or _default_name)


def _run_on_demand(
    op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None
) -> Any:
    """Run a call whose gradient is wanted, or which is part of a program transform."""
    demand = _demand(op, tensors, options)
    impl = choose(op, tensors, options, backend, demand)
    if impl.gradient is None or not demand.needs:
        return impl.fn(*tensors, **options)
    from pyfuse import autograd

    return autograd.run(op, impl.gradient, demand.needs, tensors, options)


class _Explained(Exception):
    """Carries the answer of :func:`explain` out of the operation that it called."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def _ask_all(
    op: str, tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None
) -> Explanation:
    demand, named = _demand(op, tensors, options), _name_of(backend)
    candidates: list[Candidate] = []
    waiting = None
    for name in BACKENDS if named is None else (named,):
        offer = _offer(name, op)
        reason = _why_not(name, offer, tensors, options, demand)
        if reason is None and waiting is None and named is None:
            assert not isinstance(offer, str)
            better = offer.yields and offer.yields(bool(demand.needs), *tensors, **options)
            if better:
                waiting, reason = name, f"can, but the next goes first: {better}"
        candidates.append(Candidate(name, reason))
        if reason is None:
            break
        if waiting not in (None, name):
            candidates.append(Candidate(str(waiting), None))
            break
    return Explanation(op, tuple(candidates), tuple(sorted(demand.needs)))


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
