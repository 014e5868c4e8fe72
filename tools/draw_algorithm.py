"""Draws the pictures of docs/algorithm.md; every number in them comes from the library or from a run of the formula.

Run `python tools/draw_algorithm.py`.
"""

import torch
from draw import grid
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from palette import BLUE, FAINT, FULL, INK, MASKED, PARTIAL_OFF, PARTIAL_ON, PURPLE, QUIET, bare, save

import flashtile
from flashtile import mask_nodes, masks
from flashtile.spans import Tiling

TITLE = {"fontsize": 9.5, "color": INK, "pad": 8}


def draw_tiling() -> None:
    """What of the score matrix exists at one moment: all of it, a row of tiles, a tile."""
    done, held, later = FULL, PARTIAL_ON, MASKED
    kinds = torch.zeros(3, 32, 32)
    kinds[0] = 1
    kinds[1, :12], kinds[1, 12:16] = 2, 1
    kinds[2, :12], kinds[2, 12:16, :20], kinds[2, 12:16, 20:24] = 2, 2, 1
    figure, row = plt.subplots(1, 3, figsize=(9.6, 4.05), layout="constrained")
    titles = ("the formula", "tiles of queries", "tiles of queries and keys")
    sizes = ("seqlen_q × seqlen_kv", "tile_q × seqlen_kv", "tile_q × tile_kv")
    for axes, kind, title, size in zip(row, kinds, titles, sizes, strict=True):
        axes.imshow(kind, cmap=ListedColormap([later, held, done]), vmin=0, vmax=2, interpolation="nearest")
        grid(axes, 32, 32, 4, 4)
        bare(axes).set_title(title, **TITLE)
        axes.set_xlabel(f"keys\nscores held at once: {size}")
        axes.set_ylabel("queries")
    labels = (("held now", held), ("done and forgotten", done), ("not yet computed", later))
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=label) for label, colour in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=1.1)
    save(figure, "algorithm_tiling")


def draw_online_softmax() -> None:
    """One query walks 48 keys, 8 at a time."""
    generator = torch.Generator().manual_seed(4)
    tile, count = 8, 48
    score = torch.randn(count, generator=generator, dtype=torch.float64) * 1.2 + torch.linspace(-1.5, 1.2, count)
    value = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    final = torch.softmax(score, 0) @ value
    highest, total, out = torch.tensor(-torch.inf, dtype=torch.float64), torch.tensor(0.0), torch.zeros(2)
    steps: list[tuple[int, float, float, float, float]] = []
    for begin in range(0, count, tile):
        part = score[begin : begin + tile]
        raised = torch.maximum(highest, part.max())
        rescale, weights = torch.exp(highest - raised), torch.exp(part - raised)
        total, out = total * rescale + weights.sum(), out * rescale + weights @ value[begin : begin + tile]
        highest = raised
        off = float((out / total - final).abs().max())
        steps.append((begin, float(highest), float(rescale), float(highest + total.log()), off))
    figure, (scores, factor, error) = plt.subplots(
        3, 1, figsize=(7.2, 5.4), sharex=True, height_ratios=(2.2, 1, 1), layout="constrained"
    )
    scores.bar(range(count), score, color=FULL, width=0.7, label="score of each key")
    for begin, peak, rescale, lse, off in steps:
        span, first = (begin - 0.5, begin + tile - 0.5), begin == 0
        scores.plot(span, (peak, peak), color=PARTIAL_ON, linewidth=2.2, label="m, highest so far" if first else None)
        scores.plot(
            span,
            (lse, lse),
            color=PURPLE,
            linewidth=1.6,
            linestyle=(0, (3, 2)),
            label="lse of the keys so far" if first else None,
        )
        factor.bar(begin + tile / 2 - 0.5, rescale, width=tile - 1.2, color=PARTIAL_ON)
        factor.text(begin + tile / 2 - 0.5, rescale + 0.05, f"{rescale:.2f}", ha="center", va="bottom", fontsize=8)
        error.bar(begin + tile / 2 - 0.5, off, width=tile - 1.2, color=BLUE)
        error.text(
            begin + tile / 2 - 0.5,
            off + 0.02,
            f"{off:.2f}" if off > 1e-9 else "0",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    scores.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, bbox_to_anchor=(0, 1.14))
    scores.set_ylabel("score")
    factor.set_ylabel("exp(m − m′)")
    factor.set_ylim(0, 1.45)
    error.set_ylabel("|out − final|")
    error.set_ylim(0, max(step[-1] for step in steps) * 1.35)
    error.set_xlabel("keys, in tiles of 8")
    error.set_xticks(range(0, count + 1, tile))
    for axes in (scores, factor, error):
        axes.spines[["top", "right"]].set_visible(False)
        for begin in range(0, count + 1, tile):
            axes.axvline(begin - 0.5, color=FAINT, linewidth=0.7, zorder=0)
    save(figure, "algorithm_online_softmax")


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.0, height: float = 0.62) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0.02,rounding_size=0.09", facecolor=colour, linewidth=0
        )
    )
    shade = INK if colour in (PARTIAL_OFF, MASKED) else "white"
    axes.text(x, y, text, ha="center", va="center", color=shade, fontsize=9.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=QUIET, linewidth=1.1, connectionstyle=style
        )
    )


def draw_backward() -> None:
    """One tile of the backward pass: what is read, what is made again, what is added to."""
    figure, axes = plt.subplots(figsize=(8.6, 3.9), layout="constrained")
    bare(axes)
    axes.set_xlim(-0.7, 9.6)
    axes.set_ylim(-0.75, 3.75)
    for x, y, text in ((0, 3, "Q, K"), (0, 2, "lse"), (0, 1, "dO, V"), (0, 0, "delta")):
        box(axes, x, y, text, MASKED)
    box(axes, 2.6, 3, "S = scale · Q Kᵀ", PARTIAL_ON, 2.0)
    box(axes, 5.3, 2.5, "P = exp(S − lse)", PARTIAL_ON, 2.1)
    box(axes, 2.6, 1, "dP = dO Vᵀ", PARTIAL_ON, 2.0)
    box(axes, 5.3, 0.5, "dS = P ∘ (dP − delta)", PARTIAL_ON, 2.5)
    box(axes, 8.4, 2.5, "dV += Pᵀ dO", FULL, 1.6)
    box(axes, 8.4, 1.1, "dQ += scale · dS K", FULL, 1.95)
    box(axes, 8.4, 0, "dK += scale · dSᵀ Q", FULL, 1.95)
    for start, end in (
        ((0.55, 3), (1.55, 3)),
        ((3.65, 2.95), (4.2, 2.6)),
        ((0.55, 2.03), (4.2, 2.42)),
        ((0.55, 1), (1.55, 1)),
        ((3.65, 0.95), (4.0, 0.65)),
        ((0.55, 0.02), (4.0, 0.4)),
        ((5.3, 2.15), (5.3, 0.87)),
        ((6.4, 2.5), (7.55, 2.5)),
        ((6.6, 0.6), (7.38, 1.0)),
        ((6.6, 0.4), (7.38, 0.05)),
    ):
        arrow(axes, start, end)
    for x, text in ((0, "read"), (3.9, "made again, one tile at a time"), (8.4, "added up over tiles")):
        axes.text(x, 3.6, text, ha="center", va="center", color=QUIET, fontsize=8.5)
    save(figure, "algorithm_backward")


def draw_spans() -> None:
    """The three runs of one query tile, as `Spans.runs` gives them."""
    tiling, mask, index = Tiling(32, 32, 4, 4), masks.window(13, 6), 4
    lowered = mask_nodes.parse(mask.token).lower(tiling, ())
    state = lowered.to_layout(tiling).state[0, 0]
    figure, axes = plt.subplots(figsize=(6.2, 6.6), layout="constrained")
    colours = ListedColormap([MASKED, PARTIAL_OFF, FULL])
    axes.imshow(state.repeat_interleave(4, 0).repeat_interleave(4, 1), cmap=colours, vmin=0, vmax=2)
    for place in range(0, 33, 4):
        axes.plot((place - 0.5,) * 2, (-0.5, 31.5), color="white", linewidth=1.6)
        axes.plot((-0.5, 31.5), (place - 0.5,) * 2, color="white", linewidth=1.6)
    axes.add_patch(Rectangle((-0.5, index * 4 - 0.5), 32, 4, fill=False, edgecolor=INK, linewidth=1.8, zorder=5))
    bare(axes).set_title(f"{masks.readable(mask.token)}: tile states; the box is query tile {index}", **TITLE)
    axes.set_ylim(41.5, -0.8)
    for run in lowered.runs(tiling)[0][0][index]:
        place = (run.begin - 0.5, 34.7)
        colour = PARTIAL_OFF if run.masked else FULL
        axes.add_patch(Rectangle(place, run.end - run.begin, 2, facecolor=colour, edgecolor="white"))
        text, shade = ("partial", INK) if run.masked else ("full", "white")
        axes.text((run.begin + run.end) / 2 - 0.5, 35.7, text, ha="center", va="center", fontsize=8.5, color=shade)
    for name, side in (("begin", 1), ("full_begin", -1), ("full_end", 1), ("end", -1)):
        place = int(getattr(lowered, name)[0, 0, index])
        tip, text = (36.9, 38.3) if side > 0 else (34.5, 33.2)
        axes.annotate(
            f"{name} = {place}",
            (place - 0.5, tip),
            (place - 0.5, text),
            ha="center",
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.9, "shrinkB": 0},
        )
    note = "the spans of this query tile, in keys,\nand the three runs that they make, in whole tiles"
    axes.text(15.5, 40.3, note, ha="center", va="center", fontsize=8.5, color=QUIET)
    save(figure, "algorithm_spans")


def draw_states() -> None:
    """Three States over three parts of the keys, merged by `flashtile.merge`."""
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 1, 1, 16), torch.randn(1, 24, 1, 16), torch.randn(1, 24, 1, 16)
    k[:, 10:14] += 0.9 * q
    parts = [slice(0, 8), slice(8, 16), slice(16, 24)]
    states = [flashtile.attention(q, k[:, part], v[:, part], return_lse=True) for part in parts]
    merged, whole = flashtile.merge(states), flashtile.attention(q, k, v, return_lse=True)
    assert torch.allclose(merged.out, whole.out, atol=1e-6)
    figure, axes = plt.subplots(figsize=(8.2, 3.3), layout="constrained")
    bare(axes)
    axes.set_xlim(-0.2, 12.2)
    axes.set_ylim(-1.2, 3.6)
    for state, colour, left in zip(states, (FULL, PARTIAL_ON, BLUE), (0, 4, 8), strict=True):
        for key in range(8):
            axes.add_patch(Rectangle((left + key * 0.48 + 0.06, 2.75), 0.44, 0.5, color=colour, linewidth=0))
        middle = left + 1.98
        lse = float(state.lse)
        box(axes, middle, 1.75, f"State: out, lse = {lse:.2f}", colour, 3.0, 0.55)
        share = float(torch.exp(state.lse - merged.lse))
        arrow(axes, (middle, 2.68), (middle, 2.1))
        arrow(axes, (middle, 1.42), (5.98 + (middle - 5.98) * 0.45, 0.2))
        axes.text(
            middle + (5.98 - middle) * 0.27,
            0.8,
            f"weight {share:.2f}",
            ha="center",
            fontsize=8.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    axes.text(5.98, 3.48, "24 keys, in three parts", ha="center", fontsize=8.5, color=QUIET)
    box(axes, 5.98, -0.15, f"merge: out = Σ weight · out,  lse = {float(merged.lse):.2f}", INK, 5.4, 0.6)
    axes.text(
        5.98,
        -0.9,
        f"attention over all 24 keys at once: lse = {float(whole.lse):.2f}",
        ha="center",
        fontsize=8.5,
        color=QUIET,
    )
    save(figure, "algorithm_states")


def main() -> None:
    for draw in (draw_tiling, draw_online_softmax, draw_backward, draw_spans, draw_states):
        draw()


if __name__ == "__main__":
    main()
