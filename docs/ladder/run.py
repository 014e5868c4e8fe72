"""Runs all rungs and writes what they measured: `python docs/ladder/run.py [--quick] [--results FOLDER]`.

The record goes to <FOLDER>/<device>/ladder/rungs.json (FOLDER: benchmarks/results), and `python tools/fill_docs.py`
puts its tables into docs/ladder/README.md. With --quick nothing is written.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from measure import FULL, QUICK, numbered, table

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
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def run(name: str, quick: bool) -> list[dict[str, Any]]:
    """Checks and measures one rung."""
    rung = importlib.import_module(name)
    print((rung.__doc__ or name).splitlines()[0])
    rung.check()
    rows = list(numbered(rung.measure(QUICK if quick else FULL)))
    print(table(rows), "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs all rungs and writes what they measured.")
    parser.add_argument("--quick", action="store_true", help="tiny lengths; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    rungs = {name: run(name, arguments.quick) for name in RUNGS}
    if arguments.quick:
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {"schema": 1, "machine": machine.describe("cpu"), "load": load, "rungs": rungs}
    path = arguments.results / record["machine"]["slug"] / "ladder" / "rungs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
