"""What the copy engine is told: tiles of the caller's own tensors."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper.meta import Meta
from flashtile.backends.hopper.sums import PIECE_COLUMNS, PIECE_ROWS

_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float8_e5m2: gl.float8e5,
}


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Tiles of `rows` of one head of a (batch, seqlen, heads, headdim) or packed (total, heads, headdim) tensor."""
    return _tiles(tensor if tensor.ndim == 4 else tensor[None], [1, rows, 1, columns])


def value_descriptor(v: Tensor, meta: Meta) -> Any:
    """Tiles of values; those of 8 bits lie on their side."""
    if meta.eight:
        return _tiles(v, [1, 1, meta.block_dv, meta.tile_kv])
    return descriptor(v, meta.tile_kv, meta.block_dv)


def piece_descriptor(sums: Tensor) -> Any:
    """Pieces of the sums of dQ."""
    return _tiles(sums, [1, 1, PIECE_ROWS.value, PIECE_COLUMNS.value])


def _tiles(tensor: Tensor, shape: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(shape, _TYPES[tensor.dtype])
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), shape, layout)
