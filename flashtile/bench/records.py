"""Records of measurements: one JSON file a device and suite, `<results>/<device>/<suite>.json`.

    {"schema": 1, "suite": "dense", "machine": {...}, "settings": {...}, "seconds": 123.4, "rows": [...]}

Every row has `case` (the fields of `cases.Case`), `peer`, `status` ("ok", "refused", "too big", "wrong" or "failed")
and `reason`. A row that is not "ok" has no figure. Timing rows add `pass`, `ms` (median, p20, p80, rounds, samples),
`gflops` and `gate`; memory rows `pass`, `extra_bytes`, `resident_bytes`; error rows `errors`, for each of out, dq, dk
and dv {max, rms}.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashtile.bench.cases import Case

SCHEMA = 1

Row = dict[str, Any]
Record = dict[str, Any]


def row(case: Case, peer: str, status: str = "ok", reason: str = "", **figures: Any) -> Row:
    """One row; figures are kept only where the status allows them."""
    if status != "ok":
        figures = {name: figures[name] for name in ("pass", "gate") if name in figures}
    return {"case": asdict(case), "peer": peer, "status": status, "reason": reason, **figures}


def on_gpu(rows: list[Row]) -> bool:
    return bool(rows) and rows[0]["case"]["device"].startswith("cuda")


def write(record: Record, folder: Path) -> Path:
    """Writes the record to its place under `folder`."""
    path = folder / record["machine"]["slug"] / f"{record['suite']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=True) + "\n")
    return path


def read(folder: Path) -> list[Record]:
    """All records under `folder`, by device and suite.

    Raises:
        ValueError: a file is not a record that this version can read.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path}: got no record of schema {SCHEMA}; run flashtile bench again, or move it away")
        found.append(record)
    return found


def case_of(entry: Row) -> Case:
    return Case(**entry["case"])


def subject(rows: Iterable[Row]) -> str:
    """What the others are compared with: flashtile as users call it, over 8-bit floats where there are such peers; its
    portable backend where that is measured alone."""
    present = {entry["peer"] for entry in rows}
    return next(
        (name for name in ("flashtile_eight", "flashtile", "flashtile_portable") if name in present), "flashtile"
    )


def best_ratio(rows: Iterable[Row], subject: str = "flashtile") -> tuple[float, str] | None:
    """(how many times as fast as the fastest other library the subject is, that peer's name) among rows of one cell."""
    medians = {entry["peer"]: entry["ms"]["median"] for entry in rows if entry["status"] == "ok"}
    others = {name: median for name, median in medians.items() if not name.startswith("flashtile")}
    if subject not in medians or not others:
        return None
    best = min(others, key=lambda name: others[name])
    return others[best] / medians[subject], best


def cells(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by case and pass, in the order of their first appearance."""
    groups: dict[str, list[Row]] = {}
    for entry in rows:
        groups.setdefault(json.dumps([entry["case"], entry.get("pass")]), []).append(entry)
    return list(groups.values())


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
