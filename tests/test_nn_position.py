"""InputEmbedding, RotaryEmbedding, SinusoidalEncoding: against the formulas in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import pyfuse
from pyfuse.nn import InputEmbedding, RotaryEmbedding, SinusoidalEncoding

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "GPT-2": {"max_positions": 9},
    "BERT": {"max_positions": 9, "num_segments": 2, "norm": True, "eps": 1e-12},
    "Vaswani": {"position": "sinusoidal", "scale": 4.0},
    "Llama": {"position": None},
}


@pytest.mark.parametrize(
    "options, positions", [(name, given) for name in EMBEDDINGS for given in (False, True)][:-1]
)  # Llama's has none to give
def test_input_embedding(options: str, positions: bool) -> None:
    m = InputEmbedding(11, 16, dropout=0.5, dtype=torch.float64, **EMBEDDINGS[options]).eval()
    ids = torch.randint(11, (2, 5))
    segments = torch.randint(2, (2, 5)) if m.segment is not None else None
    at = torch.randint(9, (2, 5)) if positions else torch.arange(5)
    e = m.token(ids) * m.scale
    if m.position is not None:
        e = e + m.position(at)
    if m.kind == "sinusoidal":
        e = e + pyfuse.sinusoidal_encoding(at, 16, dtype=torch.float64)
    if m.segment is not None:
        e = e + m.segment(segments)
    if m.norm is not None:
        e = nn.functional.layer_norm(e, (16,), m.norm.weight, m.norm.bias, m.norm.eps)
    y = m(ids, at if positions else None, segments)
    torch.testing.assert_close(y, e, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(e.square().sum(), list(m.parameters()))
    found = torch.autograd.grad(y.square().sum(), list(m.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_segments_are_zero_unless_given() -> None:
    m = InputEmbedding(11, 8, max_positions=4, num_segments=2)
    ids = torch.randint(11, (3, 4))
    assert torch.equal(m(ids), m(ids, None, torch.zeros_like(ids)))


def test_dropout_of_embeddings_only_in_training() -> None:
    m = InputEmbedding(3, 400, position=None, dropout=0.25)
    ids = torch.zeros(20, dtype=torch.int64)
    share = (m(ids) == 0).double().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 8000) ** 0.5
    assert not (m.eval()(ids) == 0).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"position": "rotary"}, "position: got 'rotary'"),
        ({"position": "learned"}, "max_positions: got None"),
        ({"position": None, "max_positions": 3}, "max_positions: got 3"),
        ({"position": None, "dropout": 1.0}, "dropout: expected"),
    ],
)
def test_wrong_input_embeddings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputEmbedding(3, 4, **options)


def test_wrong_calls_of_input_embedding() -> None:
    m = InputEmbedding(3, 4, max_positions=2)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_segments=0"):
        m(ids, None, ids)
    with pytest.raises(IndexError):
        m(ids + 3)


SCALINGS: dict[str, Any] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_embedding(scaling: str, layout: str) -> None:
    """Lengths go up and down again: tables that were made for others must not show."""
    m = RotaryEmbedding(8, scaling=SCALINGS[scaling], layout=layout, max_positions=16)
    for length in (5, 40, 16, 3):
        q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
        inverse, factor = pyfuse.rope_frequencies(
            8, scaling=SCALINGS[scaling], seq_len=max(length, 16), max_position_embeddings=16
        )
        angles = torch.arange(length)[:, None] * inverse
        for x, y in zip((q, k), m(q, k), strict=True):
            cos, sin = angles.cos() * factor, angles.sin() * factor
            exact = pyfuse.rope(x, cos, sin, layout=layout, backend="eager")
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_positions_of_rotary_embedding() -> None:
    m = RotaryEmbedding(8, max_positions=32)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    at = torch.tensor([3, 4, 5, 6, 7, 8])
    long_q, long_k = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 9, 8)
    long_q[:, :, 3:], long_k[:, :, 3:] = q, k
    for y, long in zip(m(q, k, at), m(long_q, long_k), strict=True):
        torch.testing.assert_close(y, long[:, :, 3:])
    with pytest.raises(IndexError):
        m(q, k, at + 30)


def test_tables_stay_float32_and_leave_the_state_dict_alone() -> None:
    m = RotaryEmbedding(8).to(torch.bfloat16)
    assert not m.state_dict() and not list(m.parameters())
    q = torch.randn(1, 1, 2000, 8)
    exact, _ = RotaryEmbedding(8)(q, q)
    y, _ = copy.deepcopy(m)(q.bfloat16(), q.bfloat16())
    assert y.dtype == torch.bfloat16 and (y.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 7}, "head_dim"),
        ({"layout": "whole"}, "layout: got 'whole'"),
        ({"max_positions": 0}, "max_positions"),
        ({"scaling": {"rope_type": "unheard"}}, "unheard"),
    ],
)
def test_wrong_rotary_embeddings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**{"head_dim": 8, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (5, 7)], ids=str)
def test_sinusoidal_encoding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    m = SinusoidalEncoding(7, scale=2.5)
    x = torch.randn(shape).to(dtype)
    for length in (5, 3):  # a shorter one after a longer one
        part = x[..., :length, :]
        wide = torch.float64
        exact = 2.5 * part.to(wide) + pyfuse.sinusoidal_encoding(length, 7, dtype=wide)
        y = m(part)
        assert y.dtype == dtype
        assert (y.to(wide) - exact).abs().max() <= 1.1 * torch.finfo(dtype).eps * exact.abs().max()


def test_sinusoidal_encoding_with_the_sequence_first() -> None:
    x = torch.randn(5, 2, 6)
    y = SinusoidalEncoding(6, batch_first=False)(x)
    torch.testing.assert_close(y.transpose(0, 1), SinusoidalEncoding(6)(x.transpose(0, 1)))
    with pytest.raises(ValueError, match="x: expected"):
        SinusoidalEncoding(6)(torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match="dim"):
        SinusoidalEncoding(0)


def test_representations() -> None:
    assert "position='learned'" in repr(InputEmbedding(3, 4, max_positions=2))
    assert "layout='half'" in repr(RotaryEmbedding(8)) and "batch_first" in repr(
        SinusoidalEncoding(4)
    )
