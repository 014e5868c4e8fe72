"""Ring attention: keys and values travel, queries stay (Liu et al. 2023), in the zig-zag order of `balance`.

In step s a rank meets the keys of the rank s places before it. While it computes, the next step's keys are under way.
Keys are sent by the rank that owns them, and only those that the receiver's mask can see: the ranks know each other's
rectangles, for those follow from the mask and the layout alone. Backwards the gradients of keys and values go straight
home, while the next step computes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import parts
from flashtile.distributed.groups import peer
from flashtile.distributed.scheme import Rectangle, Running, Scheme, call, hull, rows_of, saved_of
from flashtile.parts import Grads, Whole


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
    """The keys and values of a rank that this one's queries meet, from the rank's key `first` on."""

    rank: int
    found: list[Rectangle]
    k: Tensor
    v: Tensor
    first: int


class Ring(Scheme):
    """See above; of one rank, the whole attention in one call."""

    def _forward(self, whole: Whole) -> tuple[Tensor, Tensor]:
        running = Running(whole)
        for step, arrival in enumerate(self._arrivals(whole)):
            for found in arrival.found:
                part = call(whole, found, arrival.k, arrival.v, arrival.first)
                running.add(found.rows, *parts.forward(part), last=self._last(step, arrival, found))
        return running.result()

    def _last(self, step: int, arrival: "Arrival", found: Rectangle) -> bool:
        """Whether no other rectangle of this rank's queries follows."""
        return step == self.ranks - 1 and found is arrival.found[-1]

    def _arrivals(self, whole: Whole) -> Iterator[Arrival]:
        """What each step meets; while the caller works on one, the next is under way."""
        inputs = whole.inputs
        under_way: Exchange | None = None
        for step in range(self.ranks):
            source = (self.rank - step) % self.ranks
            found = self.between(whole, self.rank, source)
            arrived = under_way.wait() if under_way is not None else None
            under_way = self._send_keys(whole, step + 1) if step + 1 < self.ranks else None
            if step == 0:
                yield Arrival(source, found, inputs.k, inputs.v, 0)
            elif arrived is not None:
                needed = hull(found)
                yield Arrival(source, found, *arrived, needed.start if needed is not None else 0)
            else:
                yield Arrival(source, [], inputs.k, inputs.v, 0)

    def _send_keys(self, whole: Whole, step: int) -> Exchange:
        inputs = whole.inputs
        exchange = Exchange(self.tokens, step)
        target, source = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
        if (given := hull(self.between(whole, target, self.rank))) is not None:
            exchange.send((rows_of(inputs.k, given), rows_of(inputs.v, given)), target)
        if (needed := hull(self.between(whole, self.rank, source))) is not None:
            exchange.receive((rows_of(inputs.k, needed), rows_of(inputs.v, needed)), source)
        return exchange.start()

    def _backward(
        self,
        whole: Whole,
        saved: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        totals: Grads,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = whole.inputs.q, whole.inputs.k, whole.inputs.v
        sums = parts.Sums(q), parts.Sums(k), parts.Sums(v)
        under_way: Exchange | None = None
        for step, arrival in enumerate(self._arrivals(whole)):
            here = parts.Sums(arrival.k), parts.Sums(arrival.v)
            for found in arrival.found:
                part = call(whole, found, arrival.k, arrival.v, arrival.first)
                dq, dk, dv = parts.backward(part, *saved_of(found, saved, grads), totals)
                keys = slice(found.keys.start - arrival.first, found.keys.stop - arrival.first)
                sums[0].add(found.rows, dq, last=self._last(step, arrival, found))
                here[0].add(keys, dk)
                here[1].add(keys, dv)
            if step == 0:
                sums = sums[0], *here
                continue
            self._came_home(whole, step - 1, under_way, sums)
            pair = (here[0].result(), here[1].result()) if arrival.found else None
            under_way = self._send_home(whole, step, pair)
        self._came_home(whole, self.ranks - 1, under_way, sums)
        return sums[0].result(), sums[1].result(), sums[2].result()

    def _send_home(self, whole: Whole, step: int, pair: tuple[Tensor, Tensor] | None) -> Exchange:
        """The gradients of this step's keys to their owner, and those of this rank's keys from who met them now."""
        exchange = Exchange(self.tokens, self.ranks + step)
        other, owner = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
        if pair is not None:
            exchange.send(pair, owner)
        if (given := hull(self.between(whole, other, self.rank))) is not None:
            exchange.receive((rows_of(whole.inputs.k, given), rows_of(whole.inputs.v, given)), other)
        return exchange.start()

    def _came_home(self, whole: Whole, step: int, under_way: Exchange | None, sums: tuple["parts.Sums", ...]) -> None:
        arrived = under_way.wait() if under_way is not None else None
        if arrived is None:
            return
        given = hull(self.between(whole, (self.rank + step) % self.ranks, self.rank))
        if given is not None:
            last = step == self.ranks - 1
            sums[1].add(given, arrived[0], last)
            sums[2].add(given, arrived[1], last)
