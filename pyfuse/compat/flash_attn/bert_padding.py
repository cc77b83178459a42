"""flash_attn.bert_padding 2.8.3: the real tokens of a padded batch one after another, and back.

Everything here is differentiable, and runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class IndexFirstAxis:
    """`IndexFirstAxis.apply(input, indices)`: the rows `indices` [n] of input [rows, ...]."""

    @staticmethod
    def apply(input: Tensor, indices: Tensor) -> Tensor:
        """input[indices], [n, ...]. A row that is taken twice gets the sum of both gradients."""
        _check_rows("input", input)
        _check_indices(indices)
        return input.index_select(0, indices)


class IndexPutFirstAxis:
    """`IndexPutFirstAxis.apply(values, indices, first_axis_dim)`: the other way round."""

    @staticmethod
    def apply(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        """[first_axis_dim, ...], zero but for the rows `indices` [n], which are those of values [n, ...]."""
        _check_rows("values", values)
        _check_indices(indices)
        if indices.shape[0] != values.shape[0]:
            raise ValueError(
                f"indices: got {indices.shape[0]} of them, needs one for each of values' {values.shape[0]} rows"
            )
        output = values.new_zeros((first_axis_dim, *values.shape[1:]))
        return output.index_put((indices,), values)


class IndexFirstAxisResidual:
    """`IndexFirstAxisResidual.apply(input, indices)`: the rows, and input itself for a residual."""

    @staticmethod
    def apply(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return IndexFirstAxis.apply(input, indices), input


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of hidden_states [B, S, ...] that are not padding.

    attention_mask [B, S], bool or integers: not 0 for a token. unused_mask, alike: not 0 for a place that is kept
    without being used.

    Returns (tokens [T, ...], indices [T], cu_seqlens [B + 1], max_seqlen, seqused [B]): the tokens of either mask;
    their places in the flattened [B · S]; where each sequence begins, int32; the largest number of them in one; and how
    many of each are of attention_mask. max_seqlen is read from the device, as in the library.
    """
    used = _check_mask("attention_mask", attention_mask, hidden_states) != 0
    kept = used
    if unused_mask is not None:
        kept = used | (_check_mask("unused_mask", unused_mask, hidden_states) != 0)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), _largest(lengths), used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` where a row holds several sequences one after another, and padding only at its end.

    attention_mask_in_length [B, S], integers: the first numbers of row b are the lengths of its sequences, the others
    0: [[2, 3, 0, 0, 0, 0]] for two sequences in five of six places.
    Returns (tokens [T, ...], indices [T], cu_seqlens [sequences + 1], max_seqlen).
    """
    given = _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    place = torch.arange(given.shape[-1], device=given.device)
    indices = (place < given.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    lengths = given.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), _largest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens [T, ...] at their places `indices` [T] of a batch: [batch, seqlen, ...], zero elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _largest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    if hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected hidden_states' [B, S] of {tuple(hidden_states.shape)}, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point():
        raise TypeError(f"{name}: dtype {mask.dtype}, needs bool or integers")
    return mask


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() < 2:
        raise ValueError(f"{name}: expected [rows, ...], got shape {tuple(tensor.shape)}")


def _check_indices(indices: Tensor) -> None:
    if indices.dim() != 1:
        raise ValueError(f"indices: expected one dimension, got shape {tuple(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: dtype {indices.dtype}, needs torch.int64 or torch.int32")
