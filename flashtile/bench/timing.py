"""Time of several peers, taken in turns, so that a slow spell of the machine falls on all alike: A B C, C A B.

Each round has an order of its own, drawn from a fixed seed. In the same order every round, each peer would always run
on the clock that the one before it left, and a card at its power limit needs more than a tenth of a second to find
another: on an H200 a forward pass of FlashAttention-3 took 1.04 ms after 30 ms of FlashAttention-2, which draws little,
and 1.15 ms after 30 ms of a faster kernel.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashtile.bench.peers import Bound

PASSES = ("forward", "backward")

ORDER = "drawn each round"
"""How turns are taken, for records."""

LONG = 1.0
"""Seconds of a call that is warm-up enough for those that follow."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: each peer gets `seconds` a case, but at least `least` rounds and at most `most`."""

    seconds: float = 10.0
    least: int = 3
    most: int = 30

    def rounds(self, one: float) -> int:
        """Rounds of a peer that takes `one` second each."""
        return int(min(self.most, max(self.least, self.seconds / max(one, 1e-9))))


@dataclass
class Samples:
    """Seconds of every round of one peer; on a GPU also those that the host took to launch it, and what a call took
    last, forgotten rounds among them."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    host: dict[str, list[float]] = field(default_factory=lambda: {which: [] for which in PASSES})
    last: dict[str, float] = field(default_factory=dict)

    def forget(self) -> None:
        """What was measured so far was a warm-up."""
        for rounds in (self.forward, self.backward, *self.host.values()):
            rounds.clear()

    def of(self, which: str) -> list[float]:
        return self.forward if which == "forward" else self.backward

    def host_us(self, which: str) -> float | None:
        """Microseconds of host time a call, the shortest; None where the device is the host."""
        return 1e6 * min(self.host[which]) if self.host[which] else None


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and spread in milliseconds, and the samples themselves."""
    ordered = sorted(1e3 * sample for sample in samples)
    return {
        "median": statistics.median(ordered),
        "p20": _quantile(ordered, 0.2),
        "p80": _quantile(ordered, 0.8),
        "rounds": len(ordered),
        "samples": [1e3 * sample for sample in samples],
    }


def _quantile(ordered: list[float], q: float) -> float:
    """Linear between the two nearest samples."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def clock(device: str) -> float:
    """Seconds, once all work given to the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


REPEATS = 5
"""Calls of a pass in a row on a GPU, at least: launching one overlaps with running the one before, as in a model."""

BURST = 0.01
"""Seconds of work in a row, so that the time until the first call has been launched counts for little."""


def one_round(bound: Bound, device: str, samples: Samples) -> float:
    """A forward pass that records its graph, as in training, then the backward pass; returns their sum."""
    if torch.device(device).type == "cuda":
        return _one_round_on_gpu(bound, samples)
    start = clock(device)
    out = bound.forward()
    middle = end = clock(device)
    samples.forward.append(middle - start)
    if bound.peer.trains:
        gradients = bound.backward(out)
        end = clock(device)
        samples.backward.append(end - middle)
        # Releasing what the round made is not part of the next peer's time.
        del gradients
    del out
    return end - start


def _one_round_on_gpu(bound: Bound, samples: Samples) -> float:
    """The same by the GPU's clock; each figure is the mean of calls in a row."""
    out = bound.forward()
    samples.forward.append(burst(samples, "forward", bound.forward))
    if not bound.peer.trains:
        return samples.forward[-1] * REPEATS
    samples.backward.append(burst(samples, "backward", lambda: bound.backward(out, keep=True)))
    return (samples.forward[-1] + samples.backward[-1]) * REPEATS


def burst(samples: Samples, which: str, call: Callable[[], Any]) -> float:
    """Seconds a call by the GPU's clock, of as many in a row as earlier rounds ask for."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = max(REPEATS, round(BURST / samples.last[which])) if which in samples.last else REPEATS
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    samples.host[which].append((time.perf_counter() - start) / repeats)
    end.record()
    end.synchronize()
    samples.last[which] = begin.elapsed_time(end) / 1e3 / repeats
    return samples.last[which]


def interleave(
    bounds: Mapping[str, Bound],
    device: str,
    effort: Effort,
    progress: Callable[[str], None] = lambda text: None,
    known: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Rounds of every peer in turns (see above), after one that does not count; a peer with all its rounds drops out.

    `known`: seconds of a call of each peer just before. Where that was long on a CPU, it was warm-up enough; on a GPU
    it built kernels.
    """
    wanted = {}
    samples = {name: Samples() for name in bounds}
    for name, bound in bounds.items():
        one = (known or {}).get(name, 0.0)
        if one < LONG or torch.device(device).type == "cuda":
            progress(f"{name}: warm-up")
            one = one_round(bound, device, samples[name])
            samples[name].forget()
        wanted[name] = effort.rounds(one)
    drawn = random.Random(0)
    for turn in range(max(wanted.values(), default=0)):
        names = [name for name in bounds if turn < wanted[name]]
        drawn.shuffle(names)
        for name in names:
            progress(f"{name}: round {turn + 1} of {wanted[name]}")
            one_round(bounds[name], device, samples[name])
    return samples
