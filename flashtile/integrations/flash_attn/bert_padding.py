"""`flash_attn.bert_padding`: between padded (batch, seqlen, ...) and packed (total, ...) tensors, differentiably."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] along the first axis."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with `values` at `indices` and 0 elsewhere."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input without its gradient)."""
    return input[indices], input.detach()


class IndexFirstAxis:
    """`index_first_axis` as libraries call it that knew it as an autograd function."""

    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    """`index_put_first_axis`, likewise."""

    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual:
    """`index_first_axis_residual`, likewise."""

    apply = staticmethod(index_first_axis_residual)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that a mask keeps.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1: keep.
        unused_mask: likewise, 1: the place is kept too, but not counted as used.

    Returns:
        hidden_states (total, ...), indices (total,) into batch * seqlen, cu_seqlens int32 (batch + 1,), the longest
        sequence's length, and seqused int32 (batch,), the tokens in attention_mask of each sequence.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    packed = hidden_states.flatten(0, 1)[indices]
    return packed, indices, _offsets(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs rows that hold several sequences each: attention_mask_in_length (batch, seqlen) lists their lengths.

    [[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]] says that row 0 begins with sequences of 2 and 3 tokens and ends in one
    token of padding, and that row 1 is one sequence.

    Returns:
        hidden_states (total, ...), indices, cu_seqlens (sequences + 1,) and the longest sequence's length.
    """
    used = attention_mask_in_length.sum(dim=-1, keepdim=True)
    kept = torch.arange(attention_mask_in_length.shape[1], device=used.device) < used
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths > 0].to(torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    return hidden_states.flatten(0, 1)[indices], indices, _offsets(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: (batch, seqlen, ...) with the packed tokens at `indices` and 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> Any:
    return int(lengths.max()) if lengths.numel() else 0
