"""pyfuse.compat.flash_attn.bert_padding."""

from __future__ import annotations

import re

import pytest
import torch

from pyfuse.compat.flash_attn import bert_padding
from pyfuse.compat.flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("rest", [(), (4,), (2, 3)], ids=str)
def test_there_and_back(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, *rest, 2, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 2, 11, 13, 14]
    assert cu_seqlens.tolist() == [0, 3, 3, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and type(longest) is int
    assert used.tolist() == [3, 0, 3] and used.dtype == torch.int32
    back = pad_input(tokens, indices, 3, 5)
    seen = MASK.bool().reshape(3, 5, *(1 for _ in rest), 1)
    assert torch.equal(back, torch.where(seen, x, 0.0))
    upstream = torch.randn_like(back)
    grad = torch.autograd.grad(back, x, upstream)[0]
    assert torch.equal(grad, torch.where(seen, upstream, 0.0))


def test_kept_but_unused_places() -> None:
    unused = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    x = torch.randn(3, 5, 2)
    for convert in (torch.Tensor.bool, torch.Tensor.int):
        tokens, indices, cu_seqlens, longest, used = unpad_input(x, convert(MASK), convert(unused))
        assert torch.equal(tokens, x[(MASK + unused).bool()])
        assert indices.tolist() == [0, 1, 2, 3, 10, 11, 13, 14]
        assert cu_seqlens.tolist() == [0, 4, 4, 8] and longest == 4
        assert used.tolist() == [3, 0, 3]


def test_concatenated_sequences() -> None:
    """The three rows of the library's example."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert cu_seqlens.dtype == torch.int32


def test_empty_masks() -> None:
    for x, mask in (
        (torch.randn(2, 3, 4), torch.zeros(2, 3)),
        (torch.randn(0, 3, 4), torch.zeros(0, 3)),
    ):
        tokens, indices, cu_seqlens, longest, _ = unpad_input(x, mask.int())
        assert tokens.shape == (0, 4) and longest == 0 and not cu_seqlens.any()
        assert not pad_input(tokens, indices, *mask.shape).any()
        assert unpad_input_for_concatenated_sequences(x, mask.int())[2].tolist() == [0]


def test_rows_by_index() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 4, 1])
    assert torch.equal(index_first_axis(x, indices), x[indices])
    assert torch.equal(index_put_first_axis(x[:3], indices[1:], 9)[[0, 4, 1]], x[:3])
    rows, same = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices]) and torch.equal(same, x)
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:3], indices[1:], 9), x)
    assert (
        IndexFirstAxis.apply is index_first_axis and IndexPutFirstAxis.apply is index_put_first_axis
    )
    assert bert_padding.IndexFirstAxisResidual.apply is index_first_axis_residual


def test_what_does_not_fit() -> None:
    x, i = torch.zeros(2, 3, 4), torch.tensor([0])
    for error, message, call in (
        (
            ValueError,
            "attention_mask: expected hidden_states' [B, S]",
            lambda: unpad_input(x, MASK),
        ),
        (ValueError, "unused_mask: expected", lambda: unpad_input(x, MASK[:2, :3], MASK)),
        (
            TypeError,
            "attention_mask: dtype torch.float32",
            lambda: unpad_input(x, torch.ones(2, 3)),
        ),
        (
            ValueError,
            "in_length: expected",
            lambda: unpad_input_for_concatenated_sequences(x, MASK),
        ),
        (ValueError, "input: expected [rows, ...]", lambda: index_first_axis(torch.zeros(3), i)),
        (
            ValueError,
            "values: expected [rows, ...]",
            lambda: index_put_first_axis(torch.zeros(1), i, 3),
        ),
        (ValueError, "indices: expected one dimension", lambda: index_first_axis(x, i[None])),
        (TypeError, "indices: dtype torch.float32", lambda: index_first_axis(x, i.float())),
        (ValueError, "indices: got 1 of them, needs one", lambda: index_put_first_axis(x, i, 3)),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()
