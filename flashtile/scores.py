"""Score modifiers: what happens to a score between the dot product and the softmax, with derivatives.

They apply in this order, each optional:

    s = scale * q.k          (the sweep's own)
    s = softcap * tanh(s / softcap)
    s = s + bias[b, h, i, j]
    s = s - slope[h] * |i + seqlen_kv - seqlen_q - j|      (ALiBi, Press et al. 2022, aligned as the call says)
    s = score_mod(s, b, h, i, j)

then the mask. A modifier is a pair of functions on one tile of scores (batch, heads, queries, keys): `apply`, and
`backward`, the vector-Jacobian product at the same input, which adds to the gradients of the modifier's tensors.
`sinks` and dropout act on the softmax itself and live in the sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashtile import trace
from flashtile.mask_nodes import At
from flashtile.problem import Inputs, Problem
from flashtile.scalar_graph import Traced


class Tile(NamedTuple):
    """One tile's place: global index tensors, the same as slices (batch, heads, queries, keys), and what is allowed.

    `allowed`: bool, broadcastable to the tile; None where the mask forbids nothing.
    """

    at: At
    slices: tuple[slice, slice, slice, slice]
    allowed: Tensor | None = None


class Modifier(Protocol):
    def apply(self, score: Tensor, tile: Tile) -> Tensor: ...

    def backward(self, score: Tensor, grad: Tensor, tile: Tile) -> Tensor: ...


@dataclass
class Softcap:
    """Gemma 2 (2024), section 2: scores stay within (-cap, cap)."""

    cap: float

    def apply(self, score: Tensor, tile: Tile) -> Tensor:
        return torch.tanh(score / self.cap) * self.cap

    def backward(self, score: Tensor, grad: Tensor, tile: Tile) -> Tensor:
        return grad * (1 - torch.tanh(score / self.cap).square())


@dataclass
class Bias:
    """`bias` broadcasts to (batch, heads, seqlen_q, seqlen_kv); its gradient is summed tile by tile, in its shape.

    sharing: how many entries of the batch, one after the other, have one entry of the bias.
    """

    bias: Tensor
    grad: Tensor | None
    sharing: int = 1

    def _slices(self, tile: Tile) -> tuple[slice, ...]:
        sizes = self.bias.shape
        batch, *rest = (s if size > 1 else slice(0, 1) for s, size in zip(tile.slices, sizes, strict=True))
        return slice(None) if self.sharing > 1 else batch, *rest

    def _entries(self, tile: Tile) -> Tensor:
        return tile.at.batch.flatten() // self.sharing

    def apply(self, score: Tensor, tile: Tile) -> Tensor:
        part = self.bias[self._slices(tile)]
        return score + (part[self._entries(tile)] if self.sharing > 1 else part).to(score.dtype)

    def backward(self, score: Tensor, grad: Tensor, tile: Tile) -> Tensor:
        if self.grad is not None:
            summed = [dim for dim, size in enumerate(self.bias.shape) if size == 1]
            part = grad.sum(summed, keepdim=True) if summed else grad
            total = self.grad[self._slices(tile)]
            if self.sharing > 1:
                total.index_add_(0, self._entries(tile), part)
            else:
                total += part
        return grad


@dataclass
class Alibi:
    """`slopes` float, (1 or batch, heads, 1, 1)."""

    slopes: Tensor
    alignment: str
    grad: Tensor | None

    def _distance(self, score: Tensor, tile: Tile) -> Tensor:
        return (tile.at.aligned(self.alignment) - tile.at.key).abs().to(score.dtype)

    def _slices(self, tile: Tile) -> tuple[slice, slice]:
        return tile.slices[0] if len(self.slopes) > 1 else slice(0, 1), tile.slices[1]

    def apply(self, score: Tensor, tile: Tile) -> Tensor:
        return score - self.slopes[self._slices(tile)] * self._distance(score, tile)

    def backward(self, score: Tensor, grad: Tensor, tile: Tile) -> Tensor:
        if self.grad is not None:
            summed = (grad * self._distance(score, tile)).sum((-2, -1), keepdim=True)
            self.grad[self._slices(tile)] -= summed if len(self.slopes) > 1 else summed.sum(0, keepdim=True)
        return grad


@dataclass
class Custom:
    """A traced `score_mod` with its captured tensors."""

    graph: Traced
    tensors: Sequence[Tensor]
    grads: Sequence[Tensor | None]

    def apply(self, score: Tensor, tile: Tile) -> Tensor:
        at = tile.at
        changed = self.graph.evaluate(score, at.batch, at.head, at.query, at.key, self.tensors)
        return changed.to(score.dtype).expand(score.shape)

    def backward(self, score: Tensor, grad: Tensor, tile: Tile) -> Tensor:
        at, wanted = tile.at, [total is not None for total in self.grads]
        hidden = None if tile.allowed is None else ~tile.allowed
        grad, parts = self.graph.derivative(
            score, at.batch, at.head, at.query, at.key, self.tensors, grad, wanted, hidden
        )
        for total, part in zip(self.grads, parts, strict=True):
            if total is not None and part is not None:
                total += part
        return grad


@dataclass
class Grads:
    """Gradients of all but q, k and v, accumulated over tiles in the accumulator's dtype; None: not wanted."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    score: list[Tensor | None] = field(default_factory=list)


def zero_grads(inputs: Inputs, problem: Problem) -> Grads:
    """Zeroed gradients for what `problem.wanted` names; None for the rest."""
    wanted, dtype = problem.wanted, problem.accumulator
    if not (wanted.bias or wanted.alibi_slopes or wanted.sinks or any(wanted.score)):
        return Grads(score=[None] * len(inputs.score))

    def zeros(tensor: Tensor | None, want: bool) -> Tensor | None:
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if want and tensor is not None else None

    wants = wanted.score or (False,) * len(inputs.score)
    return Grads(
        zeros(inputs.bias, wanted.bias),
        zeros(inputs.alibi_slopes, wanted.alibi_slopes),
        zeros(inputs.sinks, wanted.sinks),
        [zeros(tensor, want) for tensor, want in zip(inputs.score, wants, strict=True)],
    )


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """What the gradient of the sinks, (heads,), loses; lse and delta: (batch, heads, seqlen_q) or (heads, total).

    A sink is a key of value 0: its gradient is its weight times 0 - delta, and no weight where the row's lse is -inf.
    """
    rows, deltas = (tensor.transpose(0, tensor.ndim - 2).flatten(1) for tensor in (lse, delta))
    weights = torch.exp(sinks.float()[:, None] - torch.where(rows == -torch.inf, torch.inf, rows))
    return (weights * deltas).sum(1)


def slope_gradient(values: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient of slopes, (heads,) or (batch, heads) as `like`, from each query's part of it.

    values: (batch, heads, seqlen_q), or (heads, total), whose sequences begin at `offsets`.
    """
    if offsets is None:
        sums = values.sum(-1)
        return sums if like.ndim == 2 and len(like) > 1 else sums.sum(0).expand(like.shape)
    if like.ndim == 1 or len(like) == 1:
        return values.sum(-1).expand(like.shape)
    rows = torch.arange(values.shape[-1], device=values.device)
    # Rows of no sequence hold 0, wherever they are counted.
    inside = torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp(max=len(like) - 1)
    return torch.stack([torch.zeros_like(values[0]).scatter_add(0, inside, head)[: len(like)] for head in values], 1)


def four_dimensions(tensor: Tensor) -> Tensor:
    """A view with leading dimensions of size 1; without the second of a bias's five, which is 1."""
    return tensor.squeeze(1) if tensor.ndim == 5 else tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)


def sharing(bias: Tensor, batch: int) -> int:
    """How many entries of a batch, one after the other, have one entry of a bias of four dimensions; 1 where all
    share one entry."""
    return batch // len(bias) if 1 < len(bias) < batch else 1


def modifiers(inputs: Inputs, problem: Problem, grads: Grads | None = None) -> list[Modifier]:
    """The modifiers that this call asks for, in order; `grads` receives their tensors' gradients."""
    grads = grads or Grads(score=[None] * len(inputs.score))
    chain: list[Modifier] = []
    if problem.softcap:
        chain.append(Softcap(problem.softcap))
    if inputs.bias is not None:
        bias = four_dimensions(inputs.bias)
        grad = None if grads.bias is None else grads.bias.view(bias.shape)
        chain.append(Bias(bias, grad, sharing(bias, problem.batch)))
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.to(problem.accumulator)
        shape = (-1, slopes.shape[-1], 1, 1)
        grad = None if grads.alibi_slopes is None else grads.alibi_slopes.view(shape)
        chain.append(Alibi(slopes.reshape(shape), problem.alignment, grad))
    if problem.score_mod:
        chain.append(Custom(trace.graph(problem.score_mod), inputs.score, grads.score))
    return chain
