"""The table of what compute-sanitizer found, in docs/robustness.md: `tools/fill_docs.py` puts it in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sections(folder: Path) -> dict[str, str]:
    """Name of a section of the page -> its text; one table for each record."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("sanitizer-*.json"))]
    return {"sanitizer": "\n\n".join("\n".join(_lines(record)) for record in records)} if records else {}


def _lines(record: dict[str, Any]) -> Iterator[str]:
    versions = record["versions"]
    yield (
        f"{len(record['calls'])} calls under compute-sanitizer {record['sanitizer']}, on {record['gpu']}, driver "
        f"{record['driver']}, PyTorch {versions['torch']}, Triton {versions['triton']}, {record['date'][:10]}:"
    )
    yield ""
    yield "| tool | findings | of which not explained | what was found, and how often | calls that ran | seconds |"
    yield "| --- | ---: | ---: | --- | ---: | ---: |"
    yield _row("none, with NaN in unwritten memory", "", "", "", record["before"])
    for tool, result in record["tools"].items():
        kinds = "; ".join(map(_kind, result["kinds"]))
        yield _row(tool, str(result["findings"]), str(result["unexplained"]), kinds, result)


def _row(name: str, findings: str, unexplained: str, kinds: str, result: dict[str, Any]) -> str:
    ran = str(result["ran"]) + (", then cut off" if result["cut_off"] else "")
    return f"| {' | '.join([name, findings, unexplained, kinds, ran, str(result['seconds'])])} |"


def _kind(kind: dict[str, Any]) -> str:
    # A line may be of a file of the same name of another backend; the first one is Hopper's.
    places = ", ".join(place.split("|")[0] for place in kind["places"])
    where = f" of `{kind['kernel']}`" if kind["kernel"] else ""
    return f"{kind['count']} x {kind['what']}{where} ({places or 'no line'})"
