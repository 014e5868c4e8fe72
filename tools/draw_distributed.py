"""Draws the pictures of docs/distributed.md from the library itself. Run `python tools/draw_distributed.py`.

What a rank computes and what is sent come from the functions that the schemes use (`rectangles`, `hull`, `pieces`).
"""

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Polygon, Rectangle
from palette import BLUE, FAINT, FULL, INK, PARTIAL_ON, PURPLE, QUIET, bare, save

from flashtile import masks, parts
from flashtile.distributed import balance
from flashtile.distributed.scheme import CAUSAL, hull, rectangles
from flashtile.parts import Inputs, Options, Whole

RANKS = 4
TOKENS = 4  # of a rank: two chunks of two
TINTS = (FULL, PARTIAL_ON, BLUE, PURPLE)


def _whole(mask: masks.Mask) -> Whole:
    q = torch.zeros(1, TOKENS, 1, 1)
    return parts.whole_of(Inputs(q, q, q), Options(mask=mask.token), RANKS)


def _pieces(layout: str, rank: int) -> list[balance.Piece]:
    return balance.pieces(layout, rank, RANKS, RANKS * TOKENS)


def _global(layout: str, rank: int, local: slice) -> list[tuple[int, int]]:
    """(begin, length) in the sequence of the pieces of some of a rank's tokens."""
    found = []
    for piece in _pieces(layout, rank):
        begin, end = max(piece.local, local.start), min(piece.local + piece.length, local.stop)
        if end > begin:
            found.append((piece.begin + begin - piece.local, end - begin))
    return found


def _frame(axes: Axes, title: str) -> None:
    bare(axes).set_title(title, loc="left")
    size = RANKS * TOKENS
    axes.set_xlim(-0.2, size + 0.2)
    axes.set_ylim(size + 0.2, -0.2)
    axes.set_aspect("equal")
    axes.add_patch(Rectangle((0, 0), size, size, facecolor="none", edgecolor=FAINT))


def _paint(axes: Axes, layout: str, rank: int, source: int, tint: str) -> None:
    """What a rank computes with the keys of another."""
    whole = _whole(masks.causal())
    for found in rectangles(whole, _pieces(layout, rank), _pieces(layout, source)):
        for row, height in _global(layout, rank, found.rows):
            for column, width in _global(layout, source, found.keys):
                if column > row:
                    continue
                if found.mask.token == CAUSAL and row == column:
                    corners = [(column, row), (column, row + height), (column + width, row + height)]
                    axes.add_patch(Polygon(corners, facecolor=tint, edgecolor="white", linewidth=0.8))
                else:
                    axes.add_patch(
                        Rectangle((column, row), width, height, facecolor=tint, edgecolor="white", linewidth=0.8)
                    )


def layouts() -> None:
    """Whose work the scores of a causal problem are, in both layouts, and how much each rank has."""
    figure, grid = plt.subplots(1, 4, figsize=(9.6, 2.7), width_ratios=(3, 1.5, 3, 1.5))
    for place, layout in enumerate(("contiguous", "zigzag")):
        axes, bars = grid[2 * place], grid[2 * place + 1]
        _frame(axes, f"{layout}: who computes what")
        for rank in range(RANKS):
            for source in range(RANKS):
                _paint(axes, layout, rank, source, TINTS[rank])
        work = [
            sum(
                token + 1 for piece in _pieces(layout, rank) for token in range(piece.begin, piece.begin + piece.length)
            )
            for rank in range(RANKS)
        ]
        bars.barh(range(RANKS), work, color=TINTS)
        bars.set_yticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)])
        bars.invert_yaxis()
        bars.set_xticks([])
        bars.set_title("work", loc="left")
        for side in ("top", "right", "bottom"):
            bars.spines[side].set_visible(False)
        axes.set_xlabel("keys")
        axes.set_ylabel("queries")
    figure.tight_layout()
    save(figure, "distributed_layouts")


def ring() -> None:
    """The steps of a ring: every rank computes the same, and what it will need next is under way."""
    figure, grid = plt.subplots(1, RANKS, figsize=(9.6, 3.5))
    whole = _whole(masks.causal())
    for step, axes in enumerate(grid):
        _frame(axes, f"step {step}")
        sent = []
        for rank in range(RANKS):
            source = (rank - step) % RANKS
            _paint(axes, "zigzag", rank, source, TINTS[rank])
            needed = hull(rectangles(whole, _pieces("zigzag", rank), _pieces("zigzag", source)))
            if step and needed is not None:
                chunks = " ".join(str(begin // (TOKENS // 2)) for begin, _ in _global("zigzag", source, needed))
                sent.append(f"{source} to {rank}: chunks {chunks}")
        axes.set_xlabel("\n".join(sent) or "its own keys", fontsize=7.5, color=INK)
    handles = [Patch(color=tint, label=f"rank {rank}") for rank, tint in enumerate(TINTS)]
    figure.legend(handles=handles, loc="lower center", ncols=RANKS, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, "distributed_ring")


def ulysses() -> None:
    """Who holds which tokens of which heads, before and after the all-to-all."""
    heads = 8
    figure, grid = plt.subplots(1, 3, figsize=(9.6, 2.6))
    titles = ("q, k, v as they come", "during attention", "mixed, during attention: 2 x 2")
    for axes, title in zip(grid, titles, strict=True):
        bare(axes).set_title(title, loc="left")
        axes.set_xlim(-0.2, RANKS * TOKENS + 0.2)
        axes.set_ylim(heads + 0.2, -0.2)
        axes.set_xlabel("tokens, in the sequence's order")
        axes.set_ylabel("heads")
    for rank, tint in enumerate(TINTS):
        for piece in _pieces("zigzag", rank):
            _cell(grid[0], piece.begin, piece.length, (0, heads), tint)
        _cell(grid[1], 0, RANKS * TOKENS, (rank * heads // RANKS, heads // RANKS), tint)
        place, inner = divmod(rank, 2)
        for piece in balance.pieces("zigzag", place, 2, RANKS * TOKENS):
            _cell(grid[2], piece.begin, piece.length, (inner * heads // 2, heads // 2), tint)
    handles = [Patch(color=tint, label=f"rank {rank}") for rank, tint in enumerate(TINTS)]
    figure.legend(handles=handles, loc="lower center", ncols=RANKS, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save(figure, "distributed_ulysses")


def _cell(axes: Axes, begin: int, length: int, rows: Sequence[int], tint: str) -> None:
    axes.add_patch(Rectangle((begin, rows[0]), length, rows[1], facecolor=tint, edgecolor="white", linewidth=1.2))


def schedule() -> None:
    """What is computed and what travels, over time, for one rank."""
    figure, axes = plt.subplots(figsize=(9.6, 2.0))
    bare(axes)
    axes.set_xlim(-1.6, 11.1)
    axes.set_ylim(2.7, -0.1)
    for row, name in enumerate(("computes", "keys travel", "gradients travel")):
        axes.text(-0.1, row + 0.3, name, ha="right", va="center", fontsize=8.5)
    for step in range(RANKS):
        _bar(axes, step, 0, 1, FULL, f"forward {step}")
        _bar(axes, 4.6 + 1.4 * step, 0, 1.4, PURPLE, f"backward {step}")
        if step + 1 < RANKS:
            _bar(axes, step, 1, 0.55, QUIET, f"K V {step + 1}")
            _bar(axes, 4.6 + 1.4 * step, 1, 0.55, QUIET, f"K V {step + 1}")
        if step:
            _bar(axes, 4.6 + 1.4 * (step + 1), 2, 0.7, PARTIAL_ON, f"dK dV {step}")
    save(figure, "distributed_schedule")


def _bar(axes: Axes, begin: float, row: float, length: float, tint: str, text: str) -> None:
    axes.add_patch(Rectangle((begin, row), length, 0.6, facecolor=tint, edgecolor="white", linewidth=1.2))
    axes.text(begin + length / 2, row + 0.3, text, ha="center", va="center", fontsize=7.5, color="white")


if __name__ == "__main__":
    layouts()
    ring()
    ulysses()
    schedule()
