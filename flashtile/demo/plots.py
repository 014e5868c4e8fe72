"""The demo's two plots."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from flashtile.bench import plots
from flashtile.bench.memory import gib
from flashtile.bench.tables import title_of
from flashtile.demo.scaling import Point
from flashtile.demo.training import Run, differences


def losses(runs: list[Run], tolerance: float, caption: str, path: Path) -> Path:
    """Both loss curves on each other, and below how far they lie apart."""
    drawing = plots.figure(8.4, 5.4)
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1.35))
    steps = range(1, len(runs[0].losses) + 1)
    plots.style(above, f"Training loss: {caption}", "nats a byte")
    # The formula's curve is broad and pale, so that it stays visible under the other.
    looks: tuple[dict[str, Any], ...] = ({"linewidth": 6, "alpha": 0.38, "solid_capstyle": "round"}, {"linewidth": 1.4})
    for run, look in zip(runs, looks, strict=True):
        above.plot(steps, run.losses, color=plots.color(run.name), label=title_of(run.name), **look)
    above.legend(frameon=False, labelcolor=plots.INK, fontsize=9)
    apart = differences(runs)
    plots.style(below, f"How far apart: at most {max(apart):.1e}", "|difference|", "step")
    # A logarithm has no zero; equal losses are drawn at the smallest difference that float32 could show.
    floor = 1e-7
    below.plot(steps, [max(value, floor) for value in apart], color=plots.INK, linewidth=1)
    below.axhline(tolerance, color=plots.color("textbook"), linewidth=1, linestyle=(0, (4, 3)))
    below.annotate(
        f"tolerance {tolerance:g}", (1, tolerance), xytext=(5, -4), textcoords="offset points", fontsize=8.5, va="top",
        color=plots.color("textbook"),
    )  # fmt: skip
    below.set_yscale("log")
    below.yaxis.set_minor_locator(NullLocator())
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylim(floor / 2, tolerance * 4)
    below.set_xlim(1, len(apart))
    return plots.save(drawing, path)


def scaling(points: list[Point], caption: str, path: Path) -> Path:
    """Time and memory against seqlen, with what the formula would need where it was not run."""
    drawing = plots.figure(10.4, 4.6)
    left, right = drawing.subplots(1, 2)
    seqlens = sorted({point.seqlen for point in points})
    plots.style(left, "Time, forward and backward", "", "seqlen")
    plots.style(right, "Memory beyond inputs and outputs", "", "seqlen")
    for peer in dict.fromkeys(point.peer for point in points):
        own = [point for point in points if point.peer == peer]
        _time_line(left, [point for point in own if point.ms is not None])
        _memory_line(right, own)
    for axes in (left, right):
        plots.seqlen_axis(axes, seqlens)
        # Room for the names at the ends of the lines.
        axes.set_xlim(seqlens[0] / 1.15, seqlens[-1] * max(4.0, seqlens[-1] / seqlens[0]) ** 0.36 * 1.1)
    plots.time_axis(left)
    plots.bytes_axis(right)
    drawing.suptitle(caption, x=0.01, ha="left", fontsize=9, color=plots.QUIET)
    return plots.save(drawing, path)


def _time_line(axes: Axes, points: list[Point]) -> None:
    times = [point.ms for point in points if point.ms is not None]
    if not times:
        return
    tint = plots.color(points[0].peer)
    axes.plot([point.seqlen for point in points], times, color=tint, marker="o", markersize=4.5, linewidth=1.8)
    name = f"{title_of(points[0].peer)}\n{plots.duration(times[-1])}"
    # The formula's line stops early, above flashtile's: its name must not lie on the other line.
    plots.end_label(axes, points[-1].seqlen, times[-1], name, tint, before=points[0].peer == "textbook")


def _memory_line(axes: Axes, points: list[Point]) -> None:
    """Solid where measured; dashed with open marks where computed."""
    tint = plots.color(points[0].peer)
    x = [point.seqlen for point in points]
    # A logarithm has no zero.
    y = [max(point.extra, 1024.0) for point in points]
    run = sum(point.ms is not None for point in points)
    axes.plot(x[:run], y[:run], color=tint, marker="o", markersize=4.5, linewidth=1.8)
    axes.plot(x[max(0, run - 1) :], y[max(0, run - 1) :], color=tint, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.plot(x[run:], y[run:], "o", color=tint, markersize=5, fillstyle="none")
    last = points[-1]
    size = gib(last.extra) if last.ms is not None else f"{gib(last.extra)}, computed"
    plots.end_label(axes, x[-1], y[-1], f"{title_of(last.peer)}\n{size}", tint)
