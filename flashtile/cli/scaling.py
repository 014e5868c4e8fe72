"""`flashtile bench scaling`: what context parallelism would cost on a machine, and what such predictions were worth."""

import argparse
import json
from pathlib import Path
from typing import Any

GIGA = 1e9


def add_scaling(command: Any) -> None:
    """The options of the model; figures are of one rank, each way."""
    group = command.add_argument_group("scaling", "the cost model of context parallelism: causal, bfloat16, --heads")
    group.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256, 512, 1024])
    group.add_argument("--tokens", nargs="+", type=int, default=[2**17, 2**20, 2**23], help="default %(default)s")
    # An H100's, as benchmarks/results has them for causal, headdim 128, 16k tokens.
    group.add_argument("--tflops", nargs=2, type=float, default=[630.0, 480.0], metavar=("FORWARD", "BACKWARD"))
    for name, value, text in (
        ("nvlink", 400.0, "GB a second of a rank within a node"),
        ("infiniband", 45.0, "GB a second of a rank across nodes"),
        ("memory", 2800.0, "GB a second of a rank's memory"),
        ("latency", 15.0, "microseconds of a message"),
    ):
        group.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default %(default)s")
    group.add_argument("--per-node", type=int, default=8, help="ranks of a node; default %(default)s")


def scaling(given: argparse.Namespace) -> int:
    """Prints the predictions and what earlier ones were worth, and draws both."""
    from rich.console import Console

    from flashtile.bench import costs, costs_report

    machine = costs.Machine(
        given.tflops[0] * 1e12,
        given.tflops[1] * 1e12,
        given.nvlink * GIGA,
        given.infiniband * GIGA,
        given.memory * GIGA,
        given.latency * 1e-6,
        given.per_node,
    )
    work = costs.Work(given.tokens[0], given.heads, given.heads_kv or given.heads, given.headdim)
    records = [json.loads(path.read_text()) for path in sorted(given.results.glob("*/scaling/*.json"))]
    console = Console()
    for table in costs_report.tables(work, tuple(given.tokens), tuple(given.ranks), machine, records):
        console.print(table)
    document = Path(given.docs) / "distributed.md"
    if costs_report.write(document, records):
        console.print(f"wrote {document}", soft_wrap=True)
    path = costs_report.draw(work, tuple(given.ranks), machine, records, Path(given.docs) / "images" / "scaling.png")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0
