"""Puts the tables that `docs/ladder/run.py` measured into docs/ladder/README.md, between its markers.

    python tools/fill_docs.py            rewrite the page
    python tools/fill_docs.py --check    fail if the page is not what the record says

A section is what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Nothing there is typed by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ladder" / "README.md"
NOTHING = "*Not measured yet: `python docs/ladder/run.py`, then `python tools/fill_docs.py`.*"

sys.path.insert(0, str(ROOT / "docs" / "ladder"))


def fill(text: str, sections: Mapping[str, str]) -> str:
    """`text` with its marked sections replaced.

    Raises:
        KeyError: a marked section has no content.
    """

    def section(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- {name}:begin -->\n{sections[name]}\n<!-- {name}:end -->"

    return re.sub(r"<!-- ([\w:]+):begin -->\n.*?<!-- \1:end -->", section, text, flags=re.DOTALL)


def sections(record: Mapping[str, Any] | None, names: list[str]) -> dict[str, str]:
    """The machine's description, and one table a rung."""
    from measure import table

    if record is None:
        return dict.fromkeys([*names, "machine"], NOTHING)
    machine = record["machine"]
    versions, source = machine["versions"], machine["source"]
    commit = f", commit {source['commit'][:7]}" if source["commit"] else ""
    described = (
        f"Measured on one thread of {machine['name']} (vectors: {machine['cpu_capability']}), PyTorch "
        f"{versions['torch']}, {machine['date'][:10]}{commit}: batch 1, 2 heads, headdim 64, float32, except where the "
        "row says otherwise. Times are medians of CPU time. Extra memory is the peak of PyTorch's allocations beyond "
        "inputs and results."
    )
    # One process of its own makes a load of 1; more is other work, which slows this one by way of the shared caches.
    if record["load"] is not None and record["load"] > 1.5:
        described += (
            f" The machine had other work (load {record['load']:.1f} on {machine['cores']} cores): read times roughly."
        )
    return {"machine": described, **{name: table(rows) for name, rows in record["rungs"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts measured tables into docs/ladder/README.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    records = sorted((ROOT / "benchmarks" / "results").glob("*/ladder/rungs.json"))
    record = json.loads(records[0].read_text()) if records else None
    before = PAGE.read_text()
    names = re.findall(r"<!-- (\w+):begin -->", before)
    after = fill(before, sections(record, names))
    source = records[0].relative_to(ROOT) if records else "no record"
    if before == after:
        print(f"docs/ladder/README.md agrees with {source}")
    elif check:
        raise SystemExit(f"docs/ladder/README.md differs from {source}: run python tools/fill_docs.py")
    else:
        PAGE.write_text(after)
        print(f"docs/ladder/README.md filled from {source}")


if __name__ == "__main__":
    main()
