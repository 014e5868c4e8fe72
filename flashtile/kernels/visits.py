"""Which tiles a mask leaves, as lists on the device; made once per mask and kept while its tensors are unchanged."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import mask_nodes
from flashtile.forgetting import Made, make_room, remembered
from flashtile.kernels import bits, capture
from flashtile.kernels.words import Visits, odd
from flashtile.problem import Inputs, Problem
from flashtile.queues import capturing, queue
from flashtile.region import region
from flashtile.spans import FULL, PARTIAL, Tiling

_KEPT = 64
_KEPT_BYTES = 2**28
_known: Made = {}
_in_graphs: dict[Any, Visits] = {}
"""Those that CUDA graphs read, which nobody can tell to be gone. They belong to no stream: what made them is done."""


def possible(inputs: Inputs, problem: Problem) -> bool:
    """Packed sequences have lengths that only the device knows, and what a mask reads may be something else when a
    CUDA graph is replayed: the mask is then evaluated in every tile that the window leaves."""
    if problem.varlen:
        return False
    return not capturing(inputs.q.device) or (not inputs.mask and capture.possible_aside())


def listed(inputs: Inputs, problem: Problem) -> bool:
    """Whether kernels get lists of tiles: their order is not that of packed sequences, which have none."""
    return bool(region(problem.mask).rest) and not problem.batch_invariant and possible(inputs, problem)


class Maker(NamedTuple):
    """What makes bits of the mask for kernels that read them: how a kernel is launched, and where (a machine)."""

    launch: bits.Launch
    machine: Any


def of(inputs: Inputs, problem: Problem, tile_q: int, tile_kv: int, keys: bool, maker: Maker | None = None) -> Visits:
    """The tiles that each query tile visits; `keys`: each key tile. With a `maker`, the mask's bits too."""
    sizes = (problem.seqlen_q, problem.seqlen_kv, problem.batch, problem.heads)
    alone = (problem.mask, sizes, tile_q, tile_kv, keys, maker and maker.machine)
    device = inputs.q.device

    def made() -> Visits:
        lists = _lists(inputs, problem, tile_q, tile_kv, keys)
        if maker is None:
            return lists
        tile, rows = (tile_kv, problem.seqlen_kv) if keys else (tile_q, problem.seqlen_q)
        return bits.of(lists, tile, rows, maker.launch, may_wait=not capturing(device))

    if capturing(device):
        place = (device, *alone)
        if place not in _in_graphs:
            with capture.aside(device):
                _in_graphs[place] = made()
        return _in_graphs[place]
    return remembered(_known, (*alone, queue(device)), inputs.mask, lambda: _with_room(made()), _KEPT)


def _with_room(found: Visits) -> Visits:
    """The same, beside which there is room for its bits."""
    size = 0 if found.bits is None else found.bits.nbytes
    while _known and size + _bytes() > _KEPT_BYTES:
        make_room(_known, len(_known))
    return found


def _bytes() -> int:
    """Of all bits that are kept."""
    return sum(known.bits.nbytes for _, known in list(_known.values()) if known.bits is not None)


def tensors_of(
    inputs: Inputs, problem: Problem, tile_q: int, tile_kv: int, keys: bool, maker: Maker | None = None
) -> tuple[Tensor | None, ...]:
    """The tensors of the lists that a launch with such tiles reads, if it reads any."""
    if not listed(inputs, problem):
        return ()
    found = of(inputs, problem, tile_q, tile_kv, keys, maker)
    return found.counts, found.tiles, found.order, found.bits


def _lists(inputs: Inputs, problem: Problem, tile_q: int, tile_kv: int, keys: bool) -> Visits:
    lengths = (problem.seqlen_q, problem.seqlen_kv)
    tiling = Tiling(*lengths, tile_q, tile_kv, problem.batch, problem.heads, inputs.q.device)
    state = mask_nodes.parse(problem.mask).lower(tiling, inputs.mask).to_layout(tiling).state
    if keys:
        state = state.transpose(-1, -2)
    length, tile = (lengths[0], tile_q) if keys else (lengths[1], tile_kv)
    if length % tile:
        # The last tile reaches beyond the end, which only the mask's evaluation keeps out.
        state = torch.cat((state[..., :-1], state[..., -1:].clamp(max=PARTIAL)), dim=-1)
    order = torch.tensor([2, 0, 1], dtype=torch.int8, device=state.device)[state.long()]
    listed = order.sort(dim=-1, stable=True).indices.to(torch.int32)
    # Sweeps read one entry ahead.
    listed = torch.nn.functional.pad(listed, (0, 1)).contiguous()
    counts = torch.stack(((state == PARTIAL).sum(-1), (state == FULL).sum(-1)), dim=-1).to(torch.int32).contiguous()
    batch, heads, rows, columns = listed.shape
    steps = (columns, heads * rows if batch > 1 else 0, rows if heads > 1 else 0)
    order = _heaviest_first(counts.sum(-1)).to(torch.int32).contiguous()
    return Visits(counts, listed, order, *map(odd, steps))


_NEIGHBOURS = 32
"""Tiles of a head that stay together: neighbours meet the same tiles, which are in the cache then."""


def _heaviest_first(weights: Tensor) -> Tensor:
    """The order of a head's tiles, by how many others each meets: (..., tiles). The neighbours that meet most come
    first; among themselves they keep their order, or the reverse, where the later ones meet more."""
    tiles = weights.shape[-1]
    some = max(1, min(tiles, _NEIGHBOURS))
    groups = torch.nn.functional.pad(weights, (0, -tiles % some)).unflatten(-1, (-1, some))
    rank = groups.sum(-1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    number = torch.arange(some, device=weights.device)
    rising = (groups * (2 * number - (some - 1))).sum(-1, keepdim=True) > 0
    place = torch.where(rising, some - 1 - number, number)
    return (some * rank[..., None] + place).flatten(-2)[..., :tiles].argsort(dim=-1)
