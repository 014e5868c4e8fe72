"""Rung 5: spans, or which tiles to visit.

A mask hides scores. Computing them first and hiding them afterwards wastes the work: of a causal mask about half, of a
window nearly all. A mask that is known as a rule says for each query tile which keys any of its rows may see, the hull
[begin, end), and which keys all of its rows see, the full part [full_begin, full_end). Four numbers a query tile are
enough for full, causal, windows, chunks, prefixes and sorted documents, and for their intersections. The sweep becomes
three runs of one loop: partial, full, partial. Only partial tiles evaluate the rule; the rest outside is never visited.

The idea is Kvax's. Masks whose keys are not one interval lower to a list of tiles instead, with the same three states.
Either way the loop below does not know which mask it serves.

Run me: python docs/ladder/rung5_spans.py [--quick]
"""

from collections.abc import Iterator, Sequence

import torch
from measure import Row, agree, inputs, main, row
from torch import Tensor

import flashtile
from flashtile import mask_nodes, masks
from flashtile.mask_nodes import At
from flashtile.masks import Mask
from flashtile.spans import Run, Tiling


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, tile_q: int = 128, tile_kv: int = 128, skip: bool = True
) -> tuple[Tensor, Tensor]:
    """(out, lse); `skip` False visits every tile and evaluates the mask in each, for comparison."""
    tiling = Tiling(q.shape[1], k.shape[1], tile_q, tile_kv)
    runs = mask_nodes.parse(mask.token).lower(tiling, mask.tensors).runs(tiling)[0][0]
    if not skip:
        runs = [[Run(0, k.shape[1], True)]] * tiling.query_tiles
    outs, lses = [], []
    for begin, visits in zip(range(0, q.shape[1], tile_q), runs, strict=True):
        out, lse = _walk(q, k, v, range(begin, min(begin + tile_q, q.shape[1])), visits, mask, tile_kv)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=-1)


def _walk(
    q: Tensor, k: Tensor, v: Tensor, rows: range, visits: list[Run], mask: Mask, tile_kv: int
) -> tuple[Tensor, Tensor]:
    """Rung 3's loop, over runs; new are the two lines on `run.masked` and the guard against rows that see nothing."""
    node, shift = mask_nodes.parse(mask.token), k.shape[1] - q.shape[1]
    tile = q[:, rows.start : rows.stop].transpose(1, 2) * q.shape[-1] ** -0.5
    highest = tile.new_full((*tile.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(highest)
    out = tile.new_zeros(*tile.shape[:-1], v.shape[-1])
    for run in visits:
        for j in range(run.begin, run.end, tile_kv):
            end = min(j + tile_kv, run.end)
            scores = tile @ k[:, j:end].permute(0, 2, 3, 1)
            if run.masked:
                scores = scores.masked_fill(~node.allows(_at(rows, range(j, end), shift), mask.tensors), -torch.inf)
            raised = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
            base = torch.where(raised == -torch.inf, 0.0, raised)  # exp(-inf - -inf) would be NaN
            rescale, weights = torch.exp(highest - base), torch.exp(scores - base)
            total = total * rescale + weights.sum(dim=-1, keepdim=True)
            out = out * rescale + weights @ v[:, j:end].transpose(1, 2)
            highest = raised
    seen = total > 0
    out = torch.where(seen, out / torch.where(seen, total, 1.0), 0.0)
    return out.transpose(1, 2), (highest + total.log()).squeeze(-1)


def _at(rows: range, keys: range, shift: int) -> At:
    """The indices of one tile, as a mask's rule takes them."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    query = torch.arange(rows.start, rows.stop).view(1, 1, -1, 1)
    return At(zero, zero, query, torch.arange(keys.start, keys.stop).view(1, 1, 1, -1), shift)


def cases(seqlen: int) -> dict[str, Mask]:
    ids = torch.arange(seqlen) // max(1, seqlen // 8)
    return {
        "causal": masks.causal(),
        "window of 256": masks.window(255, 0),
        "8 documents, causal": masks.document(ids) & masks.causal(),
    }


def check() -> None:
    q, k, v = inputs(300)
    for name, mask in {**cases(300), "sees nothing": masks.prefix(0)}.items():
        out, lse = attention(q, k, v, mask, 48, 32)
        wanted = flashtile.reference.attention(q, k, v, mask=mask)
        agree(f"out, {name}", out, wanted.out)
        agree(f"exp(lse), {name}", lse.exp(), wanted.lse.exp(), allowed=5e-3)


def measure(seqlens: Sequence[int]) -> Iterator[Row]:
    seqlen = seqlens[-1]
    q, k, v = inputs(seqlen)
    tiling = Tiling(seqlen, seqlen, 128, 128)
    for name, mask in cases(seqlen).items():
        state = mask_nodes.parse(mask.token).lower(tiling, mask.tensors).to_layout(tiling).state
        visited, partial = int((state > 0).sum()), int((state == 1).sum())
        for skip in (False, True):
            shown = (visited, partial) if skip else (state.numel(), state.numel())
            yield row(
                f"{name}, {'spans' if skip else 'every tile'}",
                seqlen,
                lambda mask=mask, skip=skip: attention(q, k, v, mask, skip=skip),
                **dict(zip(("tiles visited", "masks evaluated"), shown, strict=True)),
            )


if __name__ == "__main__":
    main("Rung 5: spans", check, measure)
