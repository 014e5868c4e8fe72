"""Records as tables of text: one shape for the terminal and for markdown."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import flashtile.bench.eight  # noqa: F401 (registers its peers)
from flashtile.bench import decode, records
from flashtile.bench.accuracy import NAMES
from flashtile.bench.cases import Case
from flashtile.bench.memory import gib
from flashtile.bench.peers import FUSED, PEERS
from flashtile.bench.records import Record, Row

SUBJECT = "flashtile"


@dataclass
class Table:
    """`notes` stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """A markdown table; all but the first column flush right."""
        rule = ["---", *(["---:"] * (len(self.columns) - 1))]
        lines = [f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows)]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes)]).rstrip() + "\n"


def of(record: Record, spread: bool = True) -> list[Table]:
    """The tables of a record; `spread` False leaves out what makes them wide."""
    kinds = {"time": _time, "bandwidth": _bandwidth, "memory": _memory, "error": _error}
    return kinds[record["kind"]](record, spread)


def title_of(peer: str) -> str:
    if peer == "formula":
        return "textbook"
    known = PEERS.get(peer) or decode.PEERS.get(peer)
    return known.title if known is not None else peer


def _peers(rows: Iterable[Row]) -> list[str]:
    """Peers in the order of their first appearance, flashtile last; none that took no case at all."""
    found = list(dict.fromkeys(entry["peer"] for entry in rows if entry["status"] != "refused"))
    return sorted(found, key=lambda name: name == SUBJECT)


def absent(rows: Iterable[Row]) -> list[str]:
    """Who took no case at all, and why."""
    rows = list(rows)
    left = {entry["peer"]: entry["reason"] for entry in rows if entry["peer"] not in _peers(rows)}
    return [f"{title_of(peer)} is not in this table: {reason}" for peer, reason in left.items()]


def label(entry: Row) -> str:
    """`causal`, and what differs from the common heads: `causal, headdim 128, heads 8/2`."""
    case = records.case_of(entry)
    columns = f"{case.headdim}/{case.headdim_v}" if case.headdim_v else str(case.headdim)
    headdim = f", headdim {columns}" if columns != str(Case.headdim) else ""
    heads = f", heads {case.heads}/{case.heads_kv}" if case.group > 1 else ""
    inputs = f", {case.inputs}" if case.inputs != Case.inputs else ""
    return f"{case.feature}{headdim}{heads}{inputs}"


def _excuse(entry: Row) -> str:
    """What stands where a figure would."""
    excuses: dict[str, str] = {"too big": entry["reason"], "refused": "–"}
    return excuses.get(entry["status"], str(entry["status"]))


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _time(record: Record, spread: bool) -> list[Table]:
    tables = []
    for dtype in dict.fromkeys(entry["case"]["dtype"] for entry in record["rows"]):
        rows = [entry for entry in record["rows"] if entry["case"]["dtype"] == dtype]
        peers = _peers(rows)
        columns = ["attention", "seqlen", "pass", *map(title_of, peers), "best / flashtile"]
        figures = "median (20th–80th percentile)" if spread else "median"
        figures += ", TFLOP/s" if records.on_gpu(rows) else ""
        table = Table(f"{record['title']}, {dtype}: milliseconds, {figures}", columns)
        ratios: dict[str, list[float]] = {}
        for cell in records.cells(rows):
            table.rows.append(_time_row(cell, peers, ratios, spread))
        for which, values in ratios.items():
            mean = records.geometric_mean(values)
            table.notes.append(
                f"{which}: {mean:.2f} × the speed of the best peer, geometric mean of {len(values)} cells"
            )
        table.notes += _waits(rows, peers) + absent(rows)
        tables.append(table)
    return tables


def _bandwidth(record: Record, spread: bool) -> list[Table]:
    """Times, and the bytes of keys and values read a second; the plain read is what the others are held to."""
    rows = record["rows"]
    peers = _peers(rows)
    columns = ["decode", "seqlen", *map(title_of, peers), "best / flashtile", "of the plain read"]
    table = Table(f"{record['title']}: milliseconds, median, and GB/s", columns)
    for cell in records.cells(rows):
        found = {entry["peer"]: entry for entry in cell}
        line = [label(cell[0]), str(cell[0]["case"]["seqlen"])]
        line += [_bandwidth_cell(found[name]) if name in found else "" for name in peers]
        best = records.best_ratio(entry for entry in cell if entry["peer"] != decode.READ)
        line.append("" if best is None else f"{best[0]:.2f} ({title_of(best[1])})")
        ends = [found[name] for name in (SUBJECT, decode.READ) if name in found and found[name]["status"] == "ok"]
        line.append(f"{ends[0]['gb_per_s'] / ends[1]['gb_per_s']:.0%}" if len(ends) == 2 else "")
        table.rows.append(line)
    eager = sorted({title_of(e["peer"]) for e in rows if e["status"] == "ok" and not e["graph"]})
    if records.on_gpu(rows):
        table.notes.append("In CUDA graphs" + (f", but for {', '.join(eager)}." if eager else "."))
    table.notes += absent(rows)
    return [table]


def _bandwidth_cell(entry: Row) -> str:
    return f"{ms(entry['ms']['median'])}, {entry['gb_per_s']:.0f}" if entry["status"] == "ok" else _excuse(entry)


def _waits(rows: list[Row], peers: list[str]) -> list[str]:
    """What the host does on a GPU: launching, and building kernels at first."""
    if not records.on_gpu(rows):
        return []
    notes = []
    for peer in peers:
        own = [entry for entry in rows if entry["peer"] == peer and entry["status"] == "ok"]
        host = {which: [e["host_us"] for e in own if e["pass"] == which] for which in ("forward", "backward")}
        firsts = [e["first_call_s"] for e in own if e["pass"] == "forward"]
        if firsts:
            launches = ", ".join(f"{which} {min(found):.0f} µs" for which, found in host.items() if found)
            notes.append(
                f"{title_of(peer)}: host time a call {launches} (the least of all cells); first forward and backward "
                f"pass of a cell, kernels built and result compared, {statistics.median(firsts):.1f} s (median)"
            )
    return notes


def _time_row(cell: list[Row], peers: list[str], ratios: dict[str, list[float]], spread: bool) -> list[str]:
    """One line of a table of times; what flashtile reaches of the best peer's speed is added to `ratios`."""
    found = {entry["peer"]: entry for entry in cell}
    first, which = cell[0], cell[0]["pass"]
    line = [label(first), str(first["case"]["seqlen"]), which]
    line += [_time_cell(found[name], spread) if name in found else "" for name in peers]
    best = records.best_ratio(cell, records.subject(cell))
    if best is None:
        return [*line, ""]
    ratios.setdefault(which, []).append(best[0])
    return [*line, f"{best[0]:.2f} ({title_of(best[1])})"]


def _time_cell(entry: Row, spread: bool) -> str:
    if entry["status"] != "ok":
        return _excuse(entry)
    figures = entry["ms"]
    around = f" ({ms(figures['p20'])}–{ms(figures['p80'])})" if spread else ""
    speed = f", {entry['gflops'] / 1e3:.0f}" if records.on_gpu([entry]) else ""
    return ms(figures["median"]) + around + speed


def _memory(record: Record, spread: bool) -> list[Table]:
    peers = _peers(record["rows"])
    columns = ["attention", "seqlen", "pass", *map(title_of, peers), "flashtile / textbook"]
    counts = "PyTorch's allocations [resident]" if spread else "PyTorch's allocations"
    table = Table(f"{record['title']} beyond its inputs and outputs: {counts}", columns)
    for cell in records.cells(record["rows"]):
        found = {entry["peer"]: entry for entry in cell}
        line = [label(cell[0]), str(cell[0]["case"]["seqlen"]), cell[0]["pass"]]
        line += [_memory_cell(found[name], spread) if name in found else "" for name in peers]
        own, textbook = (found.get(name, {}).get("extra_bytes") for name in (SUBJECT, "textbook"))
        table.rows.append([*line, f"1/{textbook / own:.0f}" if own and textbook else ""])
    if spread:
        table.notes.append("Resident: the operating system's count of the same, in a fresh process per figure.")
    return [table]


def _memory_cell(entry: Row, spread: bool) -> str:
    if entry["status"] != "ok":
        return _excuse(entry)
    resident = entry["resident_bytes"] if spread else None
    return gib(entry["extra_bytes"]) + ("" if resident is None else f" [{gib(resident)}]")


def _error(record: Record, spread: bool) -> list[Table]:
    tables = []
    for dtype in dict.fromkeys(entry["case"]["dtype"] for entry in record["rows"]):
        rows = [entry for entry in record["rows"] if entry["case"]["dtype"] == dtype]
        peers = _peers(rows)
        columns = ["attention", "of", *map(title_of, peers)]
        table = Table(f"{record['title']}, {dtype}: largest (root mean square)", columns)
        for cell in records.cells(rows):
            found = {entry["peer"]: entry for entry in cell}
            trained = any("dq" in entry.get("errors", {}) for entry in cell)
            for what, names in (("output", NAMES[:1]), ("gradients", NAMES[1:]))[: 1 + trained]:
                line = [_error_cell(found[peer], names) if peer in found else "" for peer in peers]
                table.rows.append([label(cell[0]) if what == "output" else "", what, *line])
        table.notes.append("The textbook formula is computed in the inputs' dtype.")
        for what, names in (("outputs", NAMES[:1]), ("gradients", NAMES[1:])):
            worst = max((ratio for cell in records.cells(rows) if (ratio := _error_ratio(cell, names))), default=None)
            if worst is not None:
                table.notes.append(f"{what}: root mean square at most {worst:.2f} times that of the best other kernel")
        tables.append(table)
    return tables


def _error_ratio(cell: list[Row], names: tuple[str, ...]) -> float | None:
    """The largest ratio of flashtile's root mean square to the least of the other kernels', among these tensors."""
    errors = {entry["peer"]: entry["errors"] for entry in cell if entry["status"] == "ok"}
    own = errors.pop("flashtile", {})
    ratios = []
    for name in names:
        others = [each[name]["rms"] for peer, each in errors.items() if peer in FUSED and name in each]
        if others and name in own:
            ratios.append(own[name]["rms"] / min(others))
    return max(ratios, default=None)


def _error_cell(entry: Row, names: tuple[str, ...]) -> str:
    """Of several tensors the largest error, and the largest root mean square."""
    if entry["status"] != "ok":
        return _excuse(entry)
    if names[0] not in entry["errors"]:
        return "–"
    largest, rms = (max(float(entry["errors"][name][kind]) for name in names) for kind in ("max", "rms"))
    return f"{largest:.1e} ({rms:.0e})"
