"""Puts what was measured into README.md, docs/ladder/README.md, docs/amd.md and docs/robustness.md, between their
markers.

    python tools/fill_docs.py            rewrite the pages
    python tools/fill_docs.py --check    fail if a page is not what the records say

A section is what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Nothing there is typed by hand. README's
section comes from the records of `flashtile bench`, the ladder's from that of `docs/ladder/run.py`, those about AMD's
GPUs from those of `flashtile compile` and `tests/amd`, that about compute-sanitizer from those of `tools/sanitize.py`.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROBUSTNESS = ROOT / "benchmarks" / "robustness"

sys.path.insert(0, str(ROOT / "docs" / "ladder"))
sys.path.insert(0, str(ROOT / "tools"))

from amd_tables import sections as amd  # noqa: E402
from measure import PLACES, table  # noqa: E402
from sanitizer_tables import sections as sanitizer  # noqa: E402
from speed_tables import sections as speed  # noqa: E402


def fill(text: str, sections: Mapping[str, str]) -> str:
    """`text` with those of its marked sections replaced that `sections` names."""

    def section(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- {name}:begin -->\n{sections[name]}\n<!-- {name}:end -->" if name in sections else match.group(0)

    return re.sub(r"<!-- (\w+):begin -->\n.*?<!-- \1:end -->", section, text, flags=re.DOTALL)


def ladder(results: Path = RESULTS) -> dict[str, str]:
    """What was measured where, and one table a rung and device, the CPU's first."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*/ladder/rungs.json"))]
    found.sort(key=lambda record: record["machine"]["device"] != "cpu")
    if not found:
        return {}
    sections: dict[str, list[str]] = {}
    for record in found:
        for name, rows in record["rungs"].items():
            title = [f"On {record['machine']['name']}:"] if len(found) > 1 else []
            sections.setdefault(name, []).append("\n\n".join([*title, table(rows)]))
    described = {"machine": [_measured(record) for record in found], **sections}
    return {name: "\n\n".join(parts) for name, parts in described.items()}


def _measured(record: dict[str, Any]) -> str:
    """On what a record of the ladder was measured, and how."""
    machine = record["machine"]
    versions, source = machine["versions"], machine["source"]
    commit = f", commit {source['commit'][:7]}" if source["commit"] else ""
    # A record from before there was more than one place does not say what its inputs were.
    inputs = record.get("inputs", str(PLACES["cpu"]))
    when = f"PyTorch {versions['torch']}, {machine['date'][:10]}{commit}: {inputs}"
    if machine["device"] != "cpu":
        return (
            f"Measured on {machine['name']}, Triton {versions['triton']}, {when}, except where the row says otherwise. "
            "Times are medians between events on the GPU's stream, of calls in a row."
        )
    described = (
        f"Measured on one thread of {machine['name']} (vectors: {machine['cpu_capability']}), {when}, except where the "
        "row says otherwise. Times are medians of CPU time. Extra memory is the peak of PyTorch's allocations beyond "
        "inputs and results."
    )
    # One process of its own makes a load of 1; more is other work, which slows this one by way of the shared caches.
    if record["load"] is not None and record["load"] > 1.5:
        described += (
            f" The machine had other work (load {record['load']:.1f} on {machine['cores']} cores): read times roughly."
        )
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts what was measured into the pages that show it.")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    stale = []
    pages = {
        "README.md": speed(RESULTS),
        "docs/ladder/README.md": ladder(),
        "docs/amd.md": amd(RESULTS / "amd"),
        "docs/robustness.md": sanitizer(ROBUSTNESS),
    }
    for name, sections in pages.items():
        before = (ROOT / name).read_text()
        after = fill(before, sections)
        print(f"{name}: {'nothing measured yet' if not sections else 'up to date' if before == after else 'differs'}")
        if before != after:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(after)
    if check and stale:
        raise SystemExit(f"{', '.join(stale)}: not what the records say; run python tools/fill_docs.py")


if __name__ == "__main__":
    main()
