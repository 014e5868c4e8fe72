"""What the rungs share: inputs, a check against float64, and a table of time and memory.

Every rung has `check()`, which holds its code against `flashtile.reference`, and `measure(seqlens)`, which yields one
row a case and length. `main` runs both and prints the table.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile.bench.memory import allocated_peak, gib

# PyTorch's profiler, which counts the memory, else writes lines between the rows.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# One thread: the figures of a rung are about its arithmetic, and repeat better.
torch.set_num_threads(1)

FULL = (1024, 2048, 4096)
QUICK = (192,)

Row = dict[str, Any]
Measure = Callable[[Sequence[int]], Iterable[Row]]


def inputs(seqlen: int, heads: int = 2, headdim: int = 64, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v (batch, seqlen, heads, headdim), normal, float32."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, seqlen, heads, headdim, generator=generator) for _ in range(3))


def agree(name: str, found: Tensor, wanted: Tensor, allowed: float = 5e-6) -> None:
    """Prints the largest error against the float64 reference; fails where it is more than float32 explains."""
    error = float((found.double() - wanted).abs().max())
    print(f"  {name}: largest error against float64 {error:.1e}")
    if not error <= allowed:
        raise AssertionError(f"{name}: largest error {error:.1e}, allowed {allowed:.1e}")


def row(case: str, seqlen: int, call: Callable[[], Any], **more: Any) -> Row:
    """Median CPU time of `call`, and the peak of PyTorch's allocations while it runs, its results not counted.

    CPU time, because other work on the machine then counts less; on one thread there is nothing to wait for.
    """
    least, seconds = (3, 1.0) if seqlen > max(QUICK) else (1, 0.0)
    made = call()
    own = sum(tensor.numel() * tensor.element_size() for tensor in made if isinstance(tensor, Tensor))
    samples: list[float] = []
    while len(samples) < least or (sum(samples) < seconds and len(samples) < 20):
        start = time.process_time()
        call()
        samples.append(time.process_time() - start)
    extra = max(0, allocated_peak(call) - own)
    return {"case": case, "seqlen": seqlen, **more, "ms": 1e3 * statistics.median(samples), "extra_bytes": extra}


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


def main(title: str, check: Callable[[], None], measure: Measure) -> list[Row]:
    """Checks, measures and prints one rung; `--quick` for lengths too small to mean anything."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="tiny lengths: shows that it runs")
    quick = parser.parse_args().quick
    check()
    rows = list(numbered(measure(QUICK if quick else FULL)))
    print(table(rows))
    return rows
