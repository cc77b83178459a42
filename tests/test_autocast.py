"""torch.autocast: each operation casts what its counterpart in torch casts there, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorder import Recorder, only_backends
from torch import Tensor
from torch.nn import functional as F
from transform_cases import CASES, Case, leaves, total

import pyfuse

ATTENTION = [c for c in CASES.values() if "attention" in c.op]
OTHERS = [c for c in CASES.values() if "attention" not in c.op]
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture(params=["installed", "kernels"])
def gradients_by(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "installed":
        yield
        return
    with only_backends(recorder=Recorder()):
        yield


def run(case: Case, point: list[Tensor], dtype: torch.dtype, enabled: bool = True) -> list[Tensor]:
    """The results of a call under autocast, and the gradients."""
    function, _ = case.split()
    with torch.autocast("cpu", dtype, enabled=enabled):
        result = function(*point)
    results = [result] if isinstance(result, Tensor) else list(result)
    return [*results, *torch.autograd.grad(total(result), point)]


@half
@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: next(n for n in CASES if CASES[n] is c))
def test_attention_computes_in_the_dtype_of_autocast(
    case: Case, dtype: torch.dtype, one_seed: None, gradients_by: None
) -> None:
    """As if q, k and v had been cast by hand; sinks, slopes and masks stay; gradients come back in float32."""
    function, point = case.split(dtype=torch.float32)
    names = [k for k, x in case.make(5).items() if isinstance(x, Tensor) and x.is_floating_point()]
    point = leaves(point)
    found = run(case, point, dtype)
    by_hand = [x.to(dtype) if name[0] in "qkv" else x for name, x in zip(names, point, strict=True)]
    result = function(*by_hand)
    results = [result] if isinstance(result, Tensor) else list(result)
    expected = [*results, *torch.autograd.grad(total(result), point)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].dtype == dtype
    assert {x.dtype for x in found[-len(point) :]} == {torch.float32}


@half
@pytest.mark.parametrize("case", OTHERS, ids=lambda c: next(n for n in CASES if CASES[n] is c))
def test_the_others_keep_their_dtype(
    case: Case, dtype: torch.dtype, one_seed: None, gradients_by: None
) -> None:
    point = leaves(case.split(dtype=torch.float32)[1])
    plain = run(case, point, dtype, enabled=False)
    torch.testing.assert_close(run(case, point, dtype), plain, rtol=0, atol=0)


@half
def test_dtypes_that_autocast_mixes(dtype: torch.dtype) -> None:
    """A Linear gives halves, a norm float32: what meets later need not agree."""
    q, k = torch.randn(1, 2, 5, 8, dtype=dtype), torch.randn(1, 2, 5, 8)
    mask = torch.randn(5, 5)
    sinks = torch.randn(2, dtype=torch.bfloat16)
    x, residual = torch.randn(3, 8), torch.randn(3, 8, dtype=dtype)
    tables = torch.randn(5, 4), torch.randn(5, 4, dtype=torch.bfloat16)
    ids = torch.tensor([1, 2])
    calls: dict[str, Any] = {
        "k: dtype": lambda: pyfuse.attention(q, k, k, mask=mask, sinks=sinks),
        "residual: got": lambda: pyfuse.rms_norm(x, residual=residual, prenorm=True),
        "sin: expected": lambda: pyfuse.rope(q, *tables, layout="half"),
        "segment_weight: expected": lambda: pyfuse.embed(
            ids, x, segment_ids=ids, segment_weight=residual
        ),
    }
    dtypes = []
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()
        with torch.autocast("cpu", dtype):
            result = call()
        dtypes.append([t.dtype for t in ((result,) if isinstance(result, Tensor) else result)])
    assert dtypes == [[dtype], [torch.float32] * 2, [dtype], [torch.float32]]


@half
def test_sdpa_casts_as_torch_does(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8, dtype=torch.bfloat16)
    mask = torch.randn(5, 7, dtype=torch.float16)
    with torch.autocast("cpu", dtype):
        ours = pyfuse.scaled_dot_product_attention(q, k, k, mask)
        torchs = F.scaled_dot_product_attention(q, k, k, mask)
    assert ours.dtype == torchs.dtype == dtype
    by_hand = pyfuse.scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, k)), mask.float())
    assert torch.equal(ours, by_hand)


def test_float64_is_left_alone() -> None:
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert pyfuse.attention(q, q, q).dtype == torch.float64
        with pytest.raises(TypeError, match="k: dtype"):
            pyfuse.attention(q, q.float(), q)


def test_backward_inside_autocast_is_not_cast(one_seed: None) -> None:
    """What was computed in float32 is differentiated in float32, wherever backward is called."""
    case = CASES["attention"]
    function, point = case.split(dtype=torch.float32)
    point = leaves(point)
    with only_backends(recorder=Recorder()):
        plain, cast = (
            _second_derivatives(function, point, enabled=enabled) for enabled in (False, True)
        )
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def _second_derivatives(function: Any, point: list[Tensor], enabled: bool) -> tuple[Tensor, ...]:
    loss = total(function(*point))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = torch.autograd.grad(loss, point, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in found]).sum(), point)


@half
def test_compiled(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    point = leaves([torch.randn(1, 2, 5, 8) for _ in "qkv"])

    def call(*point: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return pyfuse.attention(*point)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with only_backends(recorder=Recorder()):
        plain, traced = call(*point), compiled(*point)
        expected = torch.autograd.grad(plain.sum(), point)
        found = torch.autograd.grad(traced.sum(), point)
    assert traced.dtype == dtype
    torch.testing.assert_close((traced, *found), (plain, *expected), rtol=0, atol=0)


def test_appending_under_autocast_writes_into_the_callers_cache() -> None:
    """Cast to autocast's dtype, the cache that is written to would be a copy."""
    k_cache, v_cache = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    q, k_new, v_new = (torch.randn(1, 2, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        o = pyfuse.decode_attention(
            q, k_cache, v_cache, k_new=k_new, v_new=v_new, seqlens_k=torch.tensor([1])
        )
    assert o.dtype == torch.float32
    torch.testing.assert_close(k_cache[:, :, :1], k_new.float(), rtol=0, atol=0)
    torch.testing.assert_close(o, v_new.float())
