"""The plots of docs/paper.md: all ratios, and the memory that attention takes at each length."""

from pathlib import Path
from typing import Any

from flashtile.bench import plots


def ratios(entries: list[dict[str, Any]], path: Path) -> Path | None:
    """Bars of what was measured, a stroke where the claim stands."""
    entries = [entry for entry in entries if entry["status"] == "ok"]
    if not entries:
        return None
    drawing = plots.figure(9.2, 1.2 + 0.32 * len(entries))
    axes = plots.style(drawing.subplots(), "Times better than the baseline", xlabel="ratio; the strokes are the claims")
    found = [entry["figures"]["ratio"] for entry in entries]
    places = range(len(entries))
    axes.barh(list(places), found, color=plots.COLORS["flashtile"], height=0.62)
    for place, entry in zip(places, entries, strict=True):
        axes.text(found[place], place, f" {found[place]:.2f}", va="center", fontsize=8, color=plots.INK)
        if entry["claimed"] is not None:
            axes.plot([entry["claimed"]] * 2, [place - 0.4, place + 0.4], color=plots.INK, linewidth=1.6)
    axes.set_yticks(list(places), [entry["name"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=plots.QUIET, linewidth=1, linestyle=":")
    return plots.save(drawing, path)


def memory(entry: dict[str, Any], path: Path) -> Path | None:
    """Peak memory against the sequence's length; None where the row has no figures."""
    if entry["status"] != "ok":
        return None
    drawing = plots.figure(6.4, 3.6)
    title = "Memory of attention, forward and backward, beyond its inputs"
    axes = plots.style(drawing.subplots(), title, xlabel="tokens")
    lines = {
        name: {int(length): size for length, size in peaks.items()}
        for name, peaks in entry["figures"]["details"]["peak_bytes"].items()
    }
    for name, peer in (("baseline", "textbook"), ("ours", "flashtile")):
        lengths, sizes = zip(*sorted(lines[name].items()), strict=True)
        axes.plot(lengths, sizes, color=plots.COLORS[peer], marker="o", markersize=4)
        plots.end_label(axes, lengths[-1], sizes[-1], peer, plots.COLORS[peer], before=True)
    plots.bytes_axis(axes)
    plots.seqlen_axis(axes, sorted({length for line in lines.values() for length in line}))
    return plots.save(drawing, path)
