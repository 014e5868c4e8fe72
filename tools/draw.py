"""Draws the pictures of docs/masks.md and docs/scores.md from the library itself.

Run `python tools/draw.py`. A mask's picture is its own predicate (`Node.allows`) coloured by the tile states that its
own lowering (`Node.lower`) gives; a score modifier's picture is what `flashtile.attention` computes: with the identity
matrix as values, the output of attention is the matrix of its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from palette import FAINT, FULL, INK, LINE, MASKED, PARTIAL_OFF, PARTIAL_ON, QUIET, SIGNED, WEIGHTS, save
from torch import Tensor

import flashtile
from flashtile import mask_nodes, masks, spans
from flashtile.mask_nodes import At
from flashtile.masks import Mask
from flashtile.spans import Layout, Tiling

LEGEND = (
    Patch(color=FULL, label="full tile: visited, no mask evaluated"),
    Patch(color=PARTIAL_ON, label="partial tile: allowed"),
    Patch(color=PARTIAL_OFF, label="partial tile: hidden"),
    Patch(color=MASKED, label="masked tile: never visited"),
)


@dataclass(frozen=True)
class Panel:
    """One mask on one problem, as drawn."""

    title: str
    mask: Mask
    seqlen_q: int = 32
    seqlen_kv: int = 32
    tile_q: int = 4
    tile_kv: int = 4
    batch: int = 0


def dense_and_states(panel: Panel) -> tuple[Tensor, Tensor, str]:
    """(what is allowed, one state per tile, the form it lowered to)."""
    tiling = Tiling(panel.seqlen_q, panel.seqlen_kv, panel.tile_q, panel.tile_kv, batch=panel.batch + 1)
    node = mask_nodes.parse(panel.mask.token)
    batch, head = torch.tensor(panel.batch).view(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    query, key = torch.arange(panel.seqlen_q).view(1, 1, -1, 1), torch.arange(panel.seqlen_kv).view(1, 1, 1, -1)
    at = At(batch, head, query, key, panel.seqlen_kv - panel.seqlen_q)
    allowed = node.allows(at, panel.mask.tensors).expand(1, 1, panel.seqlen_q, panel.seqlen_kv)[0, 0]
    lowered = node.lower(tiling, panel.mask.tensors)
    state = lowered.to_layout(tiling).state
    form = "visit list" if isinstance(lowered, Layout) else "spans"
    return allowed, state[min(panel.batch, len(state) - 1), 0], form


def draw_panel(axes: Axes, panel: Panel) -> None:
    allowed, states, form = dense_and_states(panel)
    rows = torch.arange(panel.seqlen_q) // panel.tile_q
    columns = torch.arange(panel.seqlen_kv) // panel.tile_kv
    state = states[rows][:, columns]
    # The two laws of a lowering, checked on what is about to be drawn.
    assert not allowed[state == spans.MASKED].any(), panel.title
    assert allowed[state == spans.FULL].all(), panel.title
    kinds = torch.where(state == spans.MASKED, 0, torch.where(state == spans.FULL, 3, 1 + allowed.int()))
    colours = ListedColormap([MASKED, PARTIAL_OFF, PARTIAL_ON, FULL])
    axes.imshow(kinds.numpy(), cmap=colours, vmin=0, vmax=3, interpolation="nearest")
    grid(axes, panel.seqlen_q, panel.seqlen_kv, panel.tile_q, panel.tile_kv)
    visited, partial = int((states > 0).sum()), int((states == spans.PARTIAL).sum())
    axes.set_title(panel.title, family="DejaVu Sans Mono", fontsize=8.5, pad=7)
    axes.set_xlabel(f"keys\n{visited} of {states.numel()} tiles visited, {partial} of them partial ({form})", color=INK)
    axes.set_ylabel("queries")


def grid(axes: Axes, seqlen_q: int, seqlen_kv: int, tile_q: int, tile_kv: int) -> None:
    """Thin lines between entries, thick ones between tiles."""
    for place in range(seqlen_q + 1):
        axes.axhline(place - 0.5, color=LINE, linewidth=1.6 if place % tile_q == 0 else 0.35)
    for place in range(seqlen_kv + 1):
        axes.axvline(place - 0.5, color=LINE, linewidth=1.6 if place % tile_kv == 0 else 0.35)
    axes.set_xticks(range(0, seqlen_kv, tile_kv * 2))
    axes.set_yticks(range(0, seqlen_q, tile_q * 2))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_masks(name: str, panels: Sequence[Panel]) -> None:
    widths = [panel.seqlen_kv for panel in panels]
    count = len(panels)
    size = (5.9, 3.75) if count == 1 else (3.3 * count + 0.3, 4.2)
    figure, row = plt.subplots(1, count, figsize=size, width_ratios=widths, layout="constrained")
    for axes, panel in zip(np.atleast_1d(row), panels, strict=True):
        draw_panel(axes, panel)
    figure.legend(
        handles=LEGEND,
        loc="outside right center" if count == 1 else "outside lower center",
        ncols={1: 1, 2: 2, 3: 4}[count],
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        columnspacing=1.4,
    )
    save(figure, name)


def documents(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def dilated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    distance = q_idx - kv_idx
    return (distance >= 0) & (distance < 20) & (distance % 3 == 0)


STARTS = torch.tensor([0] * 10 + [6] * 10 + [17] * 12)


def from_start(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx >= STARTS[q_idx]) & (kv_idx <= q_idx)


def all_masks() -> dict[str, Callable[[], list[Panel]]]:
    """Name of the picture -> its panels; made late, so that one mask that fails does not hide the others."""
    ids, shuffled = documents([9, 5, 12, 6]), documents([8, 8, 8, 8])[torch.arange(32) * 8 % 31]
    blocks = torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0], [0, 2, 1, 0], [2, 0, 2, 1]], dtype=torch.int8)
    generator = torch.Generator().manual_seed(3)
    scattered = torch.rand(8, 8, generator=generator).lt(0.22).repeat_interleave(4, 0).repeat_interleave(4, 1)
    scattered = scattered & (torch.rand(32, 32, generator=generator) < 0.8) | torch.eye(32, dtype=torch.bool)
    return {
        "mask_full": lambda: [Panel("full()", masks.full())],
        "mask_causal": lambda: [
            Panel("causal()", masks.causal()),
            Panel('causal("bottom_right"), 20 x 32', masks.causal(), seqlen_q=20),
            Panel('causal("top_left"), 20 x 32', masks.causal("top_left"), seqlen_q=20),
        ],
        "mask_window": lambda: [
            Panel("window(6, 0)", masks.window(6, 0)),
            Panel("window(5, 5)", masks.window(5, 5)),
            Panel("window(None, 3)", masks.window(None, 3)),
        ],
        "mask_chunk": lambda: [
            Panel("chunk(10)", masks.chunk(10)),
            Panel("chunk(10) & causal()", masks.chunk(10) & masks.causal()),
        ],
        "mask_prefix": lambda: [
            Panel("prefix(lengths), lengths[0] = 21", masks.prefix(torch.tensor([21, 8]))),
            Panel("prefix(lengths), lengths[1] = 8", masks.prefix(torch.tensor([21, 8])), batch=1),
            Panel("causal() | prefix(10)", masks.causal() | masks.prefix(10)),
        ],
        "mask_document": lambda: [
            Panel("document(ids)", masks.document(ids)),
            Panel("document(ids) & causal()", masks.document(ids) & masks.causal()),
            Panel("document(unsorted_ids)", masks.document(shuffled)),
        ],
        "mask_dense": lambda: [Panel("dense(allowed)", masks.dense(scattered))],
        "mask_block": lambda: [
            Panel("block(state, (8, 8))", masks.block(blocks.bool()[None, None], (8, 8))),
            Panel("block(state, (8, 8), causal())", masks.block(blocks[None, None], (8, 8), masks.causal())),
        ],
        "mask_custom": lambda: [
            Panel("custom(dilated)", masks.custom(dilated)),
            Panel("custom(from_start)", masks.custom(from_start)),
        ],
        "mask_combine": lambda: [
            Panel("window(8, 0) & document(ids)", masks.window(8, 0) & masks.document(ids)),
            Panel("window(5, 0) | causal() & prefix(4)", masks.window(5, 0) | (masks.causal() & masks.prefix(4))),
        ],
    }


def weights(seqlen: int = 32, heads: int = 1, seed: int = 2, sharpness: float = 1.6, **options: object) -> Tensor:
    """Attention weights (heads, queries, keys): attention with the identity matrix as values."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 1, seqlen + 4, 1, 16, generator=generator)
    # Neighbours resemble each other, as in text, so that the weights have a shape that the eye can follow.
    q, k = sharpness * noise.unfold(2, 5, 1).sum(-1) / 5**0.5
    identity = torch.eye(seqlen).view(1, seqlen, 1, seqlen).expand(1, seqlen, heads, seqlen)
    q, k = q.expand(1, seqlen, heads, 16), k.expand(1, seqlen, heads, 16)
    return flashtile.attention(q, k, identity, **options)[0].transpose(0, 1)  # type: ignore[arg-type, index]


def heat(axes: Axes, values: Tensor, title: str, signed: bool = False, top: float | None = None) -> None:
    top = float(values.abs().max()) if top is None else top
    shown = axes.imshow(
        values.numpy(),
        cmap=SIGNED if signed else WEIGHTS,
        vmin=-top if signed else 0,
        vmax=top,
        interpolation="nearest",
    )
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0, labelsize=7)
    axes.set_title(title, fontsize=8.5)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(FAINT)


def figure_of(panels: int, width: float = 3.1, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure, row = plt.subplots(1, panels, figsize=(width * panels, height), layout="constrained")
    return figure, list(np.atleast_1d(row))


def draw_scale() -> None:
    figure, row = figure_of(3)
    for axes, scale in zip(row, (0.05, 0.25, 1.0), strict=True):
        heat(axes, weights(scale=scale)[0], f"weights, scale={scale}")
    save(figure, "score_scale")


def draw_softcap() -> None:
    figure, (curve, before, after) = figure_of(3)
    score = torch.linspace(-30, 30, 241)
    curve.plot(score, score, color=QUIET, linewidth=1, linestyle=":", label="score")
    for cap, colour in ((5.0, FULL), (15.0, PARTIAL_ON)):
        curve.plot(score, cap * torch.tanh(score / cap), color=colour, linewidth=1.8, label=f"softcap={cap:g}")
    curve.set_ylim(-20, 20)
    curve.set_xlabel("score")
    curve.set_title("softcap * tanh(score / softcap)", fontsize=8.5)
    curve.legend(frameon=False, fontsize=8)
    curve.spines[["top", "right"]].set_visible(False)
    heat(before, weights(scale=1.0)[0], "weights without softcap")
    heat(after, weights(scale=1.0, softcap=3.0)[0], "weights, softcap=3")
    save(figure, "score_softcap")


def draw_bias() -> None:
    place = torch.arange(32)
    bias = 2.5 * torch.cos((place[:, None] - place[None]) * 0.4) - 0.08 * (place[:, None] - place[None]).abs()
    figure, (table, before, after) = figure_of(3)
    heat(table, bias, "bias[0, 0]", signed=True)
    heat(before, weights()[0], "weights without bias", top=0.6)
    heat(after, weights(bias=bias)[0], "weights, bias=bias", top=0.6)
    save(figure, "score_bias")


def draw_alibi() -> None:
    slopes = torch.tensor([2.0**-power for power in (1, 3, 5)])
    figure, row = figure_of(3)
    shown = weights(heads=3, sharpness=0.8, alibi_slopes=slopes, causal=True)
    for axes, slope, head in zip(row, slopes, shown, strict=True):
        heat(axes, head, f"weights, causal, slope {float(slope):g}", top=0.8)
    save(figure, "score_alibi")


def draw_sinks() -> None:
    figure, (before, after, sums) = figure_of(3)
    heat(before, weights(sharpness=1.0)[0], "weights without sink", top=0.3)
    sunk = weights(sharpness=1.0, sinks=torch.tensor([3.5]))[0]
    heat(after, sunk, "weights, sinks=[3.5]", top=0.3)
    place = np.arange(len(sunk))
    sums.barh(place, sunk.sum(-1), color=FULL, height=1.0, edgecolor="white", linewidth=0.3, label="the keys' share")
    sums.barh(
        place,
        1 - sunk.sum(-1),
        left=sunk.sum(-1),
        color=PARTIAL_ON,
        height=1.0,
        edgecolor="white",
        linewidth=0.3,
        label="the sink's share",
    )
    sums.invert_yaxis()
    sums.set_yticks([])
    sums.set_xlim(0, 1)
    sums.set_title("where each query's weight goes", fontsize=8.5)
    sums.spines[["top", "right", "left"]].set_visible(False)
    sums.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, handlelength=1)
    save(figure, "score_sinks")


def draw_dropout() -> None:
    figure, (kept, before, after) = figure_of(3)
    entries = flashtile.dropout_mask(7, 0.3, batch=1, heads=1, seqlen_q=32, seqlen_kv=32)[0, 0]
    kept.imshow(entries.numpy(), cmap=ListedColormap([PARTIAL_OFF, FULL]), interpolation="nearest")
    kept.set_title("dropout_mask(seed=7, dropout_p=0.3)", fontsize=8.5)
    kept.set_xlabel("keys")
    kept.set_ylabel("queries")
    kept.set_xticks([])
    kept.set_yticks([])
    heat(before, weights(sharpness=0.9)[0], "weights without dropout", top=0.25)
    heat(after, weights(sharpness=0.9, dropout_p=0.3, seed=7)[0], "weights, dropout_p=0.3, seed=7", top=0.25)
    save(figure, "score_dropout")


def draw_score_mod() -> None:
    centre = torch.arange(32) * 3 // 4

    def near_centre(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - 0.03 * (kv_idx - centre[q_idx]) ** 2

    figure, (curve, before, after) = figure_of(3)
    place = torch.arange(32)
    heat(curve, -0.03 * (place[None] - centre[:, None]).float() ** 2, "what score_mod adds", signed=True, top=8.0)
    heat(before, weights(sharpness=0.9)[0], "weights without score_mod", top=0.5)
    heat(after, weights(sharpness=0.9, score_mod=near_centre)[0], "weights, score_mod=near_centre", top=0.5)
    save(figure, "score_mod")


SCORES = (draw_scale, draw_softcap, draw_bias, draw_alibi, draw_sinks, draw_dropout, draw_score_mod)


def main() -> None:
    for name, panels in all_masks().items():
        draw_masks(name, panels())
    for draw in SCORES:
        draw()


if __name__ == "__main__":
    main()
