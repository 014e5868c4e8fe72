"""What the rungs share: inputs, a check against float64, and a table of time and memory.

Every rung has `check()`, which holds its code against `flashtile.reference`, and `measure(seqlens)`, which yields one
row a case and length. `main` runs both and prints the table. `settle` says where: on the CPU, or, for the last rungs,
on a GPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtile.bench.memory import allocated_peak, gib
from flashtile.bench.timing import Samples, burst

# PyTorch's profiler, which counts the memory, else writes lines between the rows.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# One thread: the figures of a rung are about its arithmetic, and repeat better.
torch.set_num_threads(1)

QUICK = (192,)

Row = dict[str, Any]
Measure = Callable[[Sequence[int]], Iterable[Row]]


@dataclass(frozen=True)
class Place:
    """A device, and the inputs that suit it.

    For rung 6, `cache`: keys of its long row, in multiples of the longest length; `splits`: into how many parts it is
    cut; `continuations`: how many share a prefix.
    """

    device: str
    dtype: torch.dtype
    heads: int
    headdim: int
    lengths: tuple[int, ...]
    cache: int
    splits: tuple[int, ...]
    continuations: int

    def __str__(self) -> str:
        return f"batch 1, {self.heads} heads, headdim {self.headdim}, {str(self.dtype).removeprefix('torch.')}"


PLACES = {
    "cpu": Place("cpu", torch.float32, 2, 64, (1024, 2048, 4096), 8, (1, 2, 8), 8),
    "cuda": Place("cuda", torch.bfloat16, 8, 128, (4096,), 64, (1, 4, 16), 64),
}
_here = [PLACES["cpu"]]


def settle(device: str) -> None:
    """From now on inputs, checks and times are those of this device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here; leave it out, and the rungs run on the CPU")
    _here[0] = PLACES[device]


def here() -> Place:
    """Where the rungs run."""
    return _here[0]


def inputs(
    seqlen: int, heads: int | None = None, headdim: int | None = None, batch: int = 1, seed: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v (batch, seqlen, heads, headdim), normal."""
    place = here()
    shape = (batch, seqlen, heads or place.heads, headdim or place.headdim)
    generator = torch.Generator(place.device).manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, device=place.device, dtype=place.dtype) for _ in range(3))


# For numbers up to 1, as outputs are. A GPU takes exponentials from a table of its own, to about 22 bits.
ALLOWED = {("cpu", torch.float32): 5e-6, ("cuda", torch.float32): 5e-5, ("cuda", torch.bfloat16): 2.0**-7}


def agree(name: str, found: Tensor, wanted: Tensor, allowed: float | None = None, size: float = 1.0) -> None:
    """Prints the largest error against the float64 reference; fails where it is more than the dtype explains.

    size: of the numbers, where they are larger than 1 and 16 bits round them accordingly.
    """
    allowed = size * ALLOWED[found.device.type, found.dtype] if allowed is None else allowed
    error = float((found.double() - wanted).abs().max())
    print(f"  {name}: largest error against float64 {error:.1e}")
    if not error <= allowed:
        raise AssertionError(f"{name}: largest error {error:.1e}, allowed {allowed:.1e}")


def row(case: str, seqlen: int, call: Callable[[], Any], **more: Any) -> Row:
    """Median time of `call`, and the peak of PyTorch's allocations while it runs, its results not counted.

    CPU time on a CPU, because other work on the machine then counts less; on one thread there is nothing to wait for.
    On a GPU the time between two events on its stream, of calls in a row, as `flashtile bench` has it, or of a single
    one that is slow.
    """
    made = call()
    own = sum(tensor.numel() * tensor.element_size() for tensor in made if isinstance(tensor, Tensor))
    del made
    samples = _on_gpu(call) if here().device == "cuda" else _on_cpu(call, quick=seqlen <= max(QUICK))
    extra = max(0, allocated_peak(call, here().device) - own)
    return {"case": case, "seqlen": seqlen, **more, "ms": 1e3 * statistics.median(samples), "extra_bytes": extra}


def _on_cpu(call: Callable[[], Any], quick: bool) -> list[float]:
    least, seconds = (1, 0.0) if quick else (3, 1.0)
    samples: list[float] = []
    while len(samples) < least or (sum(samples) < seconds and len(samples) < 20):
        start = time.process_time()
        call()
        samples.append(time.process_time() - start)
    return samples


SLOW = 0.05
"""Seconds of a call on a GPU, one of which says enough: that long it takes to start kernels, not to run them."""


def _on_gpu(call: Callable[[], Any], seconds: float = 0.3) -> list[float]:
    begin, end_of_one = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end_of_one.record()
    end_of_one.synchronize()
    one = begin.elapsed_time(end_of_one) / 1e3
    if one > SLOW:
        return [one]
    samples = Samples()
    end = time.perf_counter() + seconds
    while len(samples.forward) < 3 or (time.perf_counter() < end and len(samples.forward) < 20):
        samples.forward.append(burst(samples, "forward", call))
    return samples.forward


def trained(attention: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs forward and backward and returns (out, dq, dk, dv)."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    grad = torch.ones_like(leaves[2])

    def call() -> tuple[Tensor, ...]:
        out = attention(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return call


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    titles = {"case": "what", "ms": "time, ms", "extra_bytes": "extra memory"}
    columns = [name for name in rows[0] if any(name in line for line in rows)]

    def shown(name: str, value: Any) -> str:
        if name == "extra_bytes":
            return gib(value)
        return f"{value:.3g}" if name == "ms" and value < 100 else f"{value:.0f}" if name == "ms" else str(value)

    lines = [
        " | ".join(titles.get(name, name) for name in columns),
        " | ".join(["---", *["---:"] * (len(columns) - 1)]),
    ]
    lines += [" | ".join(shown(name, line[name]) for name in columns) for line in rows]
    return "\n".join(f"| {line} |" for line in lines)


def numbered(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come, with a sign of life for those who wait."""
    for line in rows:
        print(f"  {line['case']}, seqlen {line['seqlen']}: {line['ms']:.3g} ms, {gib(line['extra_bytes'])}")
        yield line


def main(title: str, check: Callable[[], None], measure: Measure, devices: Sequence[str] = ("cpu",)) -> list[Row]:
    """Checks, measures and prints one rung; `--quick` for lengths too small to mean anything."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="tiny lengths: shows that it runs")
    parser.add_argument("--device", choices=devices, default="cpu", help="where (default: cpu)")
    arguments = parser.parse_args()
    settle(arguments.device)
    check()
    rows = list(numbered(measure(QUICK if arguments.quick else here().lengths)))
    print(table(rows))
    return rows
