"""Time and memory of causal attention, forward and backward, against seqlen: the textbook formula and flashtile.

The formula stops where its score matrices would not fit; what it would need is then computed from its last measurement,
since they grow with the square of seqlen.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flashtile.bench import cases, machine, memory, timing
from flashtile.bench.cases import Case
from flashtile.bench.peers import PEERS, Bound

SHARE = 0.4
"""The part of free memory that the demo may take."""

MOST = {"cpu": 8 * 2**30}
"""Bytes that it takes at most, however much is free; a GPU's memory may be filled up to `SHARE`."""


@dataclass(frozen=True)
class Scaling:
    """What is measured; `seconds`: the most that one cell may take, `total`: all of them."""

    device: str = "cpu"
    dtype: str = "float32"
    seqlens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    heads: int = 4
    headdim: int = 64
    seconds: float = 30.0
    total: float = 55.0
    peers: tuple[str, ...] = ("textbook", "flashtile")

    def case(self, seqlen: int) -> Case:
        return Case("causal", 1, seqlen, self.heads, self.heads, self.headdim, self.dtype, self.device)


@dataclass(frozen=True)
class Point:
    """One cell. `ms` None: not run; then `extra` is what it would need, and `reason` says why."""

    peer: str
    seqlen: int
    ms: float | None
    extra: float
    reason: str = ""


def measure(scaling: Scaling, note: Callable[[str], None] = lambda text: None) -> Iterator[Point]:
    """Points by seqlen, then by peer; a peer that had to stop stays stopped."""
    last: dict[str, Point] = {}
    end = time.monotonic() + scaling.total
    for seqlen in scaling.seqlens:
        for peer in scaling.peers:
            note(f"{seqlen}: {peer}")
            before = last.get(peer)
            needed, seconds = _expected(scaling.case(seqlen), peer, before)
            reason = _obstacle(scaling, needed, seconds, before, end - time.monotonic())
            if reason:
                point = Point(peer, seqlen, None, needed, reason)
            else:
                point = Point(peer, seqlen, *_cell(scaling, seqlen, peer))
            last[peer] = point
            yield point


def _expected(case: Case, peer: str, before: Point | None) -> tuple[float, float]:
    """(bytes, seconds) that the cell should take, from the one before it."""
    if before is None:
        return float(PEERS[peer].matrix_memory(case)), 0.0
    growth = case.seqlen / before.seqlen
    memory_growth = growth**2 if PEERS[peer].quadratic else growth
    return before.extra * memory_growth, (before.ms or 0.0) / 1e3 * growth**2


def _obstacle(scaling: Scaling, needed: float, seconds: float, before: Point | None, left: float) -> str:
    """Why the cell is not run, or nothing."""
    limit = min(SHARE * machine.free_memory(scaling.device), MOST.get(scaling.device, float("inf")))
    if needed > limit:
        return f"would need {memory.gib(needed)}"
    if before is not None and before.ms is None:
        return before.reason
    # Twice: the traced call and the timed one.
    if 2 * seconds > scaling.seconds:
        return f"over {scaling.seconds / 2:g} s"
    return "out of time" if 2 * seconds > max(left, 0.0) else ""


def _cell(scaling: Scaling, seqlen: int, peer: str) -> tuple[float, float]:
    """(median milliseconds, bytes beyond inputs and outputs) of forward and backward."""
    case = scaling.case(seqlen)
    inputs = cases.tensors(case)
    bound = PEERS[peer].bind(case, inputs)
    # The traced call is also the warm-up.
    begin = timing.clock(case.device)
    peak = memory.allocated_peak(lambda: _call(bound), case.device)
    one = timing.clock(case.device) - begin
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    samples = timing.Samples()
    rounds = timing.Effort(scaling.seconds / 2, least=1, most=7).rounds(one)
    totals = [timing.one_round(bound, case.device, samples) for _ in range(rounds)]
    return 1e3 * statistics.median(totals), float(max(0, peak - outputs))


def _call(bound: Bound) -> object:
    out = bound.forward()
    return out, bound.backward(out)
