"""The look of the plots, and the shapes that they take; files only, no window and no global state of matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flashtile.bench.memory import gib

INK = "#22303A"
QUIET = "#7B8794"
FAINT = "#E9ECEF"

COLORS = {"flashtile": "#1F8A84", "textbook": "#E07A1F", "sdpa": "#2F6DB5", "sdpa_math": "#7A4FA3"}
OTHERS = ("#C23B4B", "#8A6D3B", "#5B6770")


def color(peer: str, order: Sequence[str] = ()) -> str:
    """A peer's colour, the same in every plot; `order`: the peers of the plot, for those without one of their own."""
    if peer in COLORS:
        return COLORS[peer]
    strangers = [name for name in order if name not in COLORS]
    return OTHERS[strangers.index(peer) % len(OTHERS)] if peer in strangers else QUIET


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style(axes: Axes, title: str, ylabel: str = "", xlabel: str = "") -> Axes:
    """Quiet frame, a grid for the eye to follow sideways, the title flush left."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=9, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=9, color=QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#C4CBD2")
    axes.tick_params(colors=QUIET, labelsize=8, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def seqlen_axis(axes: Axes, seqlens: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each seqlen: 512, 1k, 2k."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(seqlens), [str(n) if n < 1024 else f"{n / 1024:g}k" for n in seqlens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(seqlens) / 1.15, max(seqlens) * 1.15)


def time_axis(axes: Axes) -> None:
    """Logarithmic, of milliseconds, written in the unit that fits."""
    axes.set_yscale("log")
    # Where the times span less than two decades, powers of ten alone would leave the axis almost bare.
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def bytes_axis(axes: Axes) -> None:
    """Logarithmic, of bytes; ticks at powers of four, so that they are round in binary units."""
    axes.set_yscale("log", base=4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: gib(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def duration(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.3g} s"
    return f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1000:.3g} µs"


def end_label(axes: Axes, x: float, y: float, text: str, tint: str, before: bool = False) -> None:
    """A name at the end of its line instead of a legend; `before`: to the left of the end, above the line."""
    place, side = ((-8, 4), "right") if before else ((6, 0), "left")
    axes.annotate(
        text, (x, y), xytext=place, textcoords="offset points", color=tint, fontsize=9, va="center", ha=side,
        annotation_clip=False,
    )  # fmt: skip


def save(drawing: Figure, path: Path) -> Path:
    """Without the versions that would change the file from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=140, metadata={"Software": None})
    return path
