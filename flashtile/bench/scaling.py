"""Context parallelism against one device, under torchrun:

    torchrun --nproc-per-node 2 -m flashtile.bench.scaling

Causal attention over one sequence: on one device, shared by all ranks with each scheme, and with the peer's ring. Times
are the slowest rank's; a scheme whose results are wrong has no figure. Writes <results>/<device>/scaling/<ranks>.json,
which `flashtile bench scaling` holds its model against.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import flashtile
from flashtile import distributed
from flashtile.bench import machine
from flashtile.bench.peer_ring import PeerRing

ONE, PEER = "one", "peer ring"
BURST = 4
"""Rounds on a GPU between two waits."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What is measured. seconds: for each way and length, at most; rounds: at least."""

    device: str
    seqlens: tuple[int, ...]
    schemes: tuple[str, ...]
    heads: int
    headdim: int
    dtype: torch.dtype
    seconds: float
    rounds: int


class Run(NamedTuple):
    """What one way computes, again and again."""

    way: Attention
    leaves: list[Tensor]
    grad: Tensor


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--seqlens", nargs="+", type=int, help="default: 32k to 256k; on a CPU 1k to 4k")
    parser.add_argument("--schemes", nargs="+", default=["ring"], choices=("ring", "ulysses", "gather"))
    parser.add_argument("--heads", type=int, help="default 16; on a CPU 4")
    parser.add_argument("--headdim", type=int, help="default 128; on a CPU 64")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way and length; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="at least; default %(default)s")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    gpu = given.device == "cuda"
    lengths = given.seqlens or ([2**15, 2**16, 2**17, 2**18] if gpu else [1024, 2048, 4096])
    settings = Settings(
        given.device,
        tuple(sorted(lengths)),
        tuple(given.schemes),
        given.heads or (16 if gpu else 4),
        given.headdim or (128 if gpu else 64),
        torch.bfloat16 if gpu else torch.float32,
        given.seconds,
        given.rounds,
    )
    _start(given.device)
    record = measure(settings)
    if dist.get_rank() == 0:
        path = given.results / machine.slug(settings.device) / "scaling" / f"{dist.get_world_size()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print("\n".join([*table(record), f"{record['seconds']:.0f} s, wrote {path}"]), flush=True)
    # Nobody leaves while another still writes: the engine's threads may not outlive it.
    dist.barrier()
    dist.destroy_process_group()


def _start(device: str) -> None:
    """The process group that torchrun describes."""
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=local)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")


def measure(settings: Settings) -> dict[str, Any]:
    """The record."""
    start = time.monotonic()
    rows = []
    for seqlen in settings.seqlens:
        rows += _length(settings, seqlen)
    return {
        "kind": "scaling",
        "ranks": dist.get_world_size(),
        "machine": machine.describe(settings.device),
        "settings": {**vars(settings), "dtype": str(settings.dtype).removeprefix("torch.")},
        "link": _link(settings),
        "rows": rows,
        "seconds": round(time.monotonic() - start, 1),
    }


def _ways(settings: Settings) -> dict[str, Attention]:
    def sharded(scheme: str) -> Attention:
        return lambda q, k, v: distributed.attention(q, k, v, scheme=scheme, causal=True)

    ways: dict[str, Attention] = {ONE: lambda q, k, v: flashtile.attention(q, k, v, causal=True)}
    ways |= {scheme: sharded(scheme) for scheme in settings.schemes}
    ways[PEER] = lambda q, k, v: PeerRing.apply(q, k, v)
    return ways


def _length(settings: Settings, seqlen: int) -> list[dict[str, Any]]:
    """The rows of one length: every way, its two passes, its memory and its error against one device."""
    device = torch.device(settings.device, torch.cuda.current_device()) if settings.device == "cuda" else "cpu"
    generator = torch.Generator(device).manual_seed(seqlen)
    sizes = (1, seqlen, settings.heads, settings.headdim)
    whole = [torch.randn(sizes, generator=generator, device=device, dtype=settings.dtype) for _ in range(4)]
    shares = [distributed.shard(tensor) for tensor in whole]
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    truth = None
    for name, way in _ways(settings).items():
        *leaves, grad = whole if name == ONE else shares
        run = Run(way, [leaf.detach().requires_grad_() for leaf in leaves], grad)
        found, memory = _once(run)
        if name == ONE:
            found = [distributed.shard(tensor) for tensor in found]
            truth = found
        error = _error(found, truth or found)
        del found
        rows[name] = {"seqlen": seqlen, "way": name, "error": error, "memory": memory}
        rows[name]["status"] = "wrong" if error > 0.02 else "ok"
        if error <= 0.02:
            runs[name] = run
    for name, times in _times(settings, runs).items():
        rows[name] |= times
    return list(rows.values())


def _once(run: Run) -> tuple[list[Tensor], int]:
    """(out and gradients, bytes that the two passes allocate at most beyond their inputs)."""
    gpu = run.grad.is_cuda
    if gpu:
        run.way(*run.leaves)  # what is allocated once is no cost of a call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = run.way(*run.leaves)
    grads = torch.autograd.grad(out, run.leaves, run.grad)
    peak = torch.cuda.max_memory_allocated() - before if gpu else 0
    return [out.detach(), *grads], int(_slowest(float(peak)))


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative difference in norm from one device, over out and gradients and ranks."""
    worst = 0.0
    for one, other in zip(found, truth, strict=True):
        # In slices: float32 copies of the longest sequences would not fit beside all else.
        parts = [
            (a.float() - b.float(), b.float()) for a, b in zip(one.split(4096, 1), other.split(4096, 1), strict=True)
        ]
        norms = [sum(float(part[place].square().sum()) for part in parts) ** 0.5 for place in range(2)]
        worst = max(worst, norms[0] / norms[1])
    return _slowest(worst)


def _slowest(value: float) -> float:
    """The largest of all ranks."""
    return float(_of_the_slowest(torch.tensor(value, dtype=torch.float64)))


def _of_the_slowest(values: Tensor) -> Tensor:
    """The largest of all ranks, number by number."""
    shared = values.to("cuda" if "nccl" in dist.get_backend() else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu()


def _times(settings: Settings, runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Of each way, milliseconds of the passes, round by round, of the slowest rank. Ways take turns, for a device
    slows down as it warms up."""
    samples: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in runs}
    begun, most = time.monotonic(), 0
    while runs and most < 50:
        for name, run in runs.items():
            for one, values in _burst(run).items():
                samples[name][one] += values
        most = min(len(found["forward"]) for found in samples.values())
        if most >= settings.rounds and _slowest(time.monotonic() - begun) >= settings.seconds * len(runs):
            break
    return {
        name: {one: {"median": statistics.median(values), "samples": values} for one, values in found.items()}
        for name, found in samples.items()
    }


def _burst(run: Run) -> dict[str, list[float]]:
    """Rounds that follow each other without a pause, as the layers of a model do: a device has its next work before it
    is done with the last. The first has not, and does not count."""
    dist.barrier()
    marks = [_round(run) for _ in range(BURST if run.grad.is_cuda else 1)]
    if run.grad.is_cuda:
        torch.cuda.synchronize()
        marks = marks[1:]
    times = torch.tensor([[_between(*pair) for pair in pairwise(three)] for three in marks], dtype=torch.float64)
    forward, backward = _of_the_slowest(times).unbind(1)
    return {"forward": forward.tolist(), "backward": backward.tolist()}


def _round(run: Run) -> list[Any]:
    """Marks before, between and after the two passes."""
    marks = [_mark(run.grad)]
    out = run.way(*run.leaves)
    marks.append(_mark(run.grad))
    torch.autograd.grad(out, run.leaves, run.grad)
    return [*marks, _mark(run.grad)]


def _mark(tensor: Tensor) -> Any:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    """Milliseconds."""
    return 1e3 * (last - first) if isinstance(first, float) else float(first.elapsed_time(last))


def _link(settings: Settings) -> dict[str, float]:
    """What a rank sends to the next while it receives as much: bytes a second, and seconds of a tiny message; memory:
    bytes a second that float32 sums read and write."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    memory = _memory(settings)
    if ranks == 1:
        return {"bandwidth": 0.0, "latency": 0.0, "memory": memory}
    onward, back = (rank + 1) % ranks, (rank - 1) % ranks

    def seconds(size: int, repeats: int) -> float:
        leaving = torch.zeros(size, dtype=torch.uint8, device=settings.device)
        arriving = torch.empty_like(leaving)
        best = float("inf")
        for _ in range(5):
            dist.barrier()
            if leaving.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                pair = [dist.P2POp(dist.isend, leaving, onward), dist.P2POp(dist.irecv, arriving, back)]
                for work in dist.batch_isend_irecv(pair):
                    work.wait()
            if leaving.is_cuda:
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - start) / repeats)
        return _slowest(best)

    size = 2**28 if settings.device == "cuda" else 2**22
    latency = seconds(8, 10)
    return {"bandwidth": size / max(1e-9, seconds(size, 4) - latency), "latency": latency, "memory": memory}


def _memory(settings: Settings) -> float:
    gpu = settings.device == "cuda"
    total = torch.zeros(2**28 if gpu else 2**23, device=settings.device)
    part = torch.ones_like(total)
    best = float("inf")
    for _ in range(5):
        dist.barrier()
        start = _mark(total)
        total.add_(part)
        end = _mark(total)
        if gpu:
            torch.cuda.synchronize()
        best = min(best, _between(start, end) / 1e3)
    return 3 * total.numel() * total.element_size() / _slowest(best)


def table(record: dict[str, Any]) -> list[str]:
    """The record as text: efficiency is the share of `ranks` times one device's speed."""
    ranks = record["ranks"]
    lines = [
        f"{ranks} x {record['machine']['name']}, link {record['link']['bandwidth'] / 1e9:.1f} GB/s, "
        f"{1e6 * record['link']['latency']:.0f} us",
        f"{'seqlen':>8} {'way':>10} {'fwd ms':>9} {'bwd ms':>9} {'efficiency':>17} {'memory':>9} {'error':>8}",
    ]
    for row in record["rows"]:
        if row["status"] != "ok":
            lines.append(f"{row['seqlen']:>8} {row['way']:>10} {row['status']}: error {row['error']:.2e}")
            continue
        one = next((each for each in record["rows"] if (each["seqlen"], each["way"]) == (row["seqlen"], ONE)), None)
        passes = {name: row[name]["median"] for name in ("forward", "backward")}
        shares = ""
        if one is not None and one["status"] == "ok" and row is not one:
            shares = " / ".join(f"{one[name]['median'] / (ranks * value):.1%}" for name, value in passes.items())
        lines.append(
            f"{row['seqlen']:>8} {row['way']:>10} {passes['forward']:>9.2f} {passes['backward']:>9.2f} {shares:>17} "
            f"{row['memory'] / 2**30:>5.2f} GiB {row['error']:>8.1e}"
        )
    return lines


if __name__ == "__main__":
    main()
