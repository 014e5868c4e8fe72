"""The predictions of `costs` as tables and as a picture: which scheme wins where, and what was measured beside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from rich import box
from rich.table import Table

from flashtile.bench import costs, plots
from flashtile.bench.costs import SCHEMES, Comparison, Machine, Work

TINTS = {"ring": "#1F8A84", "ulysses": "#E07A1F", "gather": "#7A4FA3", "mixed": "#2F6DB5"}
LENGTHS = tuple(2**power for power in range(15, 25))


def tables(
    work: Work, seqlens: Sequence[int], ranks: Sequence[int], machine: Machine, records: Sequence[dict[str, Any]]
) -> list[Table]:
    """One a length: milliseconds and efficiency of every scheme by ranks; then what was measured."""
    found = [_predictions(_longer(work, seqlen), ranks, machine) for seqlen in seqlens]
    return found + [_comparison(record) for record in records if costs.validate(record)]


def _longer(work: Work, seqlen: int) -> Work:
    return Work(seqlen, work.heads, work.heads_kv, work.headdim, work.element)


def _new(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _predictions(work: Work, ranks: Sequence[int], machine: Machine) -> Table:
    heads = f"{work.heads}/{work.heads_kv} heads of {work.headdim}"
    title = f"{work.seqlen:,} tokens, {heads}: ms of both passes, share of all devices' speed"
    table = _new(title, "ranks", *SCHEMES, "best")
    for count in ranks:
        cells = []
        for scheme in SCHEMES:
            if not costs.fits(scheme, work, count, machine):
                cells.append("-")
                continue
            times = costs.predict(scheme, work, count, machine)
            cells.append(f"{1e3 * times.both:.3g}  {costs.efficiency(work, count, machine, times):>4.0%}")
        table.add_row(str(count), *cells, costs.best(work, count, machine)[0])
    return table


def _comparison(record: dict[str, Any]) -> Table:
    title = f"{record['ranks']} x {record['machine']['name']}: predicted and measured, medians"
    table = _new(title, "tokens", "scheme", "pass", "predicted ms", "measured ms", "measured / predicted")
    for each in costs.validate(record):
        row = (f"{each.seqlen:,}", each.scheme, each.which, f"{each.predicted:.2f}", f"{each.measured:.2f}")
        table.add_row(*row, f"{each.measured / each.predicted:.2f}")
    return table


BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"


def write(path: Path, records: Sequence[dict[str, Any]]) -> bool:
    """Puts the records' tables between the two marks of a document; returns whether it has them."""
    text = path.read_text() if path.exists() else ""
    if BEGIN not in text or END not in text:
        return False
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    path.write_text("\n".join([before + BEGIN, *markdown(records), after]))
    return True


def markdown(records: Sequence[dict[str, Any]]) -> list[str]:
    """Of each record with a peer's ring: speed, memory, and what the model predicted."""
    lines = []
    for record in records:
        rows = {(row["seqlen"], row["way"]): row for row in record["rows"] if row["status"] == "ok"}
        lengths = [length for length, way in rows if way == "peer ring" and (length, "ring") in rows]
        if lengths and record["settings"]["device"] == "cuda":
            lines += _speeds(record, rows, lengths) + _memories(record, rows, lengths) + _predicted(record)
    return lines


Rows = dict[tuple[int, str], dict[str, Any]]


def _speeds(record: dict[str, Any], rows: Rows, lengths: Sequence[int]) -> list[str]:
    ranks, name = record["ranks"], record["machine"]["name"]
    lines = ["", f"| {ranks} x {name} | pass | one card, ms | ring, ms | efficiency | peer ring, ms |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for length in lengths:
        for which in ("forward", "backward"):
            one, ring, peer = (rows[length, way][which]["median"] for way in ("one", "ring", "peer ring"))
            efficiency = f"{one / ranks / ring:.1%}"
            lines.append(f"| {length:,} tokens | {which} | {one:.2f} | {ring:.2f} | {efficiency} | {peer:.2f} |")
    return lines


def _memories(record: dict[str, Any], rows: Rows, lengths: Sequence[int]) -> list[str]:
    lines = [
        "",
        "| memory of a rank, GiB | one card | ring | share | peer ring |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for length in lengths:
        one, ring, peer = (rows[length, way]["memory"] / 2**30 for way in ("one", "ring", "peer ring"))
        lines.append(f"| {length:,} tokens | {one:.2f} | {ring:.2f} | {ring / one:.0%} | {peer:.2f} |")
    return lines


def _predicted(record: dict[str, Any]) -> list[str]:
    lines = ["", "| tokens | scheme | pass | predicted, ms | measured, ms | measured / predicted |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for each in costs.validate(record):
        times = f"{each.predicted:.2f} | {each.measured:.2f} | {each.measured / each.predicted:.2f}"
        lines.append(f"| {each.seqlen:,} tokens | {each.scheme} | {each.which} | {times} |")
    return [*lines, ""]


def draw(work: Work, ranks: Sequence[int], machine: Machine, records: Sequence[dict[str, Any]], path: Path) -> Path:
    """Efficiency against ranks, the fastest scheme by ranks and length, and, where there are records, their check."""
    compared = [each for record in records for each in costs.validate(record)]
    drawing = plots.figure(12.6 if compared else 8.6, 3.6)
    panels = drawing.subplots(1, 3 if compared else 2)
    _efficiencies(panels[0], _longer(work, 2**20), ranks, machine)
    _winners(panels[1], work, ranks, machine)
    if compared:
        _check(panels[2], compared)
    path.parent.mkdir(parents=True, exist_ok=True)
    return plots.save(drawing, path)


def _efficiencies(axes: Axes, work: Work, ranks: Sequence[int], machine: Machine) -> None:
    plots.style(axes, "1M tokens, predicted", "share of all devices' speed", "ranks")
    for scheme, tint in TINTS.items():
        fitting = [count for count in ranks if costs.fits(scheme, work, count, machine)]
        shares = [
            costs.efficiency(work, count, machine, costs.predict(scheme, work, count, machine)) for count in fitting
        ]
        axes.plot(fitting, shares, color=tint, marker="o", markersize=3.5, linewidth=1.5, label=scheme)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(count) for count in ranks])
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, labelcolor=plots.INK)


def _winners(axes: Axes, work: Work, ranks: Sequence[int], machine: Machine) -> None:
    plots.style(axes, "Fastest scheme, predicted", "tokens", "ranks")
    names = [[costs.best(_longer(work, length), count, machine)[0] for count in ranks] for length in LENGTHS]
    grid = [[SCHEMES.index(name) for name in row] for row in names]
    axes.imshow(
        grid, origin="lower", aspect="auto", cmap=ListedColormap([TINTS[name] for name in SCHEMES]), vmin=0, vmax=3
    )
    axes.set_xticks(range(len(ranks)), [str(count) for count in ranks])
    axes.set_yticks(range(len(LENGTHS)), [f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}k" for n in LENGTHS])
    axes.grid(visible=False)
    shown = [name for name in SCHEMES if any(name in row for row in names)]
    axes.legend(handles=[Patch(color=TINTS[name], label=name) for name in shown], fontsize=8, loc="upper right")


def _check(axes: Axes, compared: Sequence[Comparison]) -> None:
    plots.style(axes, "Measured, medians", "measured ms", "predicted ms")
    for scheme in dict.fromkeys(each.scheme for each in compared):
        for which, mark in (("forward", "o"), ("backward", "s")):
            chosen = [each for each in compared if (each.scheme, each.which) == (scheme, which)]
            x, y = [each.predicted for each in chosen], [each.measured for each in chosen]
            axes.plot(x, y, mark, color=TINTS[scheme], markersize=5, label=f"{scheme}, {which}")
    ends = [min(each.predicted for each in compared) / 1.5, max(each.predicted for each in compared) * 1.5]
    axes.plot(ends, ends, color=plots.QUIET, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=7.5, labelcolor=plots.INK)
