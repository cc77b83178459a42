"""Every operation as a function of its differentiable tensors, for the tests of autograd and of transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyfuse

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A call of `op`; `make(n)` gives its arguments by name, in float64, for a sequence of about n tokens."""

    op: str
    make: Callable[[int], Arguments]

    def split(self, n: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor]]:
        """A function of the floating-point arguments, and these."""
        generator_state = torch.get_rng_state()
        torch.manual_seed(n)
        arguments = self.make(n)
        torch.set_rng_state(generator_state)
        names = [k for k, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
        op = getattr(pyfuse, self.op)

        def function(*point: Tensor, **more: Any) -> Any:
            return op(**(arguments | dict(zip(names, point, strict=True))), **more)

        return function, [arguments[name].to(dtype) for name in names]

    def needs(self) -> set[str]:
        arguments = self.make(5)
        return {k for k, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def single(*shape: int) -> Tensor:
    """In float64, but exact in float32, to which kernels may round what there is one of per head."""
    return torch.randn(shape).double()


def rows_first(*shape: int) -> Tensor:
    """[B, H, M, D] as a view of [B, M, H, D], as models have it."""
    batch, heads, rows, d = shape
    return normal(batch, rows, heads, d).transpose(1, 2)


def attention(**options: Any) -> Callable[[int], Arguments]:
    def make(n: int) -> Arguments:
        tensors = {"q": rows_first(2, 2, n, 4), "k": normal(2, 2, n, 4), "v": normal(2, 2, n, 3)}
        return tensors | options

    return make


def attention_with_all(n: int) -> Arguments:
    """Grouped heads, an additive mask that is broadcast, and whatever else has a gradient or hides keys."""
    return {
        "q": rows_first(2, 4, n, 4), "k": rows_first(2, 2, n + 1, 4), "v": normal(2, 2, n + 1, 4),
        "mask": normal(4, 1, n + 1), "sinks": single(4), "alibi_slopes": single(4).abs(),
        "seqlens_k": torch.tensor([n + 1, 2]), "window": (3, 1), "softcap": 5.0, "scale": 0.7,
        "return_lse": False,
    }  # fmt: skip


def attention_bool_mask(n: int) -> Arguments:
    mask = torch.rand(2, 1, n, n) > 0.4
    mask[..., 0] = True
    return attention(mask=mask, return_lse=True)(n)


def varlen(n: int) -> Arguments:
    cu_seqlens = torch.tensor([0, 2, n], dtype=torch.int32)
    return {
        "q": normal(n, 4, 4), "k": normal(n, 2, 4), "v": normal(n, 2, 4), "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens, "causal": True, "sinks": single(4), "return_lse": True,
    }  # fmt: skip


def decode(n: int) -> Arguments:
    return {
        "q": rows_first(2, 4, 2, 4), "k_cache": normal(2, 2, n, 4), "v_cache": normal(2, 2, n, 4),
        "seqlens_k": torch.tensor([n, 3]), "alibi_slopes": single(4),
    }  # fmt: skip


def paged(n: int) -> Arguments:
    return {
        "q": normal(2, 2, 1, 4), "k_cache": normal(4, 1, n, 4), "v_cache": normal(4, 1, n, 4),
        "seqlens_k": torch.tensor([n + 1, 2]), "block_table": torch.tensor([[3, 1], [0, 2]]),
    }  # fmt: skip


def norm(*names: str, **options: Any) -> Callable[[int], Arguments]:
    def make(n: int) -> Arguments:
        tensors = {"x": normal(2, n, 6)}
        tensors |= {name: normal(2, n, 6) if name == "residual" else normal(6) for name in names}
        return tensors | options

    return make


def rope(layout: str) -> Callable[[int], Arguments]:
    def make(n: int) -> Arguments:
        angles = normal(n, 2)
        positions = torch.arange(n).flip(0) if layout == "half" else None
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        return {"x": rows_first(2, 2, n, 6), **tables, "layout": layout, "positions": positions}

    return make


def rope_pair(n: int) -> Arguments:
    arguments = rope("half")(n)
    return {"q": arguments.pop("x"), "k": rows_first(2, 1, n, 6), **arguments}


def embed(**options: Any) -> Callable[[int], Arguments]:
    def make(n: int) -> Arguments:
        # 13 rows, as no other size here: of equal sizes Dynamo makes one symbol, and guards it.
        ids = torch.randint(13, (2, n))
        return {"token_ids": ids, "weight": normal(13, 6), "scale": 2.0} | options

    return make


def embed_with_all(n: int) -> Arguments:
    return embed()(n) | {
        "position_weight": normal(n + 2, 6), "positions": torch.arange(n) + 1,
        "segment_ids": torch.randint(2, (2, n)), "segment_weight": normal(2, 6),
        "norm_weight": normal(6), "norm_bias": normal(6),
    }  # fmt: skip


def dropout(**options: Any) -> Callable[[int], Arguments]:
    return lambda n: {"x": normal(2, n, 6), "p": 0.4} | options


CASES = {
    "attention": Case("attention", attention(causal=True)),
    "attention-all": Case("attention", attention_with_all),
    "attention-bool-lse": Case("attention", attention_bool_mask),
    "attention-dropout": Case("attention", attention(dropout_p=0.4)),
    "varlen": Case("varlen_attention", varlen),
    "decode": Case("decode_attention", decode),
    "decode-paged": Case("decode_attention", paged),
    "dropout": Case("dropout", dropout()),
    "dropout-relu": Case("dropout", dropout(activation="relu")),
    "dropout-gelu": Case("dropout", dropout(activation="gelu")),
    "layer_norm": Case("layer_norm", norm("weight", "bias")),
    "layer_norm-residual": Case(
        "layer_norm", norm("weight", "bias", "residual", prenorm=True, dropout_p=0.4)
    ),
    "rms_norm": Case("rms_norm", norm("weight")),
    "rms_norm-residual": Case("rms_norm", norm("residual", "weight", casting="gemma")),
    "rope-half": Case("rope", rope("half")),
    "rope-interleaved": Case("rope", rope("interleaved")),
    "rope_pair": Case("rope_pair", rope_pair),
    "embed": Case("embed", embed(position_weight="sinusoidal", dropout_p=0.4)),
    "embed-all": Case("embed", embed_with_all),
}
# One for each operation, for what is slow.
FEW = [
    "attention-all",
    "varlen",
    "decode",
    "dropout-gelu",
    "layer_norm-residual",
    "rms_norm",
    "rope-half",
    "rope_pair",
    "embed-all",
]


def total(result: Any) -> Tensor:
    """A number that depends on every element of the result, differently on each."""
    results = (result,) if isinstance(result, Tensor) else result
    return torch.stack([(r.sin() * (1 + i)).sum() for i, r in enumerate(results)]).sum()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def loss_of(case: Case, n: int = 5) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, point = case.split(n)
    return lambda *point: total(function(*point)), point


def leaves(point: list[Tensor]) -> list[Tensor]:
    return [leaf(x) for x in point]


def gradients(function: Callable[..., Any], point: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = leaves(point)
    return torch.autograd.grad(total(function(*inputs)), inputs)


def by_formula(case: Case, n: int = 5) -> tuple[Any, tuple[Tensor, ...]]:
    """The result and its gradients by the eager formula."""
    function, point = case.split(n)

    def eager(*point: Tensor) -> Any:
        return function(*point, backend="eager")

    return eager(*point), gradients(eager, point)
