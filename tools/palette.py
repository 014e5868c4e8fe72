"""The look of every drawing in docs/: one palette, one type size, small PNGs that come out the same on every run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

INK = "#22303A"
QUIET = "#7B8794"
LINE = "#FFFFFF"
FAINT = "#D5DADF"
MASKED = "#E9ECEF"  # a tile that is never visited
PARTIAL_OFF = "#FBE0C3"  # in a visited tile, hidden by the mask
PARTIAL_ON = "#E07A1F"  # in a visited tile, allowed
FULL = "#1F8A84"  # in a tile that needs no mask
BLUE, PURPLE, RED = "#2F6DB5", "#7A4FA3", "#C23B4B"

WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#FFFFFF", "#BFE0DC", FULL, "#0B3B3A"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#8A4B08", PARTIAL_ON, "#FFFFFF", FULL, "#0B3B3A"])

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlecolor": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": QUIET,
        "axes.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "figure.facecolor": "white",
    }
)


def save(figure: Figure, name: str) -> None:
    """Writes docs/images/<name>.png, without the date and version that would change it from run to run."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def bare(axes: Axes) -> Axes:
    """No ticks, no frame: for drawings that are not plots."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    return axes
