"""What tensors hold, as one number: for processes that must hold the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile.forgetting import Made, remembered
from flashtile.problem import Inputs
from flashtile.queues import capturing

_made: Made = {}
_KEPT = 4096


def fingerprint(inputs: Inputs) -> int:
    """A number that differs where the contents of a mask's tensors of whole numbers, or where sequences lie, differ.

    On a GPU it is read once a tensor, for that waits for the device; never while a graph is captured.
    """
    given = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqused_q, inputs.seqused_k, *inputs.mask)
    tensors = [each for each in given if each is not None and not each.is_floating_point()]
    if not tensors or tensors[0].is_meta:
        return 0
    if not tensors[0].is_cuda:
        return _fingerprint(tensors)
    if capturing(tensors[0].device):
        return 0
    # Masks are often views that a call makes of the user's tensor.
    owners = [tensor if tensor._base is None else tensor._base for tensor in tensors]
    views = tuple((tensor.storage_offset(), tensor.shape, tensor.stride()) for tensor in tensors)
    return remembered(_made, views, owners, lambda: _fingerprint(tensors), _KEPT)


_PIECE = 2**22
_ODD = 0x1E3779B97F4A7C15
"""A multiplier that spreads places over 64 bits (Knuth 1997, section 6.4)."""


def _fingerprint(tensors: Sequence[Tensor]) -> int:
    """Sums of numbers, each times a number that belongs to its place, modulo 2^64."""
    found = 0
    for tensor in tensors:
        numbers = tensor.detach().reshape(-1)
        for first in range(0, len(numbers), _PIECE):
            piece = numbers[first : first + _PIECE].to(torch.int64)
            places = torch.arange(first + 1, first + 1 + len(piece), device=piece.device)
            found = (31 * found + int(((piece + 1) * (places * _ODD | 1)).sum())) % 2**64
    return found
