"""From the records to docs/benchmarks.md and its plots. What stands outside the markers of that file is left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from flashtile.bench import cases, plots, records, tables
from flashtile.bench.memory import gib
from flashtile.bench.records import Record, Row

BEGIN = "<!-- begin: flashtile bench report -->"
END = "<!-- end: flashtile bench report -->"

LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": plots.INK}

HEADING = """# Benchmarks

How they were taken: random inputs; peers take turns within a run, in an order that is drawn anew each round, as the
clock of a card depends on what ran just before; each in its own best layout; the error of every peer is checked against
float64 on the inputs that are timed, and one that fails has no figure. Repeat them with `flashtile bench`, then
`flashtile bench report`.

"""


def write(results: Path, docs: Path) -> list[Path]:
    """Writes the page and the plots of all records under `results`; returns what was written.

    Raises:
        ValueError: there is no record, or one of another schema.
    """
    found = records.read(results)
    if not found:
        raise ValueError(f"{results}: got no record, need at least one, try flashtile bench first")
    written, parts, slug = [], [], ""
    for record in found:
        if record["machine"]["slug"] != slug:
            slug = record["machine"]["slug"]
            parts.append(f"## {record['machine']['name']}\n")
        drawn = _draw(record, docs / "benchmarks")
        written += drawn
        parts.append(_section(record, [path.relative_to(docs) for path in drawn]))
    page = docs / "benchmarks.md"
    _between_markers(page, "\n".join(parts))
    return [page, *written]


def _between_markers(page: Path, text: str) -> None:
    old = page.read_text() if page.exists() else f"{HEADING}{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, after = old.split(BEGIN, 1)[0], old.split(END, 1)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def _section(record: Record, images: list[Path]) -> str:
    parts = [f"### {record['title']}\n", f"{_circumstances(record)}\n"]
    parts += [f"![{record['title']}]({image.as_posix()})\n" for image in images]
    for table in tables.of(record):
        parts += [f"{table.title}:\n", table.markdown()]
    return "\n".join(parts)


def _circumstances(record: Record) -> str:
    """One line: when, with what, from which commit."""
    machine, settings = record["machine"], record["settings"]
    versions, source = machine["versions"], machine["source"]
    commit = source["commit"][:12] if source["commit"] else "no checkout"
    commit += ", changed since" if source["dirty"] else ""
    heads = (
        f"{settings['heads']}/{settings['heads_kv']}"
        if settings["heads"] != settings["heads_kv"]
        else settings["heads"]
    )
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    # Records from before clocks were kept have none.
    if clocks := machine.get("clocks"):
        threads += f", at most {clocks['clocks.max.sm']:.0f} MHz and {clocks['power.limit']:.0f} W"
    # Nor have those that were taken in one order throughout, which counts for much at a card's power limit.
    if machine["device"] == "cuda" and "order" not in settings:
        threads += ", peers always in the same order"
    return (
        f"{machine['date'][:10]}, torch {versions['torch']}, flashtile {versions['flashtile']} ({commit}){threads}; "
        f"batch {settings['batch']}, heads {heads}, headdim {settings['headdim']}."
    )


def _draw(record: Record, folder: Path) -> list[Path]:
    """The record's plots; errors are a table only."""
    draw: dict[str, Callable[[Record, Path], Path | None]] = {"time": _draw_time, "memory": _draw_memory}
    make = draw.get(record["kind"])
    path = folder / f"{record['machine']['slug']}-{record['suite']}.png"
    drawn = make(record, path) if make is not None else None
    return [] if drawn is None else [drawn]


def _measured(record: Record) -> list[Row]:
    return [entry for entry in record["rows"] if entry["status"] == "ok"]


def _draw_time(record: Record, path: Path) -> Path | None:
    """Lines against seqlen where several were measured, bars where one was."""
    rows = _measured(record)
    if not rows:
        return None
    if record["suite"] == "sparsity":
        return _draw_sparsity(rows, path)
    seqlens = sorted({entry["case"]["seqlen"] for entry in rows})
    return _draw_lines(rows, seqlens, path) if len(seqlens) > 1 else _draw_bars(rows, path)


def _draw_sparsity(rows: list[Row], path: Path) -> Path:
    """Time against the share of the pairs that the mask leaves, both relative to no mask; ideal is the diagonal."""
    drawing = plots.figure(9.2, 3.8)
    for axes, which in zip(drawing.subplots(1, 2), ("forward", "backward"), strict=True):
        found = {entry["case"]["feature"]: entry for entry in rows if entry["pass"] == which}
        whole = found["plain"]
        plots.style(axes, f"{which}, seqlen {whole['case']['seqlen']}", "time / time of no mask", "pairs / all pairs")
        axes.plot([0.02, 1], [0.02, 1], color=plots.QUIET, linewidth=1, linestyle=":")
        every = cases.pairs(records.case_of(whole))
        shares = {name: cases.pairs(records.case_of(entry)) / every for name, entry in found.items()}
        for place, feature in enumerate(sorted(found, key=shares.__getitem__)):
            height = found[feature]["ms"]["median"] / whole["ms"]["median"]
            axes.plot(shares[feature], height, "o", color=plots.color(tables.SUBJECT), markersize=5)
            look = {"xytext": (5, -9), "ha": "left"} if place % 2 else {"xytext": (-5, 4), "ha": "right"}
            axes.annotate(feature, (shares[feature], height), textcoords="offset points", fontsize=7, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.01, 1.3)
    return plots.save(drawing, path)


def _panels(rows: list[Row]) -> tuple[list[tuple[str, str]], list[str]]:
    """((feature and dtype) of each row of panels, passes of each column)."""
    features = list(dict.fromkeys((tables.label(entry), entry["case"]["dtype"]) for entry in rows))
    return features, list(dict.fromkeys(entry["pass"] for entry in rows))


def _pick(rows: list[Row], feature: tuple[str, str], which: str) -> list[Row]:
    return [e for e in rows if (tables.label(e), e["case"]["dtype"]) == feature and e["pass"] == which]


def _draw_lines(rows: list[Row], seqlens: list[int], path: Path) -> Path:
    features, passes = _panels(rows)
    peers = list(dict.fromkeys(entry["peer"] for entry in rows))
    drawing = plots.figure(4.6 * len(passes), 3.2 * len(features))
    grid = drawing.subplots(len(features), len(passes), squeeze=False)
    for i, feature in enumerate(features):
        for j, which in enumerate(passes):
            axes = plots.style(grid[i][j], f"{feature[0]}, {which}, {feature[1]}", "", "seqlen")
            for peer in sorted(peers, key=lambda name: name == tables.SUBJECT):
                _line(axes, [e for e in _pick(rows, feature, which) if e["peer"] == peer], peers)
            plots.seqlen_axis(axes, seqlens)
            plots.time_axis(axes)
    grid[0][0].legend(**LEGEND)
    return plots.save(drawing, path)


def _line(axes: Axes, rows: list[Row], peers: list[str]) -> None:
    """One peer's medians, its spread shaded. Equal times would hide each other: flashtile's line is thin, with dots."""
    if not rows:
        return
    rows = sorted(rows, key=lambda entry: int(entry["case"]["seqlen"]))
    x = [entry["case"]["seqlen"] for entry in rows]
    tint, subject = plots.color(rows[0]["peer"], peers), rows[0]["peer"] == tables.SUBJECT
    axes.fill_between(
        x, [e["ms"]["p20"] for e in rows], [e["ms"]["p80"] for e in rows], color=tint, alpha=0.15, linewidth=0
    )
    look = {"linewidth": 1.5, "marker": "o", "markersize": 4} if subject else {"linewidth": 3.2, "alpha": 0.6}
    axes.plot(x, [e["ms"]["median"] for e in rows], color=tint, label=tables.title_of(rows[0]["peer"]), **look)


def _draw_bars(rows: list[Row], path: Path) -> Path:
    features, passes = _panels(rows)
    peers = sorted(dict.fromkeys(entry["peer"] for entry in rows), key=lambda name: name != tables.SUBJECT)
    drawing = plots.figure(4.6 * len(passes), 0.9 + 0.34 * len(features) * (len(peers) + 0.8))
    grid = drawing.subplots(1, len(passes), squeeze=False, sharey=True)
    seqlen = rows[0]["case"]["seqlen"]
    for j, which in enumerate(passes):
        axes = plots.style(grid[0][j], f"{which}, seqlen {seqlen}", "", "milliseconds")
        for i, feature in enumerate(features):
            for entry in sorted(_pick(rows, feature, which), key=lambda found: peers.index(found["peer"])):
                y = i * (len(peers) + 0.8) + peers.index(entry["peer"])
                _bar(axes, y, entry["ms"]["median"], plots.duration(entry["ms"]["median"]), entry["peer"], i == 0)
        _bar_axis(axes, [_feature_name(feature, features) for feature in features], len(peers))
    drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=len(peers), **LEGEND)
    return plots.save(drawing, path)


def _feature_name(feature: tuple[str, str], features: list[tuple[str, str]]) -> str:
    return feature[0] if len({dtype for _, dtype in features}) == 1 else f"{feature[0]}, {feature[1]}"


def _bar(axes: Axes, y: float, value: float, text: str, peer: str, first: bool) -> None:
    axes.barh(y, value, color=plots.color(peer), height=0.86, label=tables.title_of(peer) if first else None)
    axes.annotate(text, (value, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=plots.INK)


def _bar_axis(axes: Axes, names: list[str], bars: int) -> None:
    """A name beside each group of bars, the first group on top."""
    axes.set_yticks([i * (bars + 0.8) + (bars - 1) / 2 for i in range(len(names))], names)
    axes.tick_params(axis="y", length=0, labelsize=9, colors=plots.INK)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=plots.FAINT)
    axes.margins(x=0.16)
    axes.set_ylim(len(names) * (bars + 0.8) - 1.1, -0.7)


def _draw_memory(record: Record, path: Path) -> Path | None:
    """Bars on a logarithmic axis: the extra memory of each peer."""
    rows = [entry for entry in _measured(record) if entry["extra_bytes"]]
    if not rows:
        return None
    peers = sorted(dict.fromkeys(entry["peer"] for entry in rows), key=lambda name: name != tables.SUBJECT)
    cells = records.cells(rows)
    drawing = plots.figure(7.6, 0.9 + 0.32 * len(cells) * (len(peers) + 0.8))
    seqlen = rows[0]["case"]["seqlen"]
    axes = plots.style(drawing.subplots(), f"Memory beyond inputs and outputs, seqlen {seqlen}")
    for i, cell in enumerate(cells):
        for entry in sorted(cell, key=lambda found: peers.index(found["peer"])):
            y = i * (len(peers) + 0.8) + peers.index(entry["peer"])
            _bar(axes, y, entry["extra_bytes"], gib(entry["extra_bytes"]), entry["peer"], i == 0)
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter(lambda value, _: gib(value))
    axes.xaxis.set_minor_locator(NullLocator())
    _bar_axis(axes, [f"{cell[0]['case']['feature']}, {cell[0]['pass']}" for cell in cells], len(peers))
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **LEGEND)
    return plots.save(drawing, path)
