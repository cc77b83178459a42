"""LayerNorm and RMSNorm on a GPU, of whatever kernels: what these take, and the tensors that they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.dispatch import Gradient, Impl

Result = Tensor | tuple[Tensor, Tensor]
Statistics = tuple[Tensor | None, Tensor | None]  # mean (None for RMSNorm) and rstd
Saved = tuple[Tensor | None, ...]  # these and z: None where z is no result
Grads = tuple[Tensor | None, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETER_DTYPES = (*DTYPES, torch.float64)


class Inputs(NamedTuple):
    """What y is made of. casting: None for LayerNorm, else RMSNorm's."""

    casting: str | None
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None

    @property
    def alias(self) -> bool:
        """Whether z is x itself."""
        return self.residual is None and self.dropout_p == 0.0


class Flow(NamedTuple):
    """What the gradients are made of beside the inputs. z: None where it is to be made again."""

    dy: Tensor
    dz: Tensor | None
    statistics: Statistics
    z: Tensor | None

    def source(self, given: Inputs) -> Inputs:
        """The inputs with z in the place of what it is made of, where there is one."""
        return given if self.z is None else given._replace(x=self.z, residual=None)


class Norms(NamedTuple):
    """The operations of a backend by its own three functions.

    why_not: (name, tensor) -> why no kernel can take it. write: (inputs, eps, y, z, statistics) writes those that are
    not None; y and z are contiguous. write_gradients: (inputs, flow, out) writes the tensors of out, {argument's name:
    gradient}, which are contiguous.
    """

    why_not: Callable[[str, Tensor], str | None]
    write: Callable[[Inputs, float, Tensor | None, Tensor | None, Statistics], None]
    write_gradients: Callable[[Inputs, Flow, dict[str, Tensor]], None]

    def ops(self) -> dict[str, Impl]:
        return {"layer_norm": self._impl("layer_norm"), "rms_norm": self._impl("rms_norm")}

    def _impl(self, op: str) -> Impl:
        def call(*tensors: Any, **options: Any) -> Result:
            return self._result(*_inputs(op, tensors, options), options["prenorm"])

        def why_not(*tensors: Any, **options: Any) -> str | None:
            return self._why_not(_inputs(op, tensors, options)[0])

        def forward(*tensors: Any, **options: Any) -> tuple[Result, Saved]:
            given, eps = _inputs(op, tensors, options)
            statistics = _statistics(given)
            result = self._result(given, eps, options["prenorm"], statistics)
            return result, (*statistics, None if isinstance(result, Tensor) else result[1])

        def restore(
            results: tuple[Tensor, ...], tensors: tuple[Any, ...], options: dict[str, Any]
        ) -> Saved:
            return self._restore(results, *_inputs(op, tensors, options))

        def backward(
            grads: Grads,
            tensors: tuple[Any, ...],
            options: dict[str, Any],
            saved: Saved,
            needs: frozenset[str],
        ) -> dict[str, Tensor]:
            return self._backward(grads, _inputs(op, tensors, options)[0], saved, needs)

        return Impl(call, why_not, Gradient(forward, backward, _takes_all, restore))

    def _why_not(self, given: Inputs) -> str | None:
        x, weight = given.x, given.weight
        reason = self.why_not("x", x)
        if reason is not None:
            return reason
        for name, t in (("weight", weight), ("bias", given.bias)):
            if t is not None and t.dtype not in PARAMETER_DTYPES:
                return (
                    f"{name} is {t.dtype}; the kernels have float64, float32, bfloat16 and float16"
                )
        if given.residual is not None and given.residual.dtype not in DTYPES:
            return f"residual is {given.residual.dtype}; the kernels have float32, bfloat16 and float16"
        if given.casting == "llama" and weight is not None and weight.dtype is torch.float64:
            return f"casting 'llama' of {x.dtype} x with a float64 weight gives float64"
        return None

    def _result(
        self,
        given: Inputs,
        eps: float,
        prenorm: bool,
        statistics: Statistics = (None, None),
    ) -> Result:
        x, weight, dtype, z = given.x, given.weight, given.x.dtype, None
        if given.casting == "llama" and weight is not None and weight.dtype is not dtype:
            dtype = torch.promote_types(dtype, weight.dtype)
        y, wanted_y = result_like(x, dtype)
        if prenorm and not given.alias:
            like = x if given.residual is None else given.residual
            z, wanted_z = result_like(like, like.dtype)
        if x.numel() > 0:
            self.write(given, eps, y, z, statistics)
        if wanted_y is not y:
            y = wanted_y.copy_(y)
        if z is None:
            return (y, x) if prenorm else y
        return y, z if wanted_z is z else wanted_z.copy_(z)

    def _restore(self, results: tuple[Tensor, ...], given: Inputs, eps: float) -> Saved:
        """The statistics are those of z, where this is a result; else of what it is made of. One reads it again."""
        z = results[1] if len(results) == 2 else None
        if z is not None:
            given = given._replace(x=z, residual=None, dropout_p=0.0, dropout_seed=None)
        statistics = _statistics(given)
        if given.x.numel() > 0:
            self.write(given._replace(weight=None, bias=None), eps, None, None, statistics)
        return (*statistics, z)

    def _backward(
        self, grads: Grads, given: Inputs, saved: Saved, needs: frozenset[str]
    ) -> dict[str, Tensor]:
        x, residual = given.x, given.residual
        # Without dropout both have the same gradient, as the operands of x + residual do: written once.
        shared = (
            {"x", "residual"} <= needs
            and given.dropout_p == 0.0
            and residual is not None
            and residual.dtype is x.dtype
        )
        fill = torch.zeros_like if x.numel() == 0 else torch.empty_like
        out = {
            name: fill(getattr(given, name), memory_format=torch.contiguous_format)
            for name in (needs - {"residual"} if shared else needs)
        }
        if x.numel() > 0:
            mean, rstd, z = saved
            dy, dz = grads if len(grads) == 2 else (*grads, None)
            # Its dtype does not matter: there is nothing to round.
            flow = Flow(torch.zeros_like(x) if dy is None else dy, dz, (mean, rstd), z)
            self.write_gradients(given, flow, out)
        if shared:
            out["residual"] = out["x"]
        return out


def _inputs(op: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> tuple[Inputs, float]:
    """What the kernels read, and eps, of arguments as pyfuse.layer_norm and pyfuse.rms_norm pass them on."""
    casting = None if op == "layer_norm" else options["casting"]
    x, weight, bias = tensors if casting is None else (*tensors, None)
    p, seed = options["dropout_p"], options["dropout_seed"]
    return Inputs(casting, x, weight, bias, options["residual"], p, seed), options["eps"]


def _statistics(given: Inputs) -> Statistics:
    """mean and rstd, to be written."""
    rows = given.x.numel() // given.x.shape[-1]
    rstd = given.x.new_empty(rows, dtype=torch.float32)
    return (torch.empty_like(rstd) if given.casting is None else None), rstd


def _takes_all(needs: frozenset[str], *tensors: Any, **options: Any) -> str | None:
    return None  # whatever the forward takes


def rows_of(t: Tensor | None) -> tuple[Tensor | None, int]:
    """(t, the stride of its rows): of t itself where it is [rows, D] with dense rows and one stride, else of a copy."""
    if t is None:
        return None, 0
    if t.is_contiguous():
        return t, t.shape[-1]
    t = t.reshape(-1, t.shape[-1])
    if t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0)


def result_like(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a contiguous tensor for the kernel to write, one in the memory order of torch.empty_like(t), which compiled
    graphs count on): the same one where that order is contiguous."""
    wanted = torch.empty_like(t, dtype=dtype)
    if wanted.is_contiguous():
        return wanted, wanted
    return torch.empty_like(wanted, memory_format=torch.contiguous_format), wanted


def dense(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()
