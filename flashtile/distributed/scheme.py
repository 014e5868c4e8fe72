"""What all schemes share: the agreement, the rectangles of a pair of ranks, and States that merge in float32."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import parts, sums
from flashtile.check import sharding as check
from flashtile.distributed import balance
from flashtile.distributed.balance import Piece
from flashtile.distributed.groups import Agreement, Borrowed, Question, living, shared_seed
from flashtile.masks import Mask
from flashtile.parts import Gradients, Grads, Inputs, Local, Options, Part, Wanted, Whole

ALL, CAUSAL = '["full"]', '["causal","bottom_right"]'


class Rectangle(NamedTuple):
    """Queries of one rank against keys of one: where they lie on those ranks, which part of the whole, its mask."""

    rows: slice
    keys: slice
    part: Part
    mask: Mask


def rectangles(whole: Whole, queries: Sequence[Piece], keys: Sequence[Piece]) -> list[Rectangle]:
    """What some pieces of queries have to do with some pieces of keys, in as few calls as masks and modifiers allow."""
    grid = []
    for rows in queries:
        for columns in keys:
            part = whole.part(rows.begin, rows.length, columns.begin, columns.length)
            mask = parts.mask_of(whole, part) if rows.length and columns.length else None
            if mask is not None:
                grid.append(Rectangle(_local(rows), _local(columns), part, mask))
    if not whole.placeless or len(grid) < 2:
        return grid
    return _as_one_causal(grid) or _joined(grid)


def _local(piece: Piece) -> slice:
    return slice(piece.local, piece.local + piece.length)


def _as_one_causal(grid: list[Rectangle]) -> list[Rectangle]:
    """An early and a late piece of queries against the same two of keys under a causal mask: causal as they lie."""
    if len(grid) != 3 or [found.mask.token for found in grid] != [CAUSAL, ALL, CAUSAL]:
        return []
    first, below, last = grid
    square = first.part.queries == first.part.keys and (first.rows, last.rows) == (first.keys, last.keys)
    if not square or (below.rows, below.keys) != (last.rows, first.keys):
        return []
    ends = slice(first.rows.start, last.rows.stop)
    return [Rectangle(ends, ends, first.part, first.mask)]


def _joined(grid: list[Rectangle]) -> list[Rectangle]:
    """Neighbours whose scores are all visible become one: first along keys, then along queries."""
    for along in ("keys", "rows"):
        across = "rows" if along == "keys" else "keys"
        found: list[Rectangle] = []
        for each in sorted(grid, key=lambda each: (getattr(each, across).start, getattr(each, along).start)):
            last = found[-1] if found else None
            if (
                last is not None
                and last.mask.token == each.mask.token == ALL
                and getattr(last, across) == getattr(each, across)
                and getattr(last, along).stop == getattr(each, along).start
            ):
                reach = slice(getattr(last, along).start, getattr(each, along).stop)
                found[-1] = last._replace(keys=reach) if along == "keys" else last._replace(rows=reach)
            else:
                found.append(each)
        grid = found
    return grid


def hull(found: Sequence[Rectangle]) -> slice | None:
    """The keys of a rank that any of its rectangles reads; None: it reads none."""
    if not found:
        return None
    return slice(min(each.keys.start for each in found), max(each.keys.stop for each in found))


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Some tokens of a (batch, tokens, heads, headdim) or (tokens, heads, headdim) tensor."""
    return tensor[..., rows, :, :]


class Running:
    """The States of a rank's queries so far, merged in float32 (float64 for float64 inputs)."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def memory(self) -> tuple[Tensor, Tensor]:
        """For the results, not yet written."""
        inputs = self.whole.inputs
        q, v = inputs.q, inputs.v
        lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=self.whole.options.out_dtype)
        return out, q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=lse_dtype)

    def add(self, rows: slice, out: Tensor, lse: Tensor, last: bool = False) -> None:
        """One more State, of some of the queries; `last`: none follows, so that out is rounded once where it lies."""
        tokens = self.whole.inputs.q.shape[-3]
        if self.out is None and (rows.start, rows.stop) == (0, tokens):
            self.out, self.lse = out, lse
            return
        held, held_lse = self._wide() if not last or self.out is None or self.lse is None else (self.out, self.lse)
        sums.merge(rows_of(held, rows), held_lse[..., rows], out, lse)

    def _wide(self) -> tuple[Tensor, Tensor]:
        """(out, lse) to be written to, out in the accumulator's type."""
        q, v = self.whole.inputs.q, self.whole.inputs.v
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        if self.out is None or self.lse is None:
            self.out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
            self.lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf, dtype=dtype)
        self.out = self.out.to(dtype)
        return self.out, self.lse

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse) with the sinks, which no part has seen: keys of value 0."""
        sinks = self.whole.inputs.sinks
        if sinks is not None:
            out, lse = self._wide()
            first, count = self.whole.head, lse.shape[-2]
            with_sinks = torch.logaddexp(lse, sinks[first : first + count, None].to(lse.dtype))
            base = torch.where(with_sinks == -torch.inf, 0.0, with_sinks)
            self.out, self.lse = out * _by_row(torch.exp(lse - base)), with_sinks
        out, lse = self._wide() if self.out is None or self.lse is None else (self.out, self.lse)
        return out.to(self.whole.options.out_dtype).contiguous(), lse.contiguous()


def _by_row(weights: Tensor) -> Tensor:
    """(batch, heads, tokens) -> (batch, tokens, heads, 1)."""
    return weights.transpose(-1, -2).unsqueeze(-1)


class Scheme:
    """A way for processes to share attention. Two calls of it, forward and backward, run on all of them alike.

    tokens: the group that shares the sequence; heads: the group over which heads have been dealt out before, or None.
    """

    def __init__(self, tokens: dist.ProcessGroup | None, heads: dist.ProcessGroup | None, layout: str) -> None:
        self._tokens = None if tokens is None else Borrowed(tokens)
        self.layout = layout
        self.ranks = 1 if tokens is None else tokens.size()
        self.rank = 0 if tokens is None else tokens.rank()
        self.head_ranks = 1 if heads is None else heads.size()
        self.head_rank = 0 if heads is None else heads.rank()
        groups = [group for group in (tokens, heads) if group is not None]
        self.borrowed = [Borrowed(group) for group in groups]
        self.agreement = Agreement(groups)

    @property
    def tokens(self) -> Any:
        return None if self._tokens is None else living(self._tokens)

    def failed(self, error: Exception) -> None:
        self.agreement.failed(error)

    def forward(self, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
        question = self._ask(inputs, options, "forward")
        whole = self._whole(inputs, options)
        question.settle()
        whole = self._with_one_seed(whole)
        out, lse = self._forward(whole)
        return (out, lse) if out.ndim == inputs.q.ndim else (out[0], lse[0])

    def backward(
        self,
        inputs: Inputs,
        options: Options,
        wanted: Wanted,
        saved: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
    ) -> Gradients:
        # Where only heads are dealt out, the gradients that have been exchanged before were agreed on.
        question = self._ask(inputs, options, "backward") if self.ranks > 1 else None
        whole = self._whole(inputs, options)
        totals = whole.totals(wanted)
        if question is not None:
            question.settle()
        whole = self._with_one_seed(whole)
        if whole.inputs.q.ndim > inputs.q.ndim:
            saved = saved[0][None], saved[1][None]
            grads = tuple(None if grad is None else grad[None] for grad in grads)  # type: ignore[assignment]
        dq, dk, dv = self._backward(whole, saved, grads, totals)
        if totals.sinks is not None:
            parts.sinks_backward(whole, saved, grads, totals)
        if whole.inputs.q.ndim > inputs.q.ndim:
            dq, dk, dv = dq[0], dk[0], dv[0]
        return Gradients(dq, dk, dv, totals.bias, totals.alibi_slopes, totals.sinks, totals.score)

    @abstractmethod
    def _forward(self, whole: Whole) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self,
        whole: Whole,
        saved: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        totals: Grads,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def _with_one_seed(self, whole: Whole) -> Whole:
        if whole.inputs.seed is None:
            return whole
        groups = [living(group) for group in self.borrowed]
        return replace(whole, inputs=whole.inputs._replace(seed=shared_seed(whole.inputs.seed, groups)))

    def _whole(self, inputs: Inputs, options: Options) -> Whole:
        here = inputs.q.shape[-2]
        return parts.whole_of(inputs, options, self.ranks, here * self.head_rank, here * self.head_ranks)

    def pieces(self, rank: int, seqlen: int) -> list[Piece]:
        """The tokens that a rank holds."""
        return balance.pieces(self.layout, rank, self.ranks, seqlen)

    def between(self, whole: Whole, rank_q: int, rank_kv: int) -> list[Rectangle]:
        """The rectangles of one rank's queries and another's keys."""
        found: list[Rectangle] | None = whole.memory.get((rank_q, rank_kv))
        if found is None:
            sides = self.pieces(rank_q, whole.seqlen_q), self.pieces(rank_kv, whole.seqlen_kv)
            found = whole.memory[rank_q, rank_kv] = rectangles(whole, *sides)
        return found

    def _ask(self, inputs: Inputs, options: Options, which: str) -> Question:
        """Whether all processes make this call; what a process refuses by itself it says instead."""
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs[:-3])
        tensors = tuple((tensor.shape, tensor.dtype) for tensor in (*inputs.mask, *inputs.score))
        # Backwards they are the ones that have been compared.
        contents = parts.fingerprint(inputs) if which == "forward" and self.agreement.groups else 0
        key = (which, options, shapes, tensors, contents)
        if not self.agreement.knows(key) and self.ranks > 1 and which == "forward":
            self._check(inputs, options)
        call = f"{type(self).__name__.lower() if self.ranks > 1 else 'ulysses'} {which}"
        return self.agreement.ask(key, lambda: {"call": call} | _described(inputs, options, contents))

    def _check(self, inputs: Inputs, options: Options) -> None:
        try:
            for what, tensor in (("q", inputs.q), ("k", inputs.k)):
                length = tensor.shape[-3]
                count = len(balance.chunks(self.layout, 0, self.ranks))
                check.divisible(f"{what}: tokens of a rank", length, count, self.layout)
            parts.checked(self._whole(inputs, options), self.ranks)
        except (ValueError, NotImplementedError) as error:
            self.failed(error)
            raise


def _described(inputs: Inputs, options: Options, contents: int) -> dict[str, str]:
    """What must be the same on all ranks, in words; `contents`: of the mask's tensors."""
    found = {
        name: "none" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in zip(Inputs._fields[:-3], inputs[:-3], strict=True)
    }
    for name, tensors in (("mask's tensors", inputs.mask), ("score_mod's tensors", inputs.score)):
        found[name] = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors) or "none"
    found["mask's contents"] = f"{contents:016x}"
    return found | {name: str(value) for name, value in vars(replace(options, sharding="")).items()}


def call(whole: Whole, found: Rectangle, k: Tensor, v: Tensor, first: int = 0) -> Local:
    """A rectangle as a call of its own; `first`: which of the rank's keys k and v begin with."""
    keys = slice(found.keys.start - first, found.keys.stop - first)
    qkv = (rows_of(whole.inputs.q, found.rows), rows_of(k, keys), rows_of(v, keys))
    return parts.local(whole, found.part, found.mask, qkv)


def saved_of(
    found: Rectangle, saved: tuple[Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(out, lse) of a rectangle's queries, and their gradients."""
    (out, lse), (grad_out, grad_lse) = saved, grads
    return (
        (rows_of(out, found.rows), lse[..., found.rows]),
        (
            None if grad_out is None else rows_of(grad_out, found.rows),
            None if grad_lse is None else grad_lse[..., found.rows],
        ),
    )
