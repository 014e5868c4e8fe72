"""README's figures of speed, from the records of `flashtile bench`: `tools/fill_docs.py` puts them in.

A ratio is how many times as fast flashtile is as the fastest other library of the same cell in the same run. The times
themselves, and who took part, are on the benchmarks page.
"""

from collections.abc import Iterator
from pathlib import Path

from flashtile.bench import decode, records, tables
from flashtile.bench.records import Record, Row

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "grid"
"""The suite whose picture a device shows, and whose cells are told one by one, with those of `BETWEEN`."""
BETWEEN = "lengths"


def sections(results: Path) -> dict[str, str]:
    """Name of a section of the page -> its text: for each GPU its picture and cells, then all suites everywhere."""
    found = [record for record in records.read(results) if record["kind"] in ("time", "bandwidth")]
    # GPUs first.
    found.sort(key=lambda record: record["machine"]["device"] == "cpu")
    by_device: dict[str, dict[str, Record]] = {}
    for record in found:
        by_device.setdefault(record["machine"]["slug"], {})[record["suite"]] = record
    parts = [part for suites in by_device.values() if PICTURE in suites for part in _grid(suites)]
    return {"bench": "\n\n".join([*parts, "\n".join(_overview(found))])} if found else {}


def _grid(suites: dict[str, Record]) -> Iterator[str]:
    """A device's picture, and its cells by length; those of another run only if it had the same peers."""
    record = suites[PICTURE]
    rows = list(record["rows"])
    between = suites.get(BETWEEN)
    if between is not None and _others(between) == _others(record):
        rows += between["rows"]
    machine = record["machine"]
    peers = [tables.title_of(name) for name in sorted(_others(record))]
    yield (
        f"**{machine['name']}**, {machine['date'][:10]}, bfloat16, 16k tokens: times as fast as the fastest of "
        f"{', '.join(peers[:-1])} and {peers[-1]}"
    )
    image = ROOT / "docs" / "benchmarks" / f"{machine['slug']}-{record['suite']}.png"
    if image.exists():
        yield f"![{record['title']}, {machine['name']}]({image.relative_to(ROOT).as_posix()})"
    yield "\n".join(_by_length(rows))


def _others(record: Record) -> set[str]:
    """The libraries that ran."""
    names = {entry["peer"] for entry in record["rows"] if entry["status"] == "ok"}
    return {name for name in names if not name.startswith("flashtile")}


def _by_length(rows: list[Row]) -> Iterator[str]:
    ratios: dict[tuple[str, int, str], dict[int, float]] = {}
    for cell in records.cells(rows):
        case, ratio = cell[0]["case"], _ratio(cell)
        if ratio is not None:
            ratios.setdefault((cell[0]["pass"], case["headdim"], case["feature"]), {})[case["seqlen"]] = ratio
    lengths = sorted({length for found in ratios.values() for length in found})
    yield f"| pass, headdim, mask | {' | '.join(map(str, lengths))} |"
    yield f"| --- |{' ---: |' * len(lengths)}"
    for (which, headdim, feature), found in sorted(ratios.items(), key=lambda item: (item[0][0] != "forward", item[0])):
        cells = [f"{found[length]:.2f}" if length in found else "" for length in lengths]
        yield f"| {which}, {headdim}, {feature} | {' | '.join(cells)} |"


def _overview(found: list[Record]) -> Iterator[str]:
    """One row a record: of each pass the geometric mean of its cells' ratios, the worst and the best."""
    yield "Every suite, older records too: the geometric mean of its cells, and their range."
    yield ""
    yield "| what | where | beside | forward | backward |"
    yield "| --- | --- | --- | ---: | ---: |"
    for record in found:
        ratios: dict[str, list[float]] = {}
        for cell in records.cells(record["rows"]):
            ratio = _ratio(cell)
            if ratio is not None:
                ratios.setdefault("backward" if cell[0]["pass"] == "backward" else "forward", []).append(ratio)
        if ratios:
            machine = record["machine"]
            peers = ", ".join(tables.title_of(name) for name in sorted(_others(record) - {decode.READ}))
            passes = [_mean(ratios.get(which, [])) for which in ("forward", "backward")]
            where = f"{machine['name']}, {machine['date'][:10]}"
            yield f"| {' | '.join([record['title'], where, peers, *passes])} |"


def _mean(ratios: list[float]) -> str:
    mean = records.geometric_mean(ratios)
    return "" if mean is None else f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _ratio(cell: list[Row]) -> float | None:
    """Reading the memory alone is nobody's attention."""
    rows = [entry for entry in cell if entry["peer"] != decode.READ]
    best = records.best_ratio(rows, records.subject(rows))
    return None if best is None else best[0]
