"""The tables of docs/amd.md, from the records under benchmarks/results/amd: `tools/fill_docs.py` puts them in."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

SHOWN = ("forward_kernel", "query_kernel", "key_kernel", "decode_kernel")
KINDS = {
    "test_attention": "forward and backward",
    "test_decoding": "KV caches",
    "test_eight": "8 bits",
}


def sections(folder: Path) -> dict[str, str]:
    """Name of a section of the page -> its text."""
    found = {}
    if (folder / "compiled" / "kernels.json").exists():
        record = json.loads((folder / "compiled" / "kernels.json").read_text())
        versions = record["versions"]
        found["compiled"] = f"By Triton {versions['triton']}:\n\n" + _table(_compiled(record["rows"]))
        found["spills"] = _table(_spills(record["rows"]))
    if (folder / "emulated" / "tests.json").exists():
        record = json.loads((folder / "emulated" / "tests.json").read_text())
        versions = record["versions"]
        said = f"Triton {versions['triton']}, PyTorch {versions['torch']}, {record['date']}:"
        found["emulated"] = f"{said}\n\n{_table(_emulated(record['tests']))}"
        found["banks"] = _table(_banks(record["tests"]))
    return found


def _table(lines: Iterable[list[str]]) -> str:
    head, *rows = lines
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _compiled(rows: Rows) -> Iterator[list[str]]:
    """The kernels of a causal call and of a paged cache."""
    yield [
        "GPU",
        "kernel",
        "tiles",
        "registers (accumulators, scalars)",
        "spills",
        "LDS",
        "waves",
        "LDS instructions",
        "matrix instructions",
    ]
    for row in rows:
        shown = row["variant"] in ("causal", "decode_paged") and row["headdim"] == 128
        if row["kernel"] in SHOWN and shown:
            products = ", ".join(f"{count} {name}" for name, count in row["products"].items())
            yield [
                row["target"],
                row["kernel"].removesuffix("_kernel"),
                "×".join(map(str, row["tiles"])),
                f"{row['registers']} ({row['accumulators']}, {row['scalars']})",
                str(row["spills"]),
                f"{row['shared'] / 1024:.0f} KB",
                f"{row['occupancy']:g}",
                str(row["shared_accesses"]),
                products,
            ]


def _spills(rows: Rows) -> Iterator[list[str]]:
    """By GPU: kernels, those without spills, and the others with the most spills of a variant."""
    yield ["GPU", "kernels", "without spills", "the others: registers that lie in memory, at most"]
    by_target: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_target[row["target"]].append(row)
    for target, found in by_target.items():
        most: dict[str, int] = defaultdict(int)
        for row in found:
            name = f"{row['kernel'].removesuffix('_kernel')} {row['headdim']}"
            most[name] = max(most[name], row["spills"])
        worst = ", ".join(f"{name}: {count}" for name, count in most.items() if count)
        yield [target, str(len(found)), str(sum(not row["spills"] for row in found)), worst or "none"]


def _banks(tests: Rows) -> Iterator[list[str]]:
    """By kernel and head dimension: cycles of LDS over those that there would be without conflicts, for each GPU."""
    counted = [test for test in tests if "conflicts" in test]
    targets = sorted({test["arch"] for test in counted})
    yield ["kernel", "head dimension", *targets]
    shares: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for test in counted:
        headdim = int(test["test"].rpartition("-")[2].rstrip("]"))
        for kernel, accesses in test["conflicts"].items():
            cycles, least = (sum(found[place] for found in accesses.values()) for place in (1, 2))
            shares[kernel.removesuffix("_kernel"), headdim][test["arch"]] = f"{cycles / least:.2f}"
    for (kernel, headdim), found in sorted(shares.items()):
        yield [kernel, str(headdim), *(found.get(target, "–") for target in targets)]


def _emulated(tests: Rows) -> Iterator[list[str]]:
    """By GPU and file: tests, launches, instructions, seconds."""
    yield ["GPU", "what", "tests", "kernels launched", "instructions", "seconds"]
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for test in tests:
        groups[test["arch"], test["test"].split()[0]].append(test)
    for (arch, file), found in sorted(groups.items()):
        launches = sum(sum(test["kernels"].values()) for test in found)
        instructions, seconds = (sum(test[name] for test in found) for name in ("instructions", "seconds"))
        yield [arch, KINDS[file], str(len(found)), str(launches), f"{instructions:,}", f"{seconds:.0f}"]
