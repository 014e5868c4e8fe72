"""Every error a user can meet: what the argument was, what is allowed, what to do. Checks exist only here.

Messages read "argument: got X, need Y; try Z". Nothing here reads a tensor's contents, except where its docstring says
that it runs inside the operator; all of it may be traced by torch.compile.
"""

from flashtile.check.options import (
    alibi_slopes,
    alignment,
    backend,
    bias,
    block_mask,
    deterministic,
    dropout,
    flag,
    mask_argument,
    out_dtype,
    scale,
    score_mod,
    sinks,
    softcap,
    window,
)
from flashtile.check.sequences import offsets, packed_bias, packing, packing_complete
from flashtile.check.sharding import known_sharding
from flashtile.check.tensors import qkv, tensors
from flashtile.check.values import (
    block_mask_value,
    block_value,
    chunk_size,
    custom_value,
    dense_value,
    document_value,
    dropout_mask,
    mask,
    prefix_length,
    states,
    window_side,
)

__all__ = [
    "alibi_slopes",
    "alignment",
    "backend",
    "bias",
    "block_mask",
    "block_mask_value",
    "block_value",
    "chunk_size",
    "custom_value",
    "dense_value",
    "deterministic",
    "document_value",
    "dropout",
    "dropout_mask",
    "flag",
    "known_sharding",
    "mask",
    "mask_argument",
    "offsets",
    "out_dtype",
    "packed_bias",
    "packing",
    "packing_complete",
    "prefix_length",
    "qkv",
    "scale",
    "score_mod",
    "sinks",
    "softcap",
    "states",
    "tensors",
    "window",
    "window_side",
]
