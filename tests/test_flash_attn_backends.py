"""pyfuse.compat.flash_attn goes through pyfuse's dispatch, reads nothing from the device, and compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_attn_cases import angles, offsets
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyfuse
from pyfuse import dispatch
from pyfuse.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from pyfuse.compat.flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from pyfuse.compat.flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

OWN_SLOPES, TABLE = torch.rand(2, 4), torch.arange(6).reshape(2, 3).int()
PACKED = (offsets([4, 5]), offsets([7, 6]), 5, 7)
SHAPES = {
    "q": (2, 5, 4, 16),
    "k": (2, 7, 2, 16),
    "t": (9, 4, 16),
    "tk": (13, 2, 16),
    "p": (6, 4, 2, 16),
}
LENGTHS, PICKED = torch.tensor([3, 1]), torch.tensor([1, 0])
TABLES = angles(16, 8)

# Calls by the tensors that they take (see SHAPES), and more that stand on the same device.
CALLS: dict[str, tuple[str, Callable[..., Any], list[Any]]] = {
    "fixed": ("q k k", lambda q, k, v: flash_attn_func(q, k, v, causal=True), []),
    "own slopes": ("q k k", lambda q, k, v, s: flash_attn_func(q, k, v, alibi_slopes=s), [OWN_SLOPES]),
    "packed": ("t tk tk", lambda q, k, v, *cu: flash_attn_varlen_func(q, k, v, *cu, 5, 7), [*PACKED[:2]]),
    "packed, own slopes": (
        "t tk tk",
        lambda q, k, v, a, b, s: flash_attn_varlen_func(q, k, v, a, b, 5, 7, alibi_slopes=s),
        [*PACKED[:2], OWN_SLOPES],
    ),
    "packed pages": (
        "t p p",
        lambda q, k, v, a, b, t: flash_attn_varlen_func(q, k, v, a, b, 5, 7, block_table=t),
        [*PACKED[:2], TABLE],
    ),
    "cache": (
        "q k k q k k",
        lambda q, k, v, _, a, b, n: flash_attn_with_kvcache(q, k, v, a[:, :2], b[:, :2], cache_seqlens=n),
        [LENGTHS],
    ),
    "cache, picked and rotary": (
        "q k k k k",
        lambda q, k, v, a, b, c, s, n, i: flash_attn_with_kvcache(
            q, k, v, a[:, :1], b[:, :1], c, s, n, cache_batch_idx=i, cache_leftpad=i, causal=True
        ),
        [*TABLES, LENGTHS, PICKED],
    ),
    "cache of pages": (
        "q p p",
        lambda q, k, v, n, t, s: flash_attn_with_kvcache(
            q, k, v, cache_seqlens=n, block_table=t, alibi_slopes=s
        ),
        [LENGTHS, TABLE, OWN_SLOPES],
    ),
    "rotary": ("q", lambda x, c, s, n: apply_rotary_emb(x, c, s, seqlen_offsets=n), [*TABLES, LENGTHS]),
    "rotary of packed": (
        "t",
        lambda x, c, s, cu: apply_rotary_emb(x, c, s, cu_seqlens=cu, max_seqlen=5),
        [*TABLES, PACKED[0]],
    ),
    "rotary in place": ("q", lambda x, c, s: apply_rotary_emb_qkv_(x * 1, c, s, num_heads_q=2), [*TABLES]),
    "norm": ("q q", lambda x, r: layer_norm_fn(x, None, None, r, prenorm=True), []),
    "norm of two": ("q q q", lambda x, r, y: rms_norm_fn(x, None, None, r, y, prenorm=True), []),
}  # fmt: skip


def drawn(name: str) -> list[Any]:
    """Fresh tensors of a call: some are written to."""
    shapes, _, more = CALLS[name]
    return [torch.randn(SHAPES[s]) for s in shapes.split()] + [x.clone() for x in more]


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_from_the_device(name: str) -> None:
    """A meta tensor has no values: whoever asked for one would raise."""
    function, tensors = CALLS[name][1], drawn(name)
    expected, actual = function(*tensors), function(*(x.to("meta") for x in tensors))
    for a, e in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert a.is_meta and a.shape == e.shape and a.dtype == e.dtype


@pytest.mark.parametrize("name", CALLS)
def test_shapes_of_fake_tensors(name: str) -> None:
    """On the CPU too, where lengths are looked at if they can be."""
    function, tensors = CALLS[name][1], drawn(name)
    expected = function(*tensors)
    with FakeTensorMode() as mode:
        actual = function(*(mode.from_tensor(x) for x in tensors))
    for a, e in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype


@pytest.mark.parametrize("name", CALLS)
def test_a_named_backend_runs_it_or_raises(name: str) -> None:
    """Each call is one of pyfuse's dispatched operations; the CPU's kernels can do all of them."""
    function, tensors = CALLS[name][1], drawn(name)
    again = [x.clone() for x in tensors]
    expected = function(*tensors)
    with pyfuse.use_backend("cuda"), pytest.raises(NotImplementedError, match="cuda: "):
        function(*(x.clone() for x in again))
    if dispatch.backend_status()["cpu"] is not None:
        pytest.skip("no CPU kernels here")
    with pyfuse.use_backend("cpu"):
        torch.testing.assert_close(function(*again), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_it_compiles_as_one_graph(name: str) -> None:
    function, tensors = CALLS[name][1], drawn(name)
    again = [x.clone() for x in tensors]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*again), function(*tensors))
    for a, e in zip(again, tensors, strict=True):
        assert torch.equal(a, e), "written to elsewhere"
    torch.compiler.reset()


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
