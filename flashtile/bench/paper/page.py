"""The record as a table for the terminal, a plot, and docs/paper.md."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from flashtile.bench import plots, show
from flashtile.bench.memory import gib
from flashtile.bench.paper import experiment, folding, images, kernels, language
from flashtile.bench.paper.experiment import Setting
from flashtile.bench.tables import Table

ROWS = {row.name: row for row in (*language.ROWS, *images.ROWS, *folding.ROWS, *kernels.ROWS)}

HEADING = """# The published speed-ups, measured again

Written by `flashtile bench paper`. Each row names a claim that users of attention libraries know, and measures it on
the device below against the baseline named, with random weights. Both columns run in turns; a row whose two results
differ has no figure. A claim that was not met is shown as not met. Some claims rest on more than attention; the last
column says so. FP8 has tables of its own.
"""


def run(names: list[str], setting: Setting, results: Path, docs: Path, console: Console | None = None) -> int:
    """Measures the rows named, keeps the others of an earlier record, and writes the page; 1 if a row failed."""
    console = console or Console()
    begin = time.monotonic()
    measured: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("paper", total=len(names))
        for name in names:
            measured[name] = experiment.run(ROWS[name], setting, partial(_tell, progress, task, name))
            progress.advance(task)
    path = experiment.place(results, setting.device)
    entries = {**_earlier(path, setting), **measured}
    found = [entries[name] for name in ROWS if name in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(experiment.record(found, setting, time.monotonic() - begin), indent=1) + "\n")
    console.print(show.rich_table(table(list(measured.values()), brief=True)))
    for written in [path, *write(results, docs)]:
        console.print(f"wrote {written}", soft_wrap=True)
    return int(any(entry["status"] in ("wrong", "failed") for entry in measured.values()))


def _tell(progress: Progress, task: TaskID, name: str, text: str) -> None:
    progress.update(task, description=f"{name}: {text}")


def _earlier(path: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """Rows of a record of the same settings, so that a run may be made in parts."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    fits = old["settings"]["quick"] == setting.quick and old["settings"]["dtype"] == experiment.name_of(setting.dtype)
    return {entry["name"]: entry for entry in old["rows"]} if fits else {}


def table(entries: list[dict[str, Any]], brief: bool = False) -> Table:
    """Claimed beside measured; `brief`: without the columns of prose."""
    prose = [] if brief else ["over", "of what"]
    found = Table("Claimed and measured", ["row", "claimed", "measured", "baseline", "flashtile", *prose])
    for entry in entries:
        claimed = "–" if entry["claimed"] is None else f"{entry['claimed']:g}x"
        words = [] if brief else [entry["baseline"], entry["share"]]
        what, claim = (entry["name"], claimed) if brief else (entry["title"], f"{entry['claim']} ({claimed})")
        found.rows.append([what, claim, *_measured(entry), *words])
    return found


def _measured(entry: dict[str, Any]) -> list[str]:
    if entry["status"] != "ok":
        return [f"{entry['status']}: {entry['reason']}", "–", "–"]
    figures = entry["figures"]
    missed = entry["claimed"] is not None and figures["ratio"] < entry["claimed"]
    ratio = f"{figures['ratio']:.2f}x{', not met' if missed else ''}"
    return [ratio, *(_amount(figures[name], figures["unit"]) for name in ("baseline", "ours"))]


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return gib(value)
    return plots.duration(value) if unit == "ms" else f"{value:.0f} {unit}"


def draw(entries: list[dict[str, Any]], path: Path) -> Path | None:
    """Bars of what was measured, a stroke where the claim stands."""
    entries = [entry for entry in entries if entry["status"] == "ok"]
    if not entries:
        return None
    drawing = plots.figure(9.2, 1.2 + 0.32 * len(entries))
    axes = plots.style(drawing.subplots(), "Times better than the baseline", xlabel="ratio; the strokes are the claims")
    ratios = [entry["figures"]["ratio"] for entry in entries]
    places = range(len(entries))
    axes.barh(list(places), ratios, color=plots.COLORS["flashtile"], height=0.62)
    for place, entry in zip(places, entries, strict=True):
        axes.text(ratios[place], place, f" {ratios[place]:.2f}", va="center", fontsize=8, color=plots.INK)
        if entry["claimed"] is not None:
            axes.plot([entry["claimed"]] * 2, [place - 0.4, place + 0.4], color=plots.INK, linewidth=1.6)
    axes.set_yticks(list(places), [entry["name"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=plots.QUIET, linewidth=1, linestyle=":")
    return plots.save(drawing, path)


def write(results: Path, docs: Path) -> list[Path]:
    """docs/paper.md and its plots, from all records under `results` that are not quick ones."""
    parts, written = [HEADING], []
    for path in sorted(results.glob("*/paper/rows.json")):
        found = json.loads(path.read_text())
        if found["settings"]["quick"]:
            continue
        described = found["machine"]
        drawn = draw(found["rows"], docs / "benchmarks" / f"{described['slug']}-paper.png")
        named = ", ".join(f"{name} {version}" for name, version in described["versions"].items() if version)
        parts.append(f"## {described['name']}\n\n{described['date'][:10]}, {named}; {found['settings']['dtype']}.\n")
        if drawn is not None:
            written.append(drawn)
            parts.append(f"![Claimed and measured]({drawn.relative_to(docs).as_posix()})\n")
        parts.append(table(found["rows"]).markdown())
    if len(parts) == 1:
        return []
    page = docs / "paper.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))
    return [page, *written]
