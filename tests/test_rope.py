"""Rotary embedding: every kernel against eager, eager against Hugging Face and complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import laid_out
from conftest import Target, at_threads
from numerics import assert_bitwise_equal, check
from rope_cases import DTYPES, HEADS, LONG, ROTATIONS, TABLES, angles
from torch import Tensor

import pyfuse
from pyfuse.backends import cpu_module

pytestmark = pytest.mark.emulated(sm_80=2, sm_90=16, sm_89=24, sm_120=32)


def check_rope(target: Target, x: Tensor, cos: Tensor, sin: Tensor, name: str, **o: Any) -> Tensor:
    actual = pyfuse.rope(x, cos, sin, backend=target.backend, **o)
    eager = pyfuse.rope(x, cos, sin, backend="eager", **o)
    exact = pyfuse.rope(x.double(), cos.double(), sin.double(), backend="eager", **o)
    check(actual, exact, eager, name)
    return actual


@pytest.mark.parametrize("own_table", [True, False], ids=["own", "f32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ROTATIONS)
def test_kernel(layout: str, dtype: torch.dtype, own_table: bool, target: Target) -> None:
    for d, r in [*HEADS, LONG]:
        x = laid_out(torch.randn(2, 3, 5, d).to(dtype), "BMHD")
        cos, sin = angles(2, 5, r // 2, dtype=dtype if own_table else torch.float32)
        y = check_rope(target, x, cos, sin, f"{r} of {d}", layout=layout)
        assert torch.equal(y[..., r:], x[..., r:])
        inplace = x.clone()
        result = pyfuse.rope(inplace, cos, sin, layout=layout, inplace=True, backend=target.backend)
        assert result is inplace
        assert_bitwise_equal(inplace, y, f"{r} of {d} in place")


@pytest.mark.parametrize("memory", ["BHMD", "BMHD", "MBHD", "slice"])
@pytest.mark.parametrize("layout", ROTATIONS)
def test_memory_order(layout: str, memory: str, target: Target) -> None:
    x = laid_out(torch.randn(2, 3, 33, 20), memory)
    cos, sin = angles(33, 8)
    y = check_rope(target, x, cos, sin, memory, layout=layout)
    assert y.stride() == torch.empty_like(x).stride()
    expected = y.clone()
    pyfuse.rope(x, cos, sin, layout=layout, inplace=True, backend=target.backend)
    assert torch.equal(x, expected)
    if memory == "slice":  # what lies beside x is not touched
        beside = x.as_strided((*x.shape[:3], 43), x.stride(), x.storage_offset() - 1)
        assert beside[..., 0].isnan().all() and beside[..., 21:].isnan().all()


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str, target: Target) -> None:
    x = torch.randn(2, 3, 5, 16)
    cos, sin, positions = TABLES[table]()
    y = check_rope(target, x, cos, sin, table, layout="half", positions=positions)
    if positions is not None:
        rows = positions.long()
        plain = pyfuse.rope(x, cos[rows], sin[rows], layout="half", backend=target.backend)
        assert_bitwise_equal(y, plain, table)


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty(shape: tuple[int, ...], inplace: bool, backend: str) -> None:
    x = torch.zeros(shape)
    cos, sin = angles(shape[0], shape[2], shape[3] // 2)
    y = pyfuse.rope(x, cos, sin, layout="half", inplace=inplace, backend=backend)
    assert y.shape == x.shape


@pytest.mark.parametrize("memory", ["BHMD", "BMHD"])
@pytest.mark.parametrize("layout", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_threads_change_no_bit(
    dtype: torch.dtype, layout: str, memory: str, target: Target
) -> None:
    x = laid_out(torch.randn(2, 7, 101, 64).to(dtype), memory)
    cos, sin = angles(101, 32)
    results = [
        pyfuse.rope(x, cos, sin, layout=layout, backend=target.backend) for _ in at_threads(1, 2, 3)
    ]
    for y in results[1:]:
        assert_bitwise_equal(y, results[0], "threads")


# ---- the same rotation as elsewhere -------------------------------------------------------------


def test_interleaved_is_a_complex_product(backend: str) -> None:
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    cos, sin = angles(5, 8, dtype=torch.float64)
    expected = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.complex(cos, sin)
    y = pyfuse.rope(x, cos, sin, layout="interleaved", backend=backend)
    torch.testing.assert_close(y, torch.view_as_real(expected).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [64, 16])
def test_equals_hugging_face_half(r: int, dtype: torch.dtype, backend: str) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as full

    q = laid_out(torch.randn(2, 9, 33, 64).to(dtype), "BMHD")
    k = laid_out(torch.randn(2, 3, 33, 64).to(dtype), "BMHD")
    half_cos, half_sin = angles(2, 33, r // 2, dtype=dtype)
    cos, sin = (torch.cat((t, t), -1) for t in (half_cos, half_sin))  # [B, M, R], as they come
    function = full if r == 64 else partial
    expected = function(q, k, cos, sin)
    exact = function(q.double(), k.double(), cos.double(), sin.double())
    for x, theirs, truth in zip((q, k), expected, exact, strict=True):
        y = pyfuse.rope(x, cos[..., : r // 2], sin[..., : r // 2], layout="half", backend=backend)
        check(y, truth, theirs, "rotary")


def test_equals_hugging_face_interleaved(backend: str) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x = torch.randn(2, 33, 4, 32)  # GPT-J rotates [B, M, H, R]
    cos, sin = angles(2, 33, 16)
    expected = apply_rotary_pos_emb(x, sin, cos)
    y = pyfuse.rope(x.transpose(1, 2), cos, sin, layout="interleaved", backend=backend)
    torch.testing.assert_close(y.transpose(1, 2), expected)


def test_scores_depend_on_distance_alone(backend: str) -> None:
    inv_freq, _ = pyfuse.rope_frequencies(32)
    theta = torch.arange(100).double()[:, None] * inv_freq
    cos, sin = theta.cos(), theta.sin()
    q, k = torch.randn(1, 1, 1, 32).double(), torch.randn(1, 1, 1, 32).double()

    def at(x: Tensor, position: int, layout: str) -> Tensor:
        where = torch.tensor([position])
        return pyfuse.rope(x, cos, sin, layout=layout, positions=where, backend=backend)

    for layout in ROTATIONS:
        near = (at(q, 12, layout) * at(k, 5, layout)).sum()
        far = (at(q, 97, layout) * at(k, 90, layout)).sum()
        torch.testing.assert_close(near, far)


# ---- derivatives and transforms -----------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, torch.tensor([4, 0, 4])], ids=["direct", "gathered"])
@pytest.mark.parametrize("layout", ROTATIONS)
def test_derivatives(layout: str, positions: Tensor | None) -> None:
    x = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(3 if positions is None else 5, 3, dtype=torch.float64)
    point = (x, cos.requires_grad_(), sin.requires_grad_())

    def call(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return pyfuse.rope(x, cos, sin, layout=layout, positions=positions)

    torch.autograd.gradcheck(call, point, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, point, fast_mode=True)


def test_vmap_and_functional_gradient() -> None:
    x, (cos, sin) = torch.randn(4, 2, 3, 5, 8), angles(5, 3)

    def call(x: Tensor) -> Tensor:
        return pyfuse.rope(x, cos, sin, layout="half")

    expected = torch.stack([call(one) for one in x])
    torch.testing.assert_close(torch.vmap(call)(x), expected)
    gradient = torch.func.grad(lambda x: call(x).square().sum())(x[0])
    torch.testing.assert_close(gradient, 2 * x[0])  # a rotation keeps lengths


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    cos, sin = angles(64, 8)
    positions = torch.arange(5) + 7

    def call(x: Tensor) -> Tensor:
        return pyfuse.rope(x, cos, sin, layout="interleaved", positions=positions, inplace=inplace)

    x = laid_out(torch.randn(2, 3, 5, 20), "BMHD")
    expected = call(x.clone())
    given = x.clone()
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(given)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert y.stride() == expected.stride()
    assert torch.equal(given, expected if inplace else x)


def test_compiled_gradient() -> None:
    cos, sin = angles(5, 4)

    def call(x: Tensor) -> Tensor:
        return pyfuse.rope(x, cos, sin, layout="half")

    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    torch.compile(call, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


# ---- choice and errors --------------------------------------------------------------------------


def test_stride_in_the_last_dimension_is_refused_with_a_reason(target: Target) -> None:
    x = torch.randn(2, 3, 16, 5).transpose(2, 3)
    cos, sin = angles(5, 8)
    with pytest.raises(NotImplementedError, match="stride 5 in its last dimension"):
        pyfuse.rope(x, cos, sin, layout="half", backend=target.backend)
    y = pyfuse.rope(x, cos, sin, layout="half")
    torch.testing.assert_close(y, pyfuse.rope(x.contiguous(), cos, sin, layout="half"))


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_position_outside_the_table(bad: int, backend: str) -> None:
    x, (cos, sin) = torch.zeros(1, 1, 2, 8), angles(40, 4)
    with pytest.raises(IndexError):
        pyfuse.rope(x, cos, sin, layout="half", positions=torch.tensor([3, bad]), backend=backend)


def test_kernel_entry_refuses_what_would_crash(target: Target) -> None:
    if target.backend != "cpu":
        pytest.skip("the CPU kernels' entry")
    sizes, stride = (1, 1, 1, 8), (8, 8, 8, 1)
    p = torch.zeros(8).data_ptr()
    rope = cpu_module.module().rope
    with pytest.raises(ValueError, match="x: null data pointer"):
        rope(0, stride, p, stride, p, p, 0, 4, 1, 0, (0, 0), sizes, 8, 0, 0, False, False, 1)
    with pytest.raises(ValueError, match="cannot rotate 10 of 8"):
        rope(p, stride, p, stride, p, p, 0, 4, 1, 0, (0, 0), sizes, 10, 0, 0, False, False, 1)
    with pytest.raises(ValueError, match="x's dtype or float32"):
        rope(p, stride, p, stride, p, p, 0, 4, 1, 0, (0, 0), sizes, 8, 0, 3, False, False, 1)
    with pytest.raises(ValueError, match="dtype: no such code: 9"):
        rope(p, stride, p, stride, p, p, 0, 4, 1, 0, (0, 0), sizes, 8, 9, 0, False, False, 1)


X = torch.zeros(2, 3, 5, 8)
COS = torch.zeros(5, 4)
IDS = torch.arange(5)


def bad_call(**changed: Any) -> Callable[[], Tensor]:
    given: dict[str, Any] = {"x": X, "cos": COS, "sin": COS, "layout": "half"} | changed
    return lambda: pyfuse.rope(**given)


META = torch.zeros(5, 4, device="meta")
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    (r"layout: got 'gptj'", ValueError, bad_call(layout="gptj")),
    (r"x: expected 4 dimensions \[B, H, M, D\], got .*\(3, 5, 8\)", ValueError, bad_call(x=X[0])),
    (r"x: .*int64", TypeError, bad_call(x=X.long())),
    (r"cos: expected \[5, R/2\].*got \(6, 4\)", ValueError, bad_call(cos=torch.zeros(6, 4))),
    (r"cos: expected .*got \(3, 5, 4\)", ValueError, bad_call(cos=torch.zeros(3, 5, 4))),
    (r"cos: expected .*got \(4,\)", ValueError, bad_call(cos=torch.zeros(4))),
    (
        r"cos: 8 columns rotate R = 16 .*head size 8 .*first half",
        ValueError,
        bad_call(cos=torch.zeros(5, 8), sin=torch.zeros(5, 8)),
    ),
    (r"sin: expected cos's shape \(5, 4\), got \(5, 3\)", ValueError, bad_call(sin=COS[:, :3])),
    (r"cos: expected float32 or .*float64", TypeError, bad_call(cos=COS.double())),
    (r"sin: expected cos's dtype", TypeError, bad_call(sin=COS.double())),
    (r"cos, sin: on meta and meta", ValueError, bad_call(cos=META, sin=META)),
    (
        r"positions: expected shape \(5,\) or \(2, 5\).*got \(4,\)",
        ValueError,
        bad_call(positions=IDS[:4]),
    ),
    (r"positions: .*float32", TypeError, bad_call(positions=IDS.float())),
    (r"positions: is on meta", ValueError, bad_call(positions=IDS.to("meta"))),
    (
        r"cos: expected \[P, R/2\] beside positions",
        ValueError,
        bad_call(cos=torch.zeros(2, 5, 4), positions=IDS),
    ),
    (
        r"inplace: True, but a gradient",
        ValueError,
        bad_call(x=X.clone().requires_grad_(), inplace=True),
    ),
    (
        r"inplace: True, but x of shape .* is expanded",
        ValueError,
        bad_call(x=X[:, :1].expand(2, 3, 5, 8), inplace=True),
    ),
]


@pytest.mark.parametrize(("message", "kind", "call"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input(message: str, kind: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
