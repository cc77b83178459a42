"""The backend of the CUDA kernels: when it runs, what it says when it cannot, and who goes first."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from emulated import standing_in

import pyfuse
from pyfuse import dispatch
from pyfuse.backends import cuda_device, gpu_order
from pyfuse.backends.cuda_attention import aligned

pytestmark = pytest.mark.skipif(cuda_device._cuda is None, reason=cuda_device.NOT_BUILT)


def tensor(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, 2, 5, 64, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_imports_and_says_why_it_cannot_run() -> None:
    assert cuda_device.module().why_no_gpu()
    x = tensor()
    with pytest.raises(NotImplementedError, match="cuda: torch sees no GPU"):
        pyfuse.attention(x, x, x, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_names_the_kernel_and_its_sizes() -> None:
    x = tensor()
    arguments: list[Any] = []

    class Catcher:
        arch, multiprocessors = 80, 108

        def call(self, name: str, call: tuple[Any, ...], tensors: Any) -> None:
            arguments[:] = [name, call]

    with cuda_device.stand_in(Catcher()):
        dispatch._unavailable.cache_clear()
        dispatch._offer.cache_clear()
        pyfuse.attention(x, x, x, backend="cuda")
    dispatch._unavailable.cache_clear()
    dispatch._offer.cache_clear()
    name, call = arguments
    with pytest.raises(RuntimeError, match=r"attention_fwd_bf16_d64/forward \(grid 1 x 2 x 1, 128"):
        getattr(cuda_device.module(), name)((80, 108, 0), call)


def test_units_are_named_by_their_sources() -> None:
    units = cuda_device.module().units()
    assert units["attention_fwd_bf16_d64"][0] == "csrc/cuda/attention_fwd.cu"
    assert all(source.startswith("csrc/cuda/") for source, _, _ in units.values())


def test_null_pointers_are_refused() -> None:
    with pytest.raises(ValueError, match="q: null data pointer"):
        cuda_device.module().attention_forward((80, 108, 0), (0, (1, 1, 1, 1, 1, 8, 8), 0))


CHOICES: list[tuple[int, torch.dtype, dict[str, Any], str]] = [
    (80, torch.bfloat16, {}, "cuda"),
    (80, torch.float32, {"causal": True, "window": 3}, "cuda"),
    (80, torch.bfloat16, {"softcap": 30.0}, "triton"),
    (80, torch.bfloat16, {"dropout_p": 0.5}, "triton"),
    (90, torch.bfloat16, {"causal": True}, "cuda"),
    (90, torch.float16, {"softcap": 30.0}, "triton"),
    (90, torch.float32, {}, "triton"),
    (100, torch.bfloat16, {}, "triton"),
    (100, torch.float32, {}, "cuda"),
    (120, torch.float16, {}, "cuda"),
]


@pytest.mark.parametrize("arch, dtype, options, first", CHOICES)
def test_the_order_of_the_gpu_backends_is_data(
    arch: int, dtype: torch.dtype, options: dict[str, Any], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    pytest.importorskip("triton", reason="Triton is not installed")
    gpus = {name: dispatch.BACKENDS[name] for name in ("cuda", "triton", "eager")}
    monkeypatch.setattr(dispatch, "BACKENDS", gpus)
    x = tensor(dtype)
    with ExitStack() as both:
        for name in ("cuda", "triton"):
            both.enter_context(standing_in(arch, backend=name))
        explained = pyfuse.explain("attention", x, x, x, **options)
        assert explained.chosen == first
        named = pyfuse.explain("attention", x, x, x, **options, backend="cuda")
        assert named.chosen == "cuda"
    if first == "triton":
        assert "the next goes first: " in str(explained)
        with standing_in(arch, backend="cuda"):  # without Triton, these run rather than eager
            alone = pyfuse.explain("attention", x, x, x, **options)
        assert alone.chosen == "cuda"
        assert [c.backend for c in alone.candidates] == ["cuda", "triton", "cuda"]


def test_the_order_looks_at_the_larger_head_size() -> None:
    q, v = torch.empty(1, 1, 5, 64, dtype=torch.bfloat16), torch.empty(1, 1, 5, 200)
    rule = gpu_order.triton_first("attention", 90, q, v, False, {})
    assert rule is not None and "wgmma" in rule
    assert gpu_order.triton_first("attention", 90, q, q, False, {}) is None
    assert gpu_order.triton_first("decode_attention", 100, q, v, False, {}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:2, :3, :5, :64],
        lambda x: x[:2, :3, :5, :60],  # rows too short
        lambda x: x[:2, :3, :5, 1:65],  # begins between
        lambda x: x[:2, :3, :5, 8:72],
        lambda x: x.flatten()[: 2 * 3 * 5 * 66].view(2, 3, 5, 66)[..., :64],  # rows apart
        lambda x: x.flatten()[: 3 * 331].view(1, 3, 331)[..., :320].view(1, 3, 5, 64),  # heads
        lambda x: x.flatten()[:331].view(1, 1, 331)[..., :320].view(1, 1, 5, 64),  # of which one
        lambda x: x[0, :3, :5, :64].transpose(0, 1),  # packed
        lambda x: x[0, :3, :5, :62].transpose(0, 1),
    ],
)
def test_rows_that_16_bytes_at_a_time_can_copy(view: Any, dtype: torch.dtype) -> None:
    x = view(torch.zeros(2, 4, 8, 80, dtype=dtype))
    steps = [x.stride(d) for d in range(x.ndim - 1) if x.shape[d] > 1] + [x.shape[-1]]
    wanted = all(n * x.element_size() % 16 == 0 for n in steps) and x.data_ptr() % 16 == 0
    whole = torch.zeros(1, 1, 8, 64, dtype=dtype)
    assert aligned(x) == aligned(whole, x) == aligned(x, whole) == int(wanted)
