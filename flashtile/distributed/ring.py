"""Ring attention: keys and values travel, queries stay (Liu et al. 2023), in the zig-zag order of `balance`.

In step s a rank meets the keys of the rank s places before it. While it computes, the next step's keys are under way.
Keys are sent by the rank that owns them, and only those that the receiver's mask can see: the ranks know each other's
rectangles, for those follow from the mask and the layout alone. Backwards the gradients of keys and values go straight
home, while the next step computes.

Long sequences go round some heads at a time: what is in flight, keys of neighbours, float32 sums and gradients on their
way home, is then a fraction of a rank's tensors, and the last message of some heads hides behind the work of the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import parts
from flashtile.distributed.groups import peer
from flashtile.distributed.scheme import Rectangle, Running, Scheme, call, hull, rows_of, saved_of
from flashtile.parts import Grads, Whole
from flashtile.sums import Sums

FORWARD_PAIRS, BACKWARD_PAIRS = 2**35, 2**29
"""Pairs of a query and a key in a step of some heads, at least: enough work to keep a GPU busy, for longer than the
host takes to launch it. Backwards much more is in flight for every key."""
MOST_PIECES = 8
"""Into how many of some heads a call is cut at most: what more would save is little beside a rank's own tensors."""

_Saved = tuple[Tensor, Tensor]
_Grads = tuple[Tensor | None, Tensor | None]


class Exchange:
    """Messages under way: one pair of tensors out, one pair in, either of which may be missing."""

    def __init__(self, group: dist.ProcessGroup, step: int) -> None:
        self.group, self.step = group, step
        self.operations: list[dist.P2POp] = []
        self.arriving: tuple[Tensor, Tensor] | None = None
        self.leaving: tuple[Tensor, Tensor] | None = None
        self.works: list[dist.Work] = []

    def send(self, pair: tuple[Tensor, Tensor], rank: int) -> None:
        # Kept until `wait`: the transport reads them in its own time.
        self.leaving = pair[0].contiguous(), pair[1].contiguous()
        self._plan(dist.isend, self.leaving, rank)

    def receive(self, like: tuple[Tensor, Tensor], rank: int) -> None:
        self.arriving = (torch.empty(like[0].shape, dtype=like[0].dtype, device=like[0].device),
                         torch.empty(like[1].shape, dtype=like[1].dtype, device=like[1].device))  # fmt: skip
        self._plan(dist.irecv, self.arriving, rank)

    def _plan(self, operation: Callable[..., Any], pair: tuple[Tensor, Tensor], rank: int) -> None:
        for place, tensor in enumerate(pair):
            if tensor.numel():
                other, tag = peer(self.group, rank), 2 * self.step + place
                self.operations.append(dist.P2POp(operation, tensor, other, self.group, tag))

    def start(self) -> "Exchange":
        if self.operations:
            self.works = dist.batch_isend_irecv(self.operations)
        return self

    def wait(self) -> tuple[Tensor, Tensor] | None:
        """What has arrived; on a GPU the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        self.leaving = None
        return self.arriving


class Arrival(NamedTuple):
    """What some heads of this rank's queries meet in a step: their rectangles with another rank's keys, and those keys
    and values from that rank's key `first` on."""

    step: int
    found: list[Rectangle]
    k: Tensor
    v: Tensor
    first: int


class Keys:
    """The keys of all steps of some calls, one after the other; while one is worked on, the next are under way."""

    def __init__(self, ring: "Ring", wholes: Sequence[Whole]) -> None:
        self.ring = ring
        self.left = [(whole, step) for whole in wholes for step in range(ring.ranks)]
        self.under_way: Exchange | None = None

    def next(self) -> Arrival:
        """The keys of the next step. Nothing here holds them, so that their memory is free when they have been met."""
        whole, step = self.left.pop(0)
        found = self.ring.between(whole, self.ring.rank, self.ring.behind(step))
        arrived = self.under_way.wait() if self.under_way is not None else None
        self.under_way = self.ring.send_keys(*self.left[0]) if self.left and self.left[0][1] > 0 else None
        if step == 0 or arrived is None:
            return Arrival(step, found if step == 0 else [], whole.inputs.k, whole.inputs.v, 0)
        needed = hull(found)
        return Arrival(step, found, *arrived, needed.start if needed is not None else 0)


@dataclass
class Work:
    """The backward pass over some heads: what it is given, and the sums of dq, dk and dv."""

    whole: Whole
    saved: _Saved
    grads: _Grads
    sums: list[Sums]
    results: list[Tensor] = field(default_factory=list)

    def finish(self, sums: Sequence[Sums]) -> None:
        """The next of the results: dq first, then dk and dv."""
        self.results += [each.result() for each in sums]


class Heads(NamedTuple):
    """Some heads of a call: the call of those, and which they are."""

    whole: Whole
    queries: slice
    keys: slice

    @classmethod
    def of(cls, whole: Whole, keys: slice) -> "Heads":
        group = whole.inputs.q.shape[-2] // max(1, whole.inputs.k.shape[-2])
        every = keys == slice(0, whole.inputs.k.shape[-2])
        return cls(whole if every else whole.of_heads(keys), slice(group * keys.start, group * keys.stop), keys)

    def work(self, saved: _Saved, grads: _Grads, results: Sequence[Tensor] | None) -> Work:
        """Their backward pass, into these heads of `results`, of all; None: into memory of its own."""
        (out, lse), (grad_out, grad_lse), queries = saved, grads, self.queries
        sums = []
        for place, each in enumerate(tensors_of(self.whole)):
            heads = self.keys if place else queries
            sums.append(Sums(each, None if results is None else results[place][..., heads, :]))
        return Work(
            self.whole,
            (out[..., queries, :], lse[..., queries, :]),
            (
                None if grad_out is None else grad_out[..., queries, :],
                None if grad_lse is None else grad_lse[..., queries, :],
            ),
            sums,
        )


def pieces_of(heads: int, pairs: int, least: int) -> int:
    """Into how many pieces key/value heads with so many pairs each are cut; `least`: pairs of a piece."""
    return max(1, min(heads, MOST_PIECES, heads * pairs // least))


def tensors_of(whole: Whole) -> tuple[Tensor, Tensor, Tensor]:
    return whole.inputs.q, whole.inputs.k, whole.inputs.v


class Homeward:
    """Gradients of keys on their way to the owners of those: while one exchange is under way, the next are computed."""

    def __init__(self, ring: "Ring") -> None:
        self.ring = ring
        self.under_way: tuple[Work, int, Exchange] | None = None

    def send(self, work: Work, step: int, pair: tuple[Tensor, Tensor] | None) -> None:
        """The gradients of this step's keys to their owner, and those of this rank's keys from who met them now."""
        self.receive()
        exchange = Exchange(self.ring.tokens, self.ring.ranks + step)
        if pair is not None:
            exchange.send(pair, self.ring.behind(step))
        if step > 0 and (given := self._given(work, step)) is not None:
            inputs = work.whole.inputs
            exchange.receive((rows_of(inputs.k, given), rows_of(inputs.v, given)), self.ring.behind(-step))
        self.under_way = work, step, exchange.start()

    def _given(self, work: Work, step: int) -> slice | None:
        """Which of this rank's keys the rank that is `step` places after it has met."""
        return hull(self.ring.between(work.whole, self.ring.behind(-step), self.ring.rank))

    def receive(self) -> None:
        """Adds up what has come home; the last step's completes the sums."""
        if self.under_way is None:
            return
        (work, step, exchange), self.under_way = self.under_way, None
        last = step == self.ring.ranks - 1
        arrived, given = exchange.wait(), self._given(work, step) if step > 0 else None
        if arrived is not None and given is not None:
            for total, gradient in zip(work.sums[1:], arrived, strict=True):
                total.add(given, gradient, last)
        if last:
            work.finish(work.sums[1:])


class Ring(Scheme):
    """See above; of one rank, the whole attention in one call."""

    def behind(self, step: int) -> int:
        """The rank that lies `step` places before this one."""
        return (self.rank - step) % self.ranks

    def _by_heads(self, whole: Whole, pairs: int) -> list[Heads]:
        """The call in pieces of some heads, each with about so many pairs in a step, or more."""
        *batch, queries, _, _ = whole.inputs.q.shape
        heads, keys = whole.inputs.k.shape[-2], whole.inputs.k.shape[-3] * prod(batch)
        count = pieces_of(heads, queries * keys, pairs) if self.ranks > 1 else 1
        bounds = [heads * place // count for place in range(count + 1)]
        return [Heads.of(whole, slice(*ends)) for ends in pairwise(bounds)]

    def _forward(self, whole: Whole) -> _Saved:
        pieces = self._by_heads(whole, FORWARD_PAIRS)
        keys = Keys(self, [piece.whole for piece in pieces])
        if len(pieces) == 1:
            return self._attend(whole, keys)
        out, lse = Running(whole).memory()
        for piece in pieces:
            out[..., piece.queries, :], lse[..., piece.queries, :] = self._attend(piece.whole, keys)
        return out, lse

    def _attend(self, whole: Whole, keys: Keys) -> _Saved:
        """(out, lse) of one piece."""
        running = Running(whole)
        for _ in range(self.ranks):
            self._meet(running, keys.next())
        return running.result()

    def _meet(self, running: Running, arrival: Arrival) -> None:
        for found in arrival.found:
            part = call(running.whole, found, arrival.k, arrival.v, arrival.first)
            running.add(found.rows, *parts.forward(part), last=self._is_last(arrival, found))

    def _is_last(self, arrival: Arrival, found: Rectangle) -> bool:
        """Whether no other rectangle of these queries follows."""
        return arrival.step == self.ranks - 1 and found is arrival.found[-1]

    def _backward(self, whole: Whole, saved: _Saved, grads: _Grads, totals: Grads) -> tuple[Tensor, Tensor, Tensor]:
        pieces = self._by_heads(whole, BACKWARD_PAIRS)
        results = None
        if len(pieces) > 1:
            results = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in tensors_of(whole)]
        works = [piece.work(saved, grads, results) for piece in pieces]
        keys, homeward = Keys(self, [work.whole for work in works]), Homeward(self)
        for work in works:
            for step in range(self.ranks):
                homeward.send(work, step, self._differentiate(work, keys.next(), totals))
        homeward.receive()
        dq, dk, dv = results or works[0].results
        return dq, dk, dv

    def _differentiate(self, work: Work, arrival: Arrival, totals: Grads) -> tuple[Tensor, Tensor] | None:
        """Adds to dq, and of the first step to dk and dv; of the others returns what belongs to the keys' owner."""
        here = [Sums(arrival.k), Sums(arrival.v)] if arrival.step else work.sums[1:]
        for found in arrival.found:
            part = call(work.whole, found, arrival.k, arrival.v, arrival.first)
            dq, dk, dv = parts.backward(part, *saved_of(found, work.saved, work.grads), totals)
            keys = slice(found.keys.start - arrival.first, found.keys.stop - arrival.first)
            work.sums[0].add(found.rows, dq, last=self._is_last(arrival, found))
            here[0].add(keys, dk)
            here[1].add(keys, dv)
        if arrival.step == self.ranks - 1:
            work.finish(work.sums[:1])
        return (here[0].result(), here[1].result()) if arrival.step and arrival.found else None

    def send_keys(self, whole: Whole, step: int) -> Exchange:
        """This rank's keys to the one `step` places after it, for which it gets those of the one as far before it."""
        inputs, exchange = whole.inputs, Exchange(self.tokens, step)
        target, source = self.behind(-step), self.behind(step)
        if (given := hull(self.between(whole, target, self.rank))) is not None:
            exchange.send((rows_of(inputs.k, given), rows_of(inputs.v, given)), target)
        if (needed := hull(self.between(whole, self.rank, source))) is not None:
            exchange.receive((rows_of(inputs.k, needed), rows_of(inputs.v, needed)), source)
        return exchange.start()
