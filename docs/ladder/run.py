"""Runs the rungs and writes what they measured.

    python docs/ladder/run.py [--quick] [--device cuda] [--results FOLDER]

The record goes to <FOLDER>/<device>/ladder/rungs.json (FOLDER: benchmarks/results), and `python tools/fill_docs.py`
puts its tables into docs/ladder/README.md. With --quick nothing is written. On a GPU the last two rungs run: those
before them are loops in PyTorch, which rung 7 shows beside the kernels.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from measure import PLACES, QUICK, here, numbered, settle, table

from flashtile.bench import machine

RUNGS = (
    "rung1_naive",
    "rung2_query_tiles",
    "rung3_online_softmax",
    "rung4_backward",
    "rung5_spans",
    "rung6_states",
    "rung7_shipped",
)
ON_DEVICE = {"cpu": RUNGS, "cuda": RUNGS[-2:]}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def run(name: str, quick: bool) -> list[dict[str, Any]]:
    """Checks and measures one rung."""
    rung = importlib.import_module(name)
    print((rung.__doc__ or name).splitlines()[0])
    rung.check()
    rows = list(numbered(rung.measure(QUICK if quick else here().lengths)))
    print(table(rows), "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the rungs and writes what they measured.")
    parser.add_argument("--quick", action="store_true", help="tiny lengths; writes nothing")
    parser.add_argument("--device", choices=PLACES, default="cpu", help="where (default: cpu)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    settle(arguments.device)
    rungs = {name: run(name, arguments.quick) for name in ON_DEVICE[arguments.device]}
    if arguments.quick:
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    described = machine.describe(arguments.device)
    record = {"schema": 1, "machine": described, "load": load, "inputs": str(here()), "rungs": rungs}
    path = arguments.results / record["machine"]["slug"] / "ladder" / "rungs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
