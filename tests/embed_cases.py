"""Calls of the embedding, and the gradients of the eager formula and of the kernels for them."""

from __future__ import annotations

from typing import Any

import torch
from conftest import Target
from numerics import check
from torch import Tensor

from pyfuse import dispatch
from pyfuse.backends import eager_position

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 3, 63, 65, 111, 197]
V, P, S = 50, 40, 3  # rows of the tables
SEED = torch.tensor([2**35 + 11, 5])

Options = dict[str, Any]


def options(d: int, shape: tuple[int, ...], *, dtype: torch.dtype, **chosen: Any) -> Options:
    """The options of a checked call: position, segment, norm say what takes part."""
    position, segment = chosen.pop("position", "none"), chosen.pop("segment", False)
    norm = chosen.pop("norm", "none")
    given: Options = {"dropout_seed": SEED if "dropout_p" in chosen else None, **chosen}
    length = shape[-1]
    if position.startswith("sinusoidal"):
        given["sinusoidal"] = True
    elif position != "none":
        given["position_weight"] = torch.randn(P, d).to(dtype)
    given["positions"] = {
        "at": torch.arange(length).flip(0) % P,
        "each": torch.randint(0, P, shape),
        "each_int32": torch.randint(0, P, shape, dtype=torch.int32),
        "sinusoidal_at": torch.arange(length) + 1000,
        "sinusoidal_far": torch.arange(length) * 10**7 - 5,
    }.get(position)
    if segment:
        given |= {
            "segment_weight": torch.randn(S, d).to(dtype),
            "segment_ids": torch.randint(0, S, shape),
        }
    if norm != "none":
        given["norm_weight"] = torch.randn(d).to(torch.float32 if norm == "f32" else dtype)
    if norm in ("bias", "f32"):
        given["norm_bias"] = torch.randn(d).to(given["norm_weight"].dtype)
    return given


CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "scaled": {"scale": 3.3},
    "learned": {"position": "learned"},
    "learned_at": {"position": "at", "segment": True},
    "each": {"position": "each", "norm": "plain"},
    "each_int32": {"position": "each_int32", "dropout_p": 0.5},
    "bert": {"position": "learned", "segment": True, "norm": "bias", "dropout_p": 0.1},
    "f32_norm": {"position": "learned", "norm": "f32", "eps": 1e-3},
    "segment": {"segment": True, "norm": "plain", "dropout_p": 0.3, "scale": 0.5},
    "vaswani": {"position": "sinusoidal", "scale": 8.0, "dropout_p": 0.1},
    "sinusoidal_at": {"position": "sinusoidal_at", "norm": "bias"},
    "sinusoidal_far": {"position": "sinusoidal_far", "segment": True},
    "dropout": {"dropout_p": 0.999999999},
}


def implementation(backend: str) -> dispatch.Impl:
    impl: dispatch.Impl = dispatch.load(backend).OPS["embed"]
    return impl


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_call(
    target: Target, token_ids: Tensor, weight: Tensor, given: Options, name: str
) -> Tensor:
    impl = implementation(target.backend)
    assert impl.why_not(token_ids, weight, **given) is None
    actual: Tensor = impl.fn(token_ids, weight, **given)
    eager = eager_position.embed(token_ids, weight, **given)
    wide = {key: double(x) for key, x in given.items()}
    exact = eager_position.embed(token_ids, weight.double(), **wide)
    check(actual, exact, eager, name)
    return actual


def leaves_of(weight: Tensor, given: Options) -> dict[str, Tensor]:
    tables = {key: x for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {"weight": weight, **tables}


def eager_gradients(
    dy: Tensor, token_ids: Tensor, weight: Tensor, given: Options
) -> dict[str, Tensor]:
    leaves = {k: x.detach().requires_grad_() for k, x in leaves_of(weight, given).items()}
    y = eager_position.embed(token_ids, **{**given, **leaves})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def kernel_gradients(
    target: Target,
    dy: Tensor,
    token_ids: Tensor,
    weight: Tensor,
    given: Options,
    needs: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    gradient = implementation(target.backend).gradient
    assert gradient is not None
    needs = frozenset(leaves_of(weight, given)) if needs is None else needs
    assert gradient.why_not(needs, token_ids, weight, **given) is None
    _, saved = gradient.forward(token_ids, weight, **given)
    found = gradient.backward((dy,), (token_ids, weight), given, saved, needs)
    assert set(found) == needs
    return found


Call = tuple[Tensor, Tensor, Tensor, Options]  # dy, token_ids, weight, options


def check_gradients(target: Target, calls: list[Call], name: str) -> None:
    """The rule over the gradients of all these calls together: a mean of three numbers is none."""
    found: dict[str, list[list[Tensor]]] = {}
    for dy, token_ids, weight, given in calls:
        actual = kernel_gradients(target, dy, token_ids, weight, given)
        eager = eager_gradients(dy, token_ids, weight, given)
        wide = {key: double(x) for key, x in given.items()}
        exact = eager_gradients(dy.double(), token_ids, weight.double(), wide)
        for key, dx in actual.items():
            assert dx.shape == eager[key].shape
            three = [t.flatten() for t in (dx, exact[key], eager[key])]
            found.setdefault(key, []).append(three)
    for key, results in found.items():
        together = [torch.cat(parts) for parts in zip(*results, strict=True)]
        check(*together, f"{name}: {key}", "gradient")
