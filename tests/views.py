"""Views: each holds the values of a contiguous tensor in other memory, which is NaN beside them."""

from collections.abc import Callable

import torch
from torch import Tensor


def _sliced(tensor: Tensor) -> Tensor:
    padded = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    window = padded[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return window.copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _last_strided(tensor: Tensor) -> Tensor:
    padded = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    return padded[..., ::2].copy_(tensor)


def _last_outermost(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "sliced": _sliced,
    "transposed": _transposed,
    "last_strided": _last_strided,
    "last_outermost": _last_outermost,
}
