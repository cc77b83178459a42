"""Calls of the norms, and the results and gradients of the eager formula and of the kernels for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest
import torch
from cases import covering
from conftest import Target
from numerics import check
from torch import Tensor

from pyfuse import dispatch

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
SEED = torch.tensor([2**35 + 11, 5])


@dataclass(frozen=True)
class NormCase:
    """One call: op is layer_norm, or rms_norm's casting. Parameters and residual: none, own or another dtype."""

    op: str = "layer_norm"
    dtype: str = "f32"
    rows: int = 3
    d: int = 65
    weight: str = "own"
    bias: str = "own"
    residual: str = "none"
    prenorm: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        words = [self.op, self.dtype, f"{self.rows}x{self.d}", f"w={self.weight}"]
        words += [f"b={self.bias}"] * (self.op == "layer_norm")
        words += [f"r={self.residual}"] * (self.residual != "none")
        words += ["prenorm"] * self.prenorm + ["dropout"] * (self.dropout > 0.0)
        return "-".join(words)

    @property
    def is_kernels(self) -> bool:
        """Whether the kernels take it: residual is of x's dtype, or float32 beside a half one, and so is y."""
        widens = self.residual == "f32" and self.dtype == "f64"
        return not widens and not (self.op == "llama" and self.weight == "f64" != self.dtype)


CASES = [
    case
    for case in covering(
        7,
        {
            "op": ["layer_norm", "llama", "gemma", "torch"],
            "dtype": list(DTYPES),
            "rows": [0, 1, 3, 197],
            "d": [1, 3, 63, 65, 111, 768, 4097],
            "weight": ["none", "own", "f32", "f64", "f16"],
            "bias": ["none", "own", "f32"],
            "residual": ["none", "own", "f32"],
            "prenorm": [False, True],
            "dropout": [0.0, 0.3],
        },
        NormCase,
    )
    if case.is_kernels
]


@dataclass
class NormCall:
    """The arguments of a call and what flows into its gradient, dy and dz."""

    op: str
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any] = field(default_factory=dict)
    grads: tuple[Tensor | None, ...] = ()

    def named(self) -> dict[str, Tensor]:
        """The tensors that have a gradient."""
        names = ("x", "weight", "bias")[: len(self.tensors)]
        given = {
            **dict(zip(names, self.tensors, strict=True)),
            "residual": self.options["residual"],
        }
        return {name: t for name, t in given.items() if t is not None}

    def double(self) -> NormCall:
        def wide(t: Any) -> Any:
            return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

        options = {name: wide(t) for name, t in self.options.items()}
        return NormCall(
            self.op, tuple(map(wide, self.tensors)), options, tuple(map(wide, self.grads))
        )


def build(case: NormCase) -> NormCall:
    """A function of the case alone; the mean of x is not 0, so that forgetting it shows."""
    generator = torch.Generator().manual_seed(crc32(str(case).encode()))
    own = DTYPES[case.dtype]

    def normal(kind: str, *shape: int) -> Tensor | None:
        if kind == "none":
            return None
        return torch.randn(shape, generator=generator).to(own if kind == "own" else DTYPES[kind])

    shape = (case.rows, case.d)
    x, weight, bias = (
        normal("own", *shape),
        normal(case.weight, case.d),
        normal(case.bias, case.d),
    )
    assert x is not None
    x = x + 0.3
    residual = normal(case.residual, *shape)
    options: dict[str, Any] = {
        "eps": 1e-5,
        "residual": residual,
        "prenorm": case.prenorm,
        "dropout_p": case.dropout,
        "dropout_seed": SEED if case.dropout else None,
    }
    layer = case.op == "layer_norm"
    if not layer:
        options["casting"] = case.op
    call = NormCall(
        "layer_norm" if layer else "rms_norm", (x, weight, bias) if layer else (x, weight), options
    )
    call.grads = tuple(
        torch.randn(shape, generator=generator).to(y.dtype) for y in results(call, "eager")
    )
    return call


def implementation(call: NormCall, backend: str) -> dispatch.Impl:
    """What computes the call; those for GPUs may refuse it, which skips the test."""
    impl: dispatch.Impl = dispatch.load(backend).OPS[call.op]
    reason = impl.why_not(*call.tensors, **call.options)
    if reason is not None:
        assert backend in ("cuda", "triton"), reason
        pytest.skip(reason)
    return impl


@torch.no_grad()
def results(call: NormCall, backend: str) -> tuple[Tensor, ...]:
    y = implementation(call, backend).fn(*call.tensors, **call.options)
    return (y,) if isinstance(y, Tensor) else y


def eager_gradients(call: NormCall) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in call.named().items()}
    names = ("x", "weight", "bias")[: len(call.tensors)]
    options = {**call.options, "residual": leaves.get("residual")}
    y = implementation(call, "eager").fn(*(leaves.get(name) for name in names), **options)
    flows = [
        (out, g)
        for out, g in zip((y,) if isinstance(y, Tensor) else y, call.grads, strict=True)
        if g is not None
    ]
    grads = torch.autograd.grad(
        [out for out, _ in flows],
        list(leaves.values()),
        [g for _, g in flows],
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))


def kernel_gradients(
    call: NormCall, backend: str, needs: frozenset[str] | None = None
) -> dict[str, Tensor]:
    gradient = implementation(call, backend).gradient
    assert gradient is not None
    needs = frozenset(call.named()) if needs is None else needs
    assert gradient.why_not(needs, *call.tensors, **call.options) is None
    result, saved = gradient.forward(*call.tensors, **call.options)
    if gradient.restore is not None:
        kept = gradient.restore(
            (result,) if isinstance(result, Tensor) else result, call.tensors, call.options
        )
        assert [t is None for t in kept] == [t is None for t in saved]
    found = gradient.backward(call.grads, call.tensors, call.options, saved, needs)
    assert set(found) == needs
    return found


def check_call(call: NormCall, target: Target, name: str) -> dict[str, Tensor]:
    """The accuracy rule for the results and all gradients of a call; returns the gradients."""
    exact = call.double()
    for i, triple in enumerate(
        zip(
            results(call, target.backend),
            results(exact, "eager"),
            results(call, "eager"),
            strict=True,
        )
    ):
        check(*triple, f"{name}, {'yz'[i]}")
    found = kernel_gradients(call, target.backend)
    truth, eager = eager_gradients(exact), eager_gradients(call)
    for argument, t in call.named().items():
        assert found[argument].dtype == t.dtype and found[argument].shape == t.shape
        check(found[argument], truth[argument], eager[argument], f"{name}, d{argument}", "gradient")
    return found


def subsets(names: frozenset[str]) -> Iterator[frozenset[str]]:
    """Each name alone, and all but each."""
    for name in sorted(names):
        yield frozenset({name})
        yield names - {name}
