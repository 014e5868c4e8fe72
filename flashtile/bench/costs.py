"""What context parallelism costs: the time of every scheme from a machine's figures, and held against measurements.

Compute is dealt out evenly (zig-zag), at the rate that one device reaches. What the schemes add:

- ring: in each of P steps a rank computes its P-th part while K and V of the next step arrive; a step takes the longer
  of the two. Backward the gradients of K and V of an earlier step travel at the same time; some heads go round after
  others, and only the last ones' gradients travel alone. States and gradients are added up in memory.
- ulysses: one all-to-all of q, k, v before and one of out after; backward the gradients both ways. Not overlapped.
- gather: all K and V before, backward again, and the gradients of all K and V to their owners. Not overlapped.
- mixed: Ulysses within a node, a ring across nodes.

Up to `per_node` ranks share NVLink; where a scheme's ranks span nodes, what crosses goes over InfiniBand, one adapter a
rank. Every message costs a latency. What is left out: contention of kernels and transport for processors and memory,
launches of small calls, links that are shared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashtile.distributed.ring import BACKWARD_PAIRS, pieces_of

SCHEMES = ("ring", "ulysses", "gather", "mixed")
BACKWARD = 2.5
"""Products of the backward pass over those of the forward pass."""


@dataclass(frozen=True)
class Machine:
    """A device and its links. Bytes a second are a rank's, each way; flops are those that attention reaches."""

    forward_flops: float
    backward_flops: float
    nvlink: float
    infiniband: float
    memory: float
    latency: float = 1e-5
    per_node: int = 8

    def link(self, ranks: int) -> float:
        """Bytes a second between `ranks` neighbours: the slower link where they span nodes."""
        return self.nvlink if ranks <= self.per_node else self.infiniband

    def all_to_all(self, size: float, ranks: int) -> float:
        """Seconds to send `size` bytes, equal parts of it to each of `ranks`, oneself among them."""
        if ranks == 1:
            return 0.0
        within = min(ranks, self.per_node)
        near, far = size * (within - 1) / ranks / self.nvlink, size * (ranks - within) / ranks / self.infiniband
        return max(near, far) + self.latency * (ranks - 1) ** 0.5


@dataclass(frozen=True)
class Work:
    """One causal attention over a sequence that all ranks share."""

    seqlen: int
    heads: int
    heads_kv: int
    headdim: int
    element: int = 2

    def flops(self) -> float:
        """Of the forward pass: two products, half of the pairs."""
        return 2.0 * self.seqlen**2 * self.heads * self.headdim

    def rows(self, heads: int, ranks: int) -> float:
        """Numbers in a rank's share of a tensor with so many heads."""
        return self.seqlen / ranks * heads * self.headdim


@dataclass(frozen=True)
class Times:
    """Seconds of the passes."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def one_device(work: Work, machine: Machine) -> Times:
    return Times(work.flops() / machine.forward_flops, BACKWARD * work.flops() / machine.backward_flops)


def fits(scheme: str, work: Work, ranks: int, machine: Machine) -> bool:
    """Whether the number of heads and ranks allows the scheme."""
    if scheme == "ulysses":
        return work.heads % ranks == 0
    if scheme == "mixed":
        return ranks > machine.per_node and ranks % machine.per_node == 0 and work.heads % machine.per_node == 0
    return True


def predict(scheme: str, work: Work, ranks: int, machine: Machine) -> Times:
    """Seconds of a scheme; `fits` says whether it can run."""
    return _PREDICT[scheme](work, ranks, machine)


def _ring(work: Work, ranks: int, machine: Machine, dealt: int = 1, link: float | None = None) -> Times:
    """`dealt`: among how many ranks the heads of every place of the ring have been shared out before."""
    alone = one_device(work, machine)
    link = machine.link(ranks) if link is None else link
    heads, heads_kv = work.heads / dealt, max(1.0, work.heads_kv / dealt)
    tokens = work.seqlen / ranks * work.headdim
    keys = 2 * tokens * heads_kv
    message = keys * work.element / link + machine.latency
    # In place: a multiplication and a sum in float32 a step, and reading what is added.
    merge = tokens * heads * (16 + work.element) / machine.memory
    sums = (tokens * heads + keys) * (8 + work.element) / machine.memory
    # What some heads send and find is copied out of, and into, what all heads have.
    pieces = pieces_of(int(heads_kv), (work.seqlen // ranks) ** 2, BACKWARD_PAIRS)
    copies = (tokens * heads + 2 * keys) * 2 * work.element / machine.memory if ranks > 1 and pieces > 1 else 0.0
    step, back = alone.forward / dealt / ranks**2, alone.backward / dealt / ranks**2
    forward = step * ranks + (ranks - 1) * (max(0.0, message - step) + merge)
    # While a step is computed, the next one's keys are under way, and from the third on the last one's gradients.
    under_way = [(number < ranks - 1) + (number > 1) for number in range(ranks)]
    waits = sum(max(0.0, message * count - back) for count in under_way)
    # The gradients of some heads' last step travel while the next heads are computed, those of the last ones alone.
    alone_at_last = message / pieces if ranks > 1 else 0.0
    backward = back * ranks + waits + (ranks - 1) * sums + copies + alone_at_last
    return Times(forward, backward)


def _ulysses(work: Work, ranks: int, machine: Machine) -> Times:
    alone = one_device(work, machine)
    to_heads, to_tokens = _exchanges(work, ranks, machine)
    return Times(alone.forward / ranks + to_heads + to_tokens, alone.backward / ranks + to_heads + to_tokens)


def _exchanges(work: Work, ranks: int, machine: Machine, shares: int | None = None) -> tuple[float, float]:
    """Seconds of the all-to-alls of q, k, v (or their gradients) and of out; `shares`: among how many tokens lie."""
    heads_kv = max(work.heads_kv, ranks)
    found = []
    for heads in (work.heads + 2 * heads_kv, work.heads):
        size = work.rows(heads, shares or ranks) * work.element
        # Written in the order of the ranks, and again in that of the sequence.
        found.append(machine.all_to_all(size, ranks) + (4 * size / machine.memory if ranks > 1 else 0.0))
    return found[0], found[1]


def _gather(work: Work, ranks: int, machine: Machine) -> Times:
    alone = one_device(work, machine)
    share = 2 * work.rows(work.heads_kv, ranks) * work.element
    travel = (ranks - 1) * share / machine.link(ranks) + machine.latency * (ranks - 1) ** 0.5 if ranks > 1 else 0.0
    copies = 4 * share * ranks / machine.memory if ranks > 1 else 0.0
    return Times(alone.forward / ranks + travel + copies, alone.backward / ranks + 2 * (travel + copies))


def _mixed(work: Work, ranks: int, machine: Machine) -> Times:
    dealt = min(machine.per_node, ranks)
    ring = _ring(work, ranks // dealt, machine, dealt, machine.infiniband)
    to_heads, to_tokens = _exchanges(work, dealt, machine, ranks)
    return Times(ring.forward + to_heads + to_tokens, ring.backward + to_heads + to_tokens)


_PREDICT: dict[str, Callable[[Work, int, Machine], Times]] = {
    "ring": _ring,
    "ulysses": _ulysses,
    "gather": _gather,
    "mixed": _mixed,
}


def best(work: Work, ranks: int, machine: Machine) -> tuple[str, Times]:
    """The fastest scheme that fits, forward and backward together."""
    found = {name: predict(name, work, ranks, machine) for name in SCHEMES if fits(name, work, ranks, machine)}
    name = min(found, key=lambda name: found[name].both)
    return name, found[name]


def efficiency(work: Work, ranks: int, machine: Machine, times: Times) -> float:
    """The share of `ranks` times one device's speed."""
    return one_device(work, machine).both / (ranks * times.both)


def machine_of(record: dict[str, Any], row: dict[str, Any]) -> Machine:
    """A measured machine: its links, and the rates that one device reached at the length of `row`."""
    settings, link = record["settings"], record["link"]
    work = Work(row["seqlen"], settings["heads"], settings["heads"], settings["headdim"])
    rates = [
        factor * work.flops() / (row[name]["median"] / 1e3)
        for name, factor in (("forward", 1.0), ("backward", BACKWARD))
    ]
    bandwidth = link["bandwidth"]
    return Machine(rates[0], rates[1], bandwidth, bandwidth, link["memory"], link["latency"], record["ranks"])


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of a pass of a scheme, as predicted and as measured, medians of rounds."""

    seqlen: int
    scheme: str
    which: str
    predicted: float
    measured: float


def validate(record: dict[str, Any]) -> list[Comparison]:
    """The model against a record of `flashtile.bench.scaling`: every scheme and length that it holds.

    A ring's calls are as long as a rank's share, so it computes at the rate that one device reached at that length, if
    it was measured.
    """
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    alone = {row["seqlen"]: row for row in rows if row["way"] == "one"}
    element = 2 if record["settings"]["dtype"] in ("bfloat16", "float16") else 4
    found = []
    for row in rows:
        if row["way"] not in SCHEMES or row["seqlen"] not in alone:
            continue
        length = row["seqlen"] // record["ranks"] if row["way"] == "ring" else row["seqlen"]
        machine = machine_of(record, alone.get(length, alone[row["seqlen"]]))
        settings = record["settings"]
        work = Work(row["seqlen"], settings["heads"], settings["heads"], settings["headdim"], element)
        times = predict(row["way"], work, record["ranks"], machine)
        for which, seconds in (("forward", times.forward), ("backward", times.backward)):
            found.append(Comparison(row["seqlen"], row["way"], which, 1e3 * seconds, row[which]["median"]))
    return found
