"""The operations as torch.library operators ``torch.ops.pyfuse.*``: what a compiled or exported graph holds.

Eager calls do not pass here (they would pay 5-10 µs for it): :func:`pyfuse.dispatch.run` comes here under
torch.compile, export and fake tensors only. Each operation is two operators, the second for autograd:

    <op>(tensors, options, backend) -> Tensor[]
    <op>_backward(grads, tensors, options, backend, results, needs) -> Tensor[]

Both choose the backend when they run; where none has kernels for a gradient, the operator differentiates
the eager formula: the graph is the same whatever runs it. Everything returns ``Tensor[]``, since some operations
return one or two tensors by option. No default values: the dispatcher would drop arguments equal to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyfuse import autograd, dispatch
from pyfuse.backends import eager
from pyfuse.guards import formula_reason, wants_gradient, wants_second_derivatives
from pyfuse.ops._fakes import FAKES

# Name -> arguments, with the names of the operation: its tensors in order, "*", its options. (The star is not in
# the operator's schema: torch.library differentiates positional tensors only.)
SCHEMAS: dict[str, str] = {
    "attention": "Tensor q, Tensor k, Tensor v, *, Tensor? mask, bool causal, SymInt[]? window, float? softcap, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? seqlens_k, float dropout_p, Tensor? dropout_seed, "
    "float? scale, bool return_lse",
    "varlen_attention": "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, bool causal, "
    "SymInt[]? window, float? softcap, Tensor? sinks, Tensor? alibi_slopes, float dropout_p, "
    "Tensor? dropout_seed, float? scale, bool return_lse",
    "decode_attention": "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_new, Tensor? v_new, *, "
    "Tensor seqlens_k, Tensor? block_table, bool causal, SymInt[]? window, float? softcap, Tensor? sinks, "
    "Tensor? alibi_slopes, float? scale, bool return_lse",
    "dropout": "Tensor x, *, float dropout_p, Tensor? dropout_seed, str? activation",
    "layer_norm": "Tensor x, Tensor? weight, Tensor? bias, *, float eps, Tensor? residual, bool prenorm, "
    "float dropout_p, Tensor? dropout_seed",
    "rms_norm": "Tensor x, Tensor? weight, *, float eps, Tensor? residual, bool prenorm, float dropout_p, "
    "Tensor? dropout_seed, str casting",
    "rope": "Tensor x, Tensor cos, Tensor sin, *, str layout, Tensor? positions, bool inplace",
    "rope_pair": "Tensor q, Tensor k, Tensor cos, Tensor sin, *, str layout, Tensor? positions, bool inplace",
    "embed": "Tensor token_ids, Tensor weight, *, Tensor? position_weight, bool sinusoidal, Tensor? positions, "
    "Tensor? segment_ids, Tensor? segment_weight, float scale, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, float dropout_p, Tensor? dropout_seed, bool sparse",
}
_POSITIONAL = {op: schema.split("*")[0].count("Tensor") for op, schema in SCHEMAS.items()}
_NAMES = {
    op: tuple(argument.split()[-1] for argument in schema.split(", ") if argument != "*")
    for op, schema in SCHEMAS.items()
}

_library = torch.library.Library("pyfuse", "DEF")


def run(op: str, tensors: tuple[Any, ...], options: dict[str, Any], named: str | None) -> Any:
    """Put the call into the graph: as an operator, or the formula where only that will do."""
    if formula_reason() is not None or named == "eager" or _only_as_formula(op, tensors, options):
        return eager.OPS[op].fn(*tensors, **options)
    if options.get("sparse", False) and wants_gradient(tensors, options):
        return eager.OPS[op].fn(*tensors, **options)  # an operator's gradient is dense
    in_place = options.get("inplace", False)
    if in_place:  # operators here do not alias: a copy at the end does it
        options = {**options, "inplace": False}
    with_lse = options.get("return_lse", True)
    if not with_lse and wants_gradient(tensors, options):
        options = {**options, "return_lse": True}  # the backward pass needs it
    results = getattr(torch.ops.pyfuse, op)(*tensors, **options, backend=named)
    if in_place:
        results = [x.copy_(y) for x, y in zip(tensors, results, strict=False)]
    return results[0] if len(results) == 1 or not with_lse else tuple(results)


def _only_as_formula(op: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """What no operator here can say: writing to an argument (a cache), or a DTensor or another wrapper of
    tensors, which knows torch's own operators only."""
    if op == "decode_attention" and tensors[3] is not None:
        return True
    given = (*tensors, *options.values())
    return any(isinstance(x, Tensor) and is_traceable_wrapper_subclass(x) for x in given)


def _parsed(
    op: str, arguments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], dict[str, Any], str | None]:
    """(tensors, options, backend) of the operation from the operator's arguments."""
    given = [x.resolve_neg() if isinstance(x, Tensor) else x for x in arguments]
    count = _POSITIONAL[op]
    options: dict[str, Any] = dict(zip(_NAMES[op][count:], given[count:-1], strict=True))
    return tuple(given[:count]), options, arguments[-1]


def _define(op: str) -> None:
    def fake(*arguments: Any) -> list[Tensor]:
        tensors, options, _ = _parsed(op, arguments)
        return FAKES[op](*tensors, **options)

    def kernel(*arguments: Any) -> list[Tensor]:
        tensors, options, backend = _parsed(op, arguments)
        result = dispatch.choose(op, tensors, options, backend).fn(*tensors, **options)
        results = [result] if isinstance(result, Tensor) else list(result)
        return _stored_like(results, FAKES[op](*tensors, **options))

    schema = SCHEMAS[op].replace("*, ", "") + ", str? backend"
    _library.define(f"{op}({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyfuse::{op}", fake, lib=_library)


def _define_backward(op: str) -> None:
    def fake(grads: Any, *arguments: Any) -> list[Tensor]:
        named = dict(zip(_NAMES[op], arguments, strict=False))
        return [torch.empty_like(named[name]) for name in arguments[-1]]

    def kernel(grads: Any, *arguments: Any) -> list[Tensor]:
        *given, results, needs = arguments
        tensors, options, backend = _parsed(op, tuple(given))
        flows = tuple(None if g is None else g.resolve_neg() for g in grads)
        with torch.no_grad():
            found = _gradients(
                op, tensors, options, backend, flows, tuple(results), frozenset(needs)
            )
        gradients = _stored_like([found[name] for name in needs], fake(grads, *arguments))
        return _apart(gradients, [*grads, *given, *results])

    schema = SCHEMAS[op].replace("*, ", "") + ", str? backend"
    _library.define(
        f"{op}_backward(Tensor?[] grads, {schema}, Tensor[] results, str[] needs) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl(f"{op}_backward", kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyfuse::{op}_backward", fake, lib=_library)


def _gradients(
    op: str,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    backend: str | None,
    grads: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """By the kernels of the first backend that has some for this call, else by the formula."""
    demand = dispatch.Demand(needs)
    gradient = dispatch.choose(op, tensors, options, backend, demand).gradient
    if gradient is None:
        with _autograd_at_work():
            return autograd.formula_gradients(op, tensors, options, grads, needs)
    if gradient.restore is not None:
        saved = gradient.restore(results, tensors, options)
    else:
        _, saved = gradient.forward(*tensors, **options)
    if gradient.keep is not None:
        result = results[0] if len(results) == 1 else results
        tensors = gradient.keep(result, tensors, options)
    return gradient.backward(grads, tensors, options, saved, needs)


def _autograd_at_work() -> Any:
    """Below a dispatch mode autograd is switched off for the thread, enable_grad or not; this switches it on."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def _stored_like(tensors: list[Tensor], fakes: list[Tensor]) -> list[Tensor]:
    """The tensors in the memory order that the graph was promised."""
    return [
        t if t.stride() == fake.stride() else fake.copy_(t)
        for t, fake in zip(tensors, fakes, strict=True)
    ]


def _apart(tensors: list[Tensor], others: list[Any]) -> list[Tensor]:
    """The tensors, none in the memory of another or of `others`: operators do not alias (dz may be dresidual)."""
    taken = {t.untyped_storage().data_ptr() for t in others if isinstance(t, Tensor)}
    apart = []
    for t in tensors:
        memory = t.untyped_storage().data_ptr()
        apart.append(t.clone() if memory in taken else t)
        taken.add(memory)
    return apart


def _differentiable(op: str) -> None:
    """Register <op>_backward as the derivative of <op>."""
    names = (*_NAMES[op], "backend")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.tensors = tensors
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[i] for i in tensors), *output)

    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        kept, inputs = ctx.saved_tensors, list(ctx.others)
        for i, t in zip(ctx.tensors, kept, strict=False):
            inputs[i] = t
        results = list(kept[len(ctx.tensors) :])
        needs = [name for name, wanted in zip(names, ctx.needs_input_grad, strict=True) if wanted]
        if all(g is None for g in grads):
            return (None,) * len(inputs)
        if wants_second_derivatives(tuple(grads)):
            tensors, options, _ = _parsed(op, tuple(inputs))
            found = autograd.formula_gradients(op, tensors, options, tuple(grads), frozenset(needs))
        else:
            operator = getattr(torch.ops.pyfuse, f"{op}_backward")
            gradients = operator(grads, *inputs, results, needs)
            found = dict(zip(needs, gradients, strict=True))
        return tuple(found.get(name) for name in names)

    torch.library.register_autograd(
        f"pyfuse::{op}", backward, setup_context=setup_context, lib=_library
    )


for _op in SCHEMAS:
    _define(_op)
    _define_backward(_op)
    _differentiable(_op)
