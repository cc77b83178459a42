"""Autograd over the gradient kernels of a backend, and over the eager formula where a kernel will not do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyfuse.backends import eager
from pyfuse.dispatch import Gradient, tensor_names
from pyfuse.guards import plain, wants_second_derivatives

Gradients = dict[str, Tensor]


def run(
    op: str,
    gradient: Gradient,
    needs: frozenset[str],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Compute `op` by the forward kernels of `gradient`, to be differentiated by its backward kernels."""
    named = [name for name, x in options.items() if isinstance(x, Tensor)]
    values = (*tensors, *[options[name] for name in named])
    call = (op, gradient, needs, named)
    return _ByKernels.apply(call, tensors, options, *values)


class _ByKernels(torch.autograd.Function):
    """Only plain tensors come here, and never under a functorch transform: setup_context would cost 7 µs.

    `values` are all tensors of a call, for autograd to keep: it watches their versions, and hooks may move them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[str, Gradient, frozenset[str], list[str]],
        tensors: tuple[Any, ...],
        options: dict[str, Any],
        *values: Tensor | None,
    ) -> Any:
        _, gradient, _, named = call
        result, saved = gradient.forward(*tensors, **options)
        result, saved = _without_views(result, saved)
        ctx.call, ctx.positional = call, len(tensors)
        ctx.options = options.copy()
        for name in named:
            ctx.options[name] = None
        ctx.set_materialize_grads(False)
        if gradient.keep is not None:
            values = (*gradient.keep(result, tensors, options), *values[len(tensors) :])
        ctx.save_for_backward(*values, *saved)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op, gradient, needs, named = ctx.call
        count = ctx.positional
        end = count + len(named)
        if all(g is None for g in grads):
            return (None,) * (3 + end)
        kept = ctx.saved_tensors
        tensors, options = kept[:count], ctx.options.copy()
        options.update(zip(named, kept[count:end], strict=True))
        if wants_second_derivatives(grads) or not plain(grads):
            found = formula_gradients(op, tensors, options, grads, needs)
        else:
            found = gradient.backward(grads, tensors, options, kept[end:], needs)
        names = (*tensor_names(op)[:count], *named)
        return None, None, None, *[found[name] if name in needs else None for name in names]


def _without_views(result: Any, saved: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The same memory, but no result is a view (o is, of its [B, M, H, Dv] memory): autograd forbids a caller
    to write into a view that comes out of a custom function."""
    if isinstance(result, Tensor):
        if not result._is_view():
            return result, saved
        bare = {id(result): result.data}
        result = bare[id(result)]
    else:
        bare = {id(t): t.data for t in result}
        result = tuple(bare.values())
    return result, tuple([bare.get(id(t), t) for t in saved])


def formula_gradients(
    op: str,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    grads: tuple[Tensor | None, ...],
    needs: frozenset[str],
) -> Gradients:
    """The gradients by the eager formula, differentiable themselves where grad mode is on.

    They are taken with respect to aliases, so that one tensor given for two arguments counts apart for each.
    """
    device = next(t.device.type for t in tensors if t is not None)
    create_graph = torch.is_grad_enabled()
    # The casts of autocast belong to the forward pass, and are part of its graph there.
    as_cast = torch.autocast(device, enabled=False) if _autocast_enabled() else nullcontext()
    with torch.enable_grad(), as_cast:
        named = dict(zip(tensor_names(op), tensors, strict=False)) | options
        aliases = {name: named[name].view_as(named[name]) for name in sorted(needs)}
        for alias in aliases.values():
            if not alias.requires_grad:  # an operator's arguments are bare values
                alias.requires_grad_()
        tensors = tuple(aliases.get(n, t) for n, t in zip(tensor_names(op), tensors, strict=False))
        result = eager.OPS[op].fn(*tensors, **{n: aliases.get(n, x) for n, x in options.items()})
        results = (result,) if isinstance(result, Tensor) else result
        flows = [
            (r, g)
            for r, g in zip(results, grads, strict=True)
            if g is not None and r.requires_grad  # of rope_pair one result may depend on none
        ]
        if not flows:
            return {name: torch.zeros_like(alias) for name, alias in aliases.items()}
        found = torch.autograd.grad(
            [r for r, _ in flows],
            list(aliases.values()),
            [g for _, g in flows],
            create_graph=create_graph,
            materialize_grads=True,
        )
    return dict(zip(aliases, found, strict=True))


_autocast_enabled = torch._C._is_any_autocast_enabled
