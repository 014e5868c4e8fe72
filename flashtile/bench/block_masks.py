"""FlexAttention's block masks of long sequences, made piece by piece."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

WHOLE = 32768
"""Tokens up to which FlexAttention's block mask is made in one piece, of 8 bytes for each query and key."""

ROWS = 1024
"""Queries of a piece beyond that, a multiple of its blocks' 128: 1 GiB for 131072 keys."""


def block_mask(mask_mod: Callable[..., Any], seqlen: int, device: str) -> BlockMask:
    """FlexAttention's block mask of self-attention, for any batch entry and head.

    PyTorch makes the mask of all queries and keys that it is asked for first; of long ones it is asked for some rows at
    a time.
    """
    if seqlen <= WHOLE:
        return create_block_mask(mask_mod, None, None, seqlen, seqlen, device=device)
    pieces = [
        create_block_mask(_below(mask_mod, first), None, None, min(ROWS, seqlen - first), seqlen, device=device)
        for first in range(0, seqlen, ROWS)
    ]

    # Counts are (batch, heads, row of blocks), indices (batch, heads, row of blocks, column of blocks).
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces], dim=2)

    return BlockMask.from_kv_blocks(
        joined("kv_num_blocks"),
        joined("kv_indices"),
        joined("full_kv_num_blocks"),
        joined("full_kv_indices"),
        BLOCK_SIZE=pieces[0].BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(seqlen, seqlen),
    )


def _below(mask_mod: Callable[..., Any], first: int) -> Callable[..., Any]:
    """The function for queries that are counted from `first` on."""
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx + first, kv_idx)
