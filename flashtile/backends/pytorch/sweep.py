"""The tiled sweep: one loop forward, one loop backward, every feature of the API.

Forward (FlashAttention-2, Dao 2023, algorithm 1): for each query tile, walk its key tiles with the online softmax,

    m' = max(m, rowmax(S)),  l' = exp(m - m') l + rowsum(exp(S - m')),  O' = exp(m - m') O + exp(S - m') V.

Backward (algorithm 2, query tiles outermost): recompute P = exp(S - lse) tile by tile, then

    dV += P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ += dS K,  dK += dS^T Q,

with delta = rowsum(dO * O) - dlse, which is how the gradient of the log-sum-exp enters. Tiles are visited in a fixed
order, so results repeat bit for bit. Memory beyond inputs and outputs is a few tiles of scores and, where keys must
change dtype or layout, one copy of a slab's keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import dropout, mask_nodes
from flashtile.backends.pytorch.rows import Slab, slabs, split, tile_of
from flashtile.problem import Inputs, Problem
from flashtile.scores import Grads, Modifier, Tile, modifiers
from flashtile.spans import Run
from flashtile.tuning.cpu import SweepConfig, sweep_config


def refuses(problem: Problem) -> str | None:
    """Takes everything that the API accepts."""
    return None


def configure(problem: Problem) -> SweepConfig:
    return sweep_config(problem.seqlen_q, problem.seqlen_kv)


@dataclass
class Scorer:
    """Turns a tile's dot products into modified, masked scores; keeps what the backward pass needs."""

    inputs: Inputs
    problem: Problem
    chain: Sequence[Modifier]
    mask: mask_nodes.Node

    @classmethod
    def of(cls, inputs: Inputs, problem: Problem, chain: Sequence[Modifier]) -> "Scorer":
        return cls(inputs, problem, chain, mask_nodes.parse(problem.mask))

    def place(self, slab: Slab, rows: slice, keys: slice, masked: bool, first_batch: int) -> Tile:
        """Where a tile lies and what the mask allows there; `masked`: it may forbid something."""
        tile = tile_of(slab, rows, keys, self.problem, first_batch, self.inputs.q.device)
        return tile._replace(allowed=self.mask.allows(tile.at, self.inputs.mask)) if masked else tile

    def scores(self, dots: Tensor, tile: Tile) -> tuple[Tensor, list[Tensor]]:
        """(scores, the input of each modifier): scores (batch, heads, queries, keys)."""
        stages = []
        scores = dots
        for modifier in self.chain:
            stages.append(scores)
            scores = modifier.apply(scores, tile)
        return scores if tile.allowed is None else scores.masked_fill(~tile.allowed, -torch.inf), stages

    def dots_grad(self, grad: Tensor, stages: list[Tensor], tile: Tile) -> Tensor:
        """The gradient at the dot products from the gradient at the scores; modifiers collect theirs on the way."""
        for modifier, score in zip(reversed(self.chain), reversed(stages), strict=True):
            grad = modifier.backward(score, grad, tile)
        # A modifier's derivative may be infinite where the mask hides it: 0 * inf must not come back as NaN.
        return grad.masked_fill(~tile.allowed, 0.0) if tile.allowed is not None and self.chain else grad

    def kept(self, tile: Tile) -> Tensor | None:
        """Dropout's factor of each entry, 0 or 1 / (1 - p)."""
        if self.inputs.seed is None:
            return None
        keys = range(tile.slices[3].start, tile.slices[3].stop)
        at, p = tile.at, self.problem.dropout_p
        kept = dropout.keep(self.inputs.seed, p, at.batch, at.head, at.query, keys)
        return kept.to(self.problem.accumulator) / (1 - p)


class Keys(NamedTuple):
    """A slab's keys and values (pairs, seqlen, d)."""

    k: Tensor
    v: Tensor
    finite: bool

    @classmethod
    def of(cls, slab: Slab, inputs: Inputs, dtype: torch.dtype) -> "Keys":
        k, v = slab.load_keys(inputs.k, dtype), slab.load_keys(inputs.v, dtype)
        return cls(k, v, bool((k.sum() + v.sum()).isfinite()))

    def load(self, part: slice, slab: Slab, tile: Tile) -> tuple[Tensor, Tensor]:
        """A tile of each, with zeros where no query of the tile may look.

        NaN may lie there, behind the end of a sequence for one, and a weight of 0 does not stop it.
        """
        k, v = self.k[:, part], self.v[:, part]
        if self.finite or tile.allowed is None:
            return k, v
        hidden = slab.hidden_keys(tile.allowed, k.shape[1])
        return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def forward(inputs: Inputs, problem: Problem, config: SweepConfig, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense problem whose first batch entry has the global index `first_batch`."""
    q, dtype = inputs.q, problem.accumulator
    out = q.new_zeros(*q.shape[:3], problem.headdim_v, dtype=problem.out_dtype)
    lse = q.new_full((problem.batch, problem.heads, problem.seqlen_q), -torch.inf, dtype=dtype)
    if lse.numel() == 0:
        return out, lse
    scorer = Scorer.of(inputs, problem, modifiers(inputs, problem))
    for slab in slabs(inputs, problem, config, first_batch):
        keys = Keys.of(slab, inputs, dtype)
        for index, runs in enumerate(slab.runs):
            rows = _query_rows(index, problem, config)
            row_out, row_lse = _forward_rows(scorer, slab, rows, runs, config, keys, first_batch)
            slab.store_rows(out, rows, row_out)
            stats = row_lse.view(lse[slab.batch, slab.heads, rows].shape)
            lse[slab.batch, slab.heads, rows] = stats
    return out, lse


def _query_rows(index: int, problem: Problem, config: SweepConfig) -> slice:
    return slice(index * config.tile_q, min((index + 1) * config.tile_q, problem.seqlen_q))


def _forward_rows(
    scorer: Scorer,
    slab: Slab,
    rows: slice,
    runs: list[Run],
    config: SweepConfig,
    keys: Keys,
    first_batch: int,
) -> tuple[Tensor, Tensor]:
    """One query tile against all the keys it sees: (pairs, rows, headdim_v) and log-sum-exps (pairs, rows, 1)."""
    problem = scorer.problem
    q = slab.load_rows(scorer.inputs.q, rows, problem.accumulator) * problem.scale
    out = q.new_zeros(*q.shape[:2], problem.headdim_v)
    highest, total = _start(scorer, slab, rows, q)
    for run in runs:
        for part in split(run, config.step_kv):
            tile = scorer.place(slab, rows, part, run.masked, first_batch)
            k, v = keys.load(part, slab, tile)
            dots = torch.bmm(q, k.transpose(1, 2))
            scores = scorer.scores(_by_head(dots, tile), tile)[0].view_as(dots)
            highest, total, out = _online_softmax(scorer, tile, scores, v, highest, total, out)
    # total is 0 for a row that sees no key: output 0, lse -inf. NaN is not 0 and stays visible.
    empty = total == 0
    lse = torch.where(empty, -torch.inf, _finite(highest) + total.log())
    return out / torch.where(empty, 1.0, total), lse


def _start(scorer: Scorer, slab: Slab, rows: slice, q: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax before any key: nothing seen, or, with sinks, one key of score `sink` and value 0."""
    sinks = scorer.inputs.sinks
    if sinks is None:
        return q.new_full((*q.shape[:2], 1), -torch.inf), q.new_zeros(*q.shape[:2], 1)
    highest = slab.load_per_head(sinks, rows, q.dtype)
    return highest, torch.where(highest == -torch.inf, 0.0, 1.0).to(q.dtype)


def _by_head(dots: Tensor, tile: Tile) -> Tensor:
    """(pairs, group * queries, keys) seen as (batch, heads, queries, keys)."""
    return dots.view(*(part.stop - part.start for part in tile.slices))


def _finite(highest: Tensor) -> Tensor:
    """The running maximum, 0 where nothing was seen yet, so that exp(-inf - highest) is 0 and not NaN."""
    return torch.where(highest == -torch.inf, 0.0, highest)


def _online_softmax(
    scorer: Scorer, tile: Tile, scores: Tensor, v: Tensor, highest: Tensor, total: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One key tile enters the running (maximum, denominator, unnormalised output)."""
    raised = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
    base = _finite(raised)
    rescale = torch.exp(highest - base)
    weights = scores.sub_(base).exp_()
    total = total * rescale + weights.sum(dim=-1, keepdim=True)
    kept = scorer.kept(tile)
    if kept is not None:
        weights = weights.mul_(kept.view_as(weights))
    return raised, total, torch.baddbmm(out.mul_(rescale), weights, v)


def backward(
    inputs: Inputs,
    problem: Problem,
    config: SweepConfig,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Grads,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of a dense problem; those of everything else are added to `grads`."""
    dtype = problem.accumulator
    scorer = Scorer.of(inputs, problem, modifiers(inputs, problem, grads))
    dq = torch.zeros_like(inputs.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (inputs.k, inputs.v))
    if lse.numel() == 0:
        return dq, dk.to(inputs.k.dtype), dv.to(inputs.v.dtype)
    for slab in slabs(inputs, problem, config, first_batch):
        keys = Keys.of(slab, inputs, dtype)
        grad_keys = slab.keys_view(dk), slab.keys_view(dv)
        for index, runs in enumerate(slab.runs):
            rows = _query_rows(index, problem, config)
            queries = _load_queries(scorer, slab, rows, out, lse, grad_out, grad_lse)
            if grads.sinks is not None and inputs.sinks is not None:
                sinks = slab.load_per_head(inputs.sinks, rows, dtype)
                slab.add_per_head(grads.sinks, torch.exp(sinks - queries.lse) * -queries.delta)
            dq_tile = _backward_rows(scorer, slab, rows, runs, config, queries, keys, grad_keys, first_batch)
            slab.store_rows(dq, rows, dq_tile * problem.scale)
    return dq, dk.to(inputs.k.dtype), dv.to(inputs.v.dtype)


class Queries(NamedTuple):
    """A query tile in the backward pass, (pairs, rows, d) or (pairs, rows, 1); q is scaled."""

    q: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor


def _load_queries(
    scorer: Scorer, slab: Slab, rows: slice, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Queries:
    dtype = scorer.problem.accumulator
    q = slab.load_rows(scorer.inputs.q, rows, dtype) * scorer.problem.scale
    do = slab.load_rows(grad_out, rows, dtype)
    delta = (do * slab.load_rows(out, rows, dtype)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta -= slab.load_stats(grad_lse, rows)
    stats = slab.load_stats(lse, rows)
    # A row that saw no key: exp(anything - inf) is 0, so all its gradients are 0.
    return Queries(q, do, torch.where(stats == -torch.inf, torch.inf, stats), delta)


def _backward_rows(
    scorer: Scorer,
    slab: Slab,
    rows: slice,
    runs: list[Run],
    config: SweepConfig,
    queries: Queries,
    keys: Keys,
    grad_keys: tuple[Tensor, Tensor],
    first_batch: int,
) -> Tensor:
    """One query tile against its key tiles: adds to `grad_keys`, dk and dv (batch, heads_kv, seqlen, d) of the slab.

    Returns dq (pairs, rows, headdim), short of the scale.
    """
    dq = torch.zeros_like(queries.q)
    dk, dv = grad_keys
    for run in runs:
        for part in split(run, config.step_kv):
            tile = scorer.place(slab, rows, part, run.masked, first_batch)
            k, v = keys.load(part, slab, tile)
            dots = torch.bmm(queries.q, k.transpose(1, 2))
            scores, stages = scorer.scores(_by_head(dots, tile), tile)
            weights = torch.exp(scores.view_as(dots) - queries.lse)
            grad_weights = torch.bmm(queries.grad_out, v.transpose(1, 2))
            kept = scorer.kept(tile)
            dropped = weights
            if kept is not None:
                dropped = weights * kept.view_as(weights)
                grad_weights *= kept.view_as(weights)
            _add(dv, part, torch.bmm(dropped.transpose(1, 2), queries.grad_out))
            grad_scores = grad_weights.sub_(queries.delta).mul_(weights)
            grad_dots = scorer.dots_grad(_by_head(grad_scores, tile), stages, tile).reshape(dots.shape)
            dq.baddbmm_(grad_dots, k)
            _add(dk, part, torch.bmm(grad_dots.transpose(1, 2), queries.q))
    return dq


def _add(total: Tensor, keys: slice, part: Tensor) -> None:
    total[:, :, keys] += part.view(total.shape[0], total.shape[1], *part.shape[1:])
