"""The record as a table for the terminal, a plot, and docs/paper.md."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from flashtile.bench import machine, plots, show
from flashtile.bench.memory import gib
from flashtile.bench.paper import drawing, experiment, kernels
from flashtile.bench.paper.experiment import Note, Row, Setting
from flashtile.bench.paper.rows import ROWS
from flashtile.bench.paper.worker import Worker, rehearse
from flashtile.bench.tables import Table

REHEARSAL = 0.4
"""The part of a budget that building kernels beforehand may take."""

LIMIT = 150.0
"""Seconds after which a row is given up, building kernels and models included."""

BUSY = 0.9
"""Share of a step in which a GPU computes, below which the host's time is named as a reason."""

HEADING = """# The published speed-ups, measured again

Written by `flashtile bench paper`. Each row names a claim that users of attention libraries know, and measures it on
the device below against the baseline named, with random weights. Both columns run in turns; a row whose two results
differ has no figure. A claim that was not met is shown as not met, beside what the same step comes to with no attention
in it at all, which nothing that replaces attention alone can beat. Some claims rest on more than attention; the last
column says so. FP8's other cells have tables of their own.
"""


def run(
    names: list[str],
    setting: Setting,
    results: Path,
    docs: Path,
    console: Console | None = None,
    *,
    budget: float | None = None,
    apart: bool = False,
    processes: int = 1,
) -> int:
    """Measures the rows named, keeps the others of an earlier record, and writes the page; 1 if a row failed.

    The record is written after every row. budget: seconds for all of them; those that it leaves no time for are named.
    apart: a process of its own measures, so that a row that crashes or hangs does not take the others with it.
    processes: how many build kernels beforehand; 1: none, each row builds its own.
    """
    console = console or Console()
    begin = time.monotonic()
    path = experiment.place(results, setting.device)
    earlier = _earlier(path, setting)
    described = machine.describe(setting.device)
    if processes > 1:
        console.print("building kernels")
        built = [ROWS[name] for name in names if ROWS[name].rehearsed]
        rehearse(built, setting, processes, LIMIT if budget is None else REHEARSAL * budget)
        console.print(f"kernels built in {time.monotonic() - begin:.0f} s")
    measured: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress, Worker(setting, LIMIT) as worker:
        task = progress.add_task("paper", total=len(names))
        for name in names:
            left = None if budget is None else budget - (time.monotonic() - begin)
            if left is not None and left <= 0:
                break
            note = partial(_tell, progress, task, name)
            measure = partial(worker.measure, seconds=left) if apart else partial(_here, setting)
            entry = measure(ROWS[name], note)
            if entry is None:
                break
            measured[name] = {**entry, **_origin(described)}
            entries = {**earlier, **measured}
            found = [entries[known] for known in ROWS if known in entries]
            _keep(path, experiment.record(found, setting, time.monotonic() - begin, described))
            progress.advance(task)
    console.print(show.rich_table(table(list(measured.values()), brief=True)))
    if len(measured) < len(names):
        left_over = " ".join(name for name in names if name not in measured)
        console.print(f"no time left for --rows {left_over}", soft_wrap=True)
    for written in [path, *write(results, docs)] if measured else []:
        console.print(f"wrote {written}", soft_wrap=True)
    return int(any(entry["status"] in ("wrong", "failed") for entry in measured.values()))


def _here(setting: Setting, row: Row, note: Note) -> dict[str, Any]:
    return experiment.run(row, setting, note)


def _keep(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(record, indent=1) + "\n")
    begun.replace(path)


def _tell(progress: Progress, task: TaskID, name: str, text: str) -> None:
    progress.update(task, description=f"{name}: {text}")


def _earlier(path: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """Rows of a record of the same settings, so that a run may be made in parts."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    fits = old["settings"]["quick"] == setting.quick and old["settings"]["dtype"] == experiment.name_of(setting.dtype)
    return {entry["name"]: {**_origin(old["machine"]), **entry} for entry in old["rows"]} if fits else {}


def _origin(described: dict[str, Any]) -> dict[str, Any]:
    """When and of what a row was measured, in a record that was made in parts."""
    return {"date": described["date"], "commit": described["source"]["commit"]}


def _older(entry: dict[str, Any], described: dict[str, Any]) -> str:
    """When a row was measured that is not of the record's last run."""
    last = _origin(described)
    own = {name: entry.get(name, last[name]) for name in last}
    if own["commit"] == last["commit"] and own["date"][:10] == last["date"][:10]:
        return ""
    commit = f" at {own['commit'][:7]}" if own["commit"] else ""
    return f" ({own['date'][:16].replace('T', ' ')}{commit})"


def table(entries: list[dict[str, Any]], brief: bool = False, described: dict[str, Any] | None = None) -> Table:
    """Claimed beside measured; `brief`: without the columns of prose; `described`: the machine of the last run, beside
    which older rows are dated."""
    prose = [] if brief else ["over", "of what, and why it may miss"]
    found = Table("Claimed and measured", ["row", "claimed", "measured", "baseline", "flashtile", *prose])
    for entry in entries:
        claimed = "–" if entry["claimed"] is None else f"{entry['claimed']:g}x"
        words = [] if brief else [entry["baseline"], "; ".join([entry["share"], *_reasons(entry), *_peaks(entry)])]
        what, claim = (entry["name"], claimed) if brief else (entry["title"], f"{entry['claim']} ({claimed})")
        ratio, *amounts = _measured(entry)
        when = "" if described is None else _older(entry, described)
        found.rows.append([what, claim, ratio + when, *amounts, *words])
    return found


def _missed(entry: dict[str, Any]) -> bool:
    if entry["status"] != "ok" or entry["claimed"] is None:
        return False
    return bool(round(entry["figures"]["ratio"], 2) < entry["claimed"])


def _measured(entry: dict[str, Any]) -> list[str]:
    if entry["status"] != "ok":
        return [f"{entry['status']}: {entry['reason']}", "–", "–"]
    figures = entry["figures"]
    missed = _missed(entry)
    ratio = f"{figures['ratio']:.2f}x{', not met' if missed else ''}"
    ceiling = figures["details"].get("ceiling")
    if missed and ceiling is not None:
        ratio += f": {ceiling:.2f}x if attention took no {'time' if figures['unit'] == 'ms' else 'memory'}"
    return [ratio, *(_amount(figures[name], figures["unit"]) for name in ("baseline", "ours"))]


def _reasons(entry: dict[str, Any]) -> list[str]:
    """What was measured of why a claim is missed: attention's part of either step, and the host's."""
    if not _missed(entry):
        return []
    figures = entry["figures"]
    details, found = figures["details"], []
    if "without_attention_ms" in details:
        parts = (1 - 1 / details["ceiling"], 1 - details["without_attention_ms"] / figures["ours"])
        found.append(
            "attention takes {:.0%} of the baseline's time and {:.0%} of ours".format(*(max(0, p) for p in parts))
        )
    theirs = details.get("rates", {}).get("fa3_fp8")
    if theirs:
        found.append(f"the claim's own program comes to {theirs:.0f} TFLOP/s on this GPU")
    busy = details.get("gpu_busy")
    if busy and min(busy.values()) < BUSY:
        found.append(f"the GPU is at work in {busy['baseline']:.0%} and {busy['ours']:.0%} of it: the host is too slow")
    return found


def _peaks(entry: dict[str, Any]) -> list[str]:
    """The memory that both columns took at their peak, beyond weights and inputs, where it was measured."""
    found = entry.get("figures", {}).get("details", {}).get("peak_bytes", {})
    if not isinstance(found.get("baseline"), int):
        return []
    return [f"beside weights and inputs it takes {gib(found['baseline'])} and {gib(found['ours'])}"]


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return gib(value)
    return plots.duration(value) if unit == "ms" else f"{value:.0f} {unit}"


def _of_suites(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows that the record of a suite on the same device answers, where no run of this has."""
    path = folder / "fp8.json"
    if "fp8" not in ROWS or not path.exists():
        return {}
    wanted = {"feature": "plain", "seqlen": 16384, "headdim": 256}
    rows = [row for row in json.loads(path.read_text())["rows"] if wanted.items() <= row["case"].items()]
    return {"fp8": experiment.entry(ROWS["fp8"], kernels.eight_bits(rows))} if rows else {}


def _known(path: Path, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a record that were run, by name."""
    known = {**_of_suites(path.parent.parent), **{entry["name"]: entry for entry in found["rows"]}}
    return {name: entry for name, entry in known.items() if entry["status"] != "not run"}


def write(results: Path, docs: Path) -> list[Path]:
    """docs/paper.md and its plots, from all records under `results` that are not quick ones."""
    parts, written = [HEADING], []
    records = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*/paper/rows.json"))]
    records = [(path, found) for path, found in records if not found["settings"]["quick"]]
    known = [_known(path, found) for path, found in records]
    for (_, found), here in zip(records, known, strict=True):
        described = found["machine"]
        # What ran nowhere is shown as such; what ran on another device is not shown as missing here.
        shown = [row for name, row in ROWS.items() if name in here or not any(name in other for other in known)]
        rows = [here.get(row.name) or experiment.not_run(row) for row in shown]
        image = docs / "benchmarks" / f"{described['slug']}-paper.png"
        drawn = [drawing.ratios(rows, image)]
        drawn += [
            drawing.memory(row, image.with_stem(f"{image.stem}-memory")) for row in rows if row["name"] == "memory"
        ]
        named = ", ".join(f"{name} {version}" for name, version in described["versions"].items() if version)
        parts.append(f"## {described['name']}\n\n{described['date'][:10]}, {named}; {found['settings']['dtype']}.\n")
        for title, path in zip(("Claimed and measured", "Memory by length"), drawn, strict=False):
            if path is not None:
                written.append(path)
                parts.append(f"![{title}]({path.relative_to(docs).as_posix()})\n")
        parts.append(table(rows, described=described).markdown())
    if len(parts) == 1:
        return []
    page = docs / "paper.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))
    return [page, *written]
