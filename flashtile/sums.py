"""Sums of parts (see `parts`), in float32: outputs merged by their log-sum-exps, gradients added up."""

import importlib.util
from functools import cache

import torch
from torch import Tensor


def merge(held: Tensor, held_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges the State (out, lse) into (held, held_lse), in place, summed in float32: `state.merge` without copies."""
    if held.is_cuda and held.ndim == 4 and held.dtype is not torch.float64 and _has_triton():
        from flashtile.kernels import merging

        merging.merge(held, held_lse, out, lse)
        return
    merged = torch.logaddexp(held_lse, lse)
    base = torch.where(merged == -torch.inf, 0.0, merged)
    left, right = (torch.exp(each - base).transpose(-1, -2).unsqueeze(-1) for each in (held_lse, lse))
    held.copy_(held.to(merged.dtype) * left + out.to(merged.dtype) * right)
    held_lse.copy_(merged)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Sums:
    """The gradient of a (..., tokens, heads, headdim) tensor from those of its parts, added up in float32.

    target: where it belongs in the end; None: in memory of its own, without a copy where one part is all.
    """

    def __init__(self, like: Tensor, target: Tensor | None = None) -> None:
        self.like, self.target = like, target
        self.total: Tensor | None = None

    def add(self, rows: slice, gradient: Tensor, last: bool = False) -> None:
        """Some tokens' share; `last`: none follows, so that a sum of two is rounded once, in the tensor's own type."""
        if self.total is None and (rows.start, rows.stop) == (0, self.like.shape[-3]):
            self.total = gradient if self.target is None else self.target.copy_(gradient)
            return
        if last and self.total is not None:
            self.total[..., rows, :, :] += gradient
            return
        wide = torch.float64 if self.like.dtype is torch.float64 else torch.float32
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=wide, device=self.like.device)
        self.total = self.total.to(wide)
        self.total[..., rows, :, :] += gradient

    def result(self) -> Tensor:
        """In the tensor's own type; the sum's memory is free afterwards, but for the result."""
        total, self.total = self.total, None
        if self.target is not None:
            if total is None:
                return self.target.zero_()
            return total if total is self.target else self.target.copy_(total)
        if total is None:
            return torch.zeros(self.like.shape, dtype=self.like.dtype, device=self.like.device)
        return total.to(self.like.dtype)
