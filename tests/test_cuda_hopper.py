"""Hopper's forward (attention_fwd_hopper.cu): which calls it takes, and that it answers them as eager does."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import torch
from emulated import CudaOfCpuTensors, standing_in
from test_cuda_attention import hopper_built
from torch import Tensor

import pyfuse

pytestmark = hopper_built

INF = float("inf")
Result = tuple[Tensor, Tensor]


def inputs(
    sizes: tuple[int, int] = (197, 300), d: int = 64, dv: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [2, 4, M, D], k and v [2, 2, N, D], heads beside each other in memory."""
    m, n = sizes
    shapes = ((2, m, 4, d), (2, n, 2, d), (2, n, 2, dv or d))
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


def run(*tensors: Tensor, **options: Any) -> tuple[Result, CudaOfCpuTensors]:
    function = pyfuse.attention if tensors[0].ndim == 4 else pyfuse.varlen_attention
    with standing_in(90, backend="cuda") as gpu:
        result = function(*tensors, **options, return_lse=True, backend="cuda")
    assert isinstance(gpu, CudaOfCpuTensors) and not isinstance(result, Tensor)
    return result, gpu


def hopper(*tensors: Tensor, **options: Any) -> Result:
    result, gpu = run(*tensors, **options)
    assert gpu.units[-1].startswith("attention_fwd_hopper")
    return result


def close_to_eager(actual: Result, *tensors: Tensor, **options: Any) -> None:
    options = {**options, "return_lse": True, "backend": "eager"}
    function = pyfuse.attention if tensors[0].ndim == 4 else pyfuse.varlen_attention
    eager = function(*tensors, **options)
    exact = function(*(x.double() if x.is_floating_point() else x for x in tensors), **options)
    for i, name in enumerate(("o", "lse")):
        numerics.check(actual[i], exact[i], eager[i], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes, d, dv",
    [((1, 1), 64, 64), ((63, 65), 64, 64), ((128, 384), 64, 40), ((197, 111), 128, 128), ((65, 257), 96, 72),
     ((3, 700), 8, 128)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 9)}], ids=str)
def test_it_answers_as_eager(
    options: dict[str, Any], sizes: tuple[int, int], d: int, dv: int, dtype: torch.dtype
) -> None:
    tensors = inputs(sizes, d, dv, dtype)
    close_to_eager(hopper(*tensors, **options), *tensors, **options)


@pytest.mark.parametrize("d", [64, 128])
def test_lengths_sinks_and_scale(d: int) -> None:
    tensors = inputs((65, 300), d)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    options = {"seqlens_k": torch.tensor([0, 131]), "scale": 0.3, "causal": True, "sinks": sinks}
    close_to_eager(hopper(*tensors, **options), *tensors, **options)


@pytest.mark.parametrize("layout", ["heads first", "heads last", "slice"])
def test_every_layout_of_aligned_rows_has_the_same_bits(layout: str) -> None:
    q, k, v = inputs(d=128)
    if layout == "slice":  # of a fused projection
        wide = [torch.cat((x, x[..., :8]), -1)[..., :128] for x in (q, k, v)]
    else:
        wide = [x.contiguous() if layout == "heads first" else x.clone() for x in (q, k, v)]
    for actual, expected in zip(hopper(*wide, causal=True), hopper(q, k, v, causal=True), strict=True):  # fmt: skip
        numerics.assert_bitwise_equal(actual, expected, layout)


def test_the_same_bits_in_every_order_of_warps() -> None:
    tensors = inputs((197, 700))
    with standing_in(90, backend="cuda"):  # each launch has another order
        first, *others = (
            pyfuse.attention(*tensors, window=(200, 90), backend="cuda") for _ in range(4)
        )
    for other in others:
        numerics.assert_bitwise_equal(other, first, "o")


# Values that nobody sees --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("name", ["seqlens", "causal", "window"])
def test_hidden_keys_change_nothing(name: str, where: str, d: int, bad: float) -> None:
    q, k, v = inputs((200, 400), d)
    options: dict[str, Any] = {
        "seqlens": {"seqlens_k": torch.tensor([131, 270])},
        "causal": {"causal": True},
        "window": {"window": (40, 30)},
    }[name]
    keys = torch.tensor([270, 271, 333, 399])
    bad_k, bad_v = k.clone(), v.clone()
    if where == "keys":
        bad_k[:, :, keys] = bad
    else:
        bad_v[:, :, keys, 3::16] = bad
    place, at = torch.arange(200)[:, None] + 200, keys[None]
    sees = {
        "seqlens": torch.zeros(200, 4, dtype=torch.bool),
        "causal": at <= place,
        "window": (at <= place + 30) & (at >= place - 40),
    }[name].any(-1)
    actual, expected = hopper(q, bad_k, bad_v, **options), hopper(q, k, v, **options)
    for i in range(2):
        numerics.assert_bitwise_equal(
            actual[i][:, :, ~sees], expected[i][:, :, ~sees], f"result {i}"
        )
    assert (~sees).any()
    if where == "values" or bad != bad:  # an infinite key may have a weight of 0
        assert not actual[0][:, :, sees].isfinite().all(-1).any()


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_packed_sequences_do_not_meet(d: int, causal: bool, integers: torch.dtype) -> None:
    """Each as if it were alone, to the bit, though a tile of one holds rows of the next, NaN among them."""
    queries, keys = [65, 0, 1, 130, 3], [111, 5, 70, 130, 0]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(integers) for x in (queries, keys))
    q = torch.randn(sum(queries), 4, d).bfloat16()
    k, v = torch.randn(2, sum(keys), 2, d).bfloat16()
    o, lse = hopper(q, k, v, cu_q, cu_k, causal=causal)
    close_to_eager((o, lse), q, k, v, cu_q, cu_k, causal=causal)
    for b in range(len(keys)):
        only = slice(int(cu_q[b]), int(cu_q[b + 1]))
        bad_k, bad_v = torch.full_like(k, torch.nan), torch.full_like(v, INF)
        own = slice(int(cu_k[b]), int(cu_k[b + 1]))
        bad_k[own], bad_v[own] = k[own], v[own]
        alone = hopper(q, bad_k, bad_v, cu_q, cu_k, causal=causal)
        numerics.assert_bitwise_equal(alone[0][only], o[only], f"o of {b}")
        numerics.assert_bitwise_equal(alone[1][:, only], lse[:, only], f"lse of {b}")


# Which calls it takes, and what they cost ---------------------------------------------------------


def test_other_calls_are_other_kernels() -> None:
    q, k, v = inputs((65, 65))
    expanded = k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((q, *expanded), {}),  # a tensor map has no stride of 0
        (tuple(torch.cat((x, x), -1)[..., 1:65] for x in (q, k, v)), {}),  # rows of 16-byte parts
        (inputs((65, 65), 32), {}),
        (inputs((65, 65), 256), {}),
        (inputs((65, 65), dtype=torch.float32), {}),
        ((q, k, v), {"softcap": 30.0}),
        ((q, k, v), {"scale": -1.0}),
    ]
    for tensors, options in calls:
        result, gpu = run(*tensors, **options)
        assert "hopper" not in gpu.units[-1]
        close_to_eager(result, *tensors, **options)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_accessed_in_the_fewest_steps(causal: bool, d: int) -> None:
    _, gpu = run(*inputs((256, 384), d), causal=causal)
    counters = gpu.reports[-1].counters
    assert counters["shared_wavefronts"] <= 1.01 * counters["shared_wavefronts_ideal"]
    assert counters["sectors"] <= 1.05 * counters["sectors_ideal"]
