"""What a mask leaves of the tiles that it cuts, bit by bit: found once a mask, not in every head, layer and pass.

Bits lie as threads want them. An accumulator's rows belong to four lanes each, and of eight columns, lane i has 2i and
2i + 1: so four words hold a row of up to 128 columns, bit 2j + e of word i being column 8j + 2i + e.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.places import number_of
from flashtile.kernels.rules import allowed
from flashtile.kernels.words import Place, Visits, odd

Launch = Callable[[Any, int, dict[str, Any]], None]

LANES = 4
GROUP = 64
"""Rows that a program works on."""

LARGEST = 2**27
"""Bytes beyond which kernels ask the mask instead."""


def of(visits: Visits, tile: int, rows: int, launch: Launch, may_wait: bool) -> Visits:
    """The lists with bits, (slots, rows of a tile, lanes), int32: for each list as many slots as `places`. Without, if
    they were too large.

    tile: rows of a tile; rows: of the mask. launch: runs a kernel, as many programs, with what is said here of its
    arguments. may_wait: where there is no room for every place of the lists, the device may be asked how many need it.
    """
    batch, heads, tiles, length = visits.tiles.shape
    lists = batch * heads * tiles
    room = LARGEST // (tile * LANES * 4 * max(1, lists))
    places = length
    if places > room and may_wait:
        places = int(_needed(visits.counts, tile, rows).max())
    if places > room:
        return visits
    bits = torch.empty((lists * places, tile, LANES), dtype=torch.int32, device=visits.tiles.device)
    visits = visits._replace(places=odd(places))
    groups = tile // GROUP
    given = {"bits": bits, "visits": visits, "shape": tuple(map(odd, (groups, tiles, heads)))}
    launch(bits_kernel, lists * places * groups, given)
    return visits._replace(bits=bits)


def _needed(counts: Tensor, tile: int, rows: int) -> Tensor:
    """How many places of each list have bits, see `bits_kernel`."""
    partial, full = counts.unbind(-1)
    if rows % tile:
        partial = torch.cat((partial[..., :-1], (partial + full)[..., -1:]), dim=-1)
    return partial.clamp(min=1)


@triton.jit
def words_of(m_tile):
    """(rows, lanes): a tile of booleans as bits."""
    ROWS: tl.constexpr = m_tile.shape[0]
    COLUMNS: tl.constexpr = m_tile.shape[1]
    o_eights = tl.arange(0, COLUMNS // 8)[None, :, None, None]
    o_pair = tl.arange(0, 2)[None, None, None, :]
    b_bits = m_tile.to(tl.int32).reshape(ROWS, COLUMNS // 8, 4, 2) << (2 * o_eights + o_pair)
    return tl.sum(tl.sum(b_bits, 3), 1)


@triton.jit
def bits_kernel(
    bits, visits, shape, size, rules, META: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """One program for 64 rows of a place in the lists. KEYS: rows are keys, columns queries.

    Places of tiles that need no mask have no bits, unless rows lie behind the end. An empty list has one place that
    hides all, for a walk takes a step in any case.
    """
    ROWS: tl.constexpr = 64
    TILE: tl.constexpr = META.tile_kv if KEYS else META.tile_q
    COLUMNS: tl.constexpr = META.tile_q if KEYS else META.tile_kv
    groups, tiles, heads = shape
    i_program = tl.program_id(0)
    i_group = i_program % number_of(groups)
    i_slot = i_program // number_of(groups)
    n = i_slot % number_of(visits.places)
    row = i_slot // number_of(visits.places)
    i_tile = row % number_of(tiles)
    i_pair = row // number_of(tiles)
    partial = tl.load(visits.counts + 2 * row)
    full = tl.load(visits.counts + 2 * row + 1)
    seqlen_q = number_of(size.seqlen_q)
    seqlen_k = number_of(size.seqlen_k)
    behind = (i_tile + 1) * TILE > (seqlen_k if KEYS else seqlen_q)
    if (n < partial) | (behind & (n < partial + full)) | ((n == 0) & (partial + full == 0)):
        first = i_tile * TILE + i_group * ROWS
        o_rows = (first + tl.arange(0, ROWS))[:, None]
        i_column = tl.load(visits.tiles + row.to(tl.int64) * number_of(visits.length) + n)
        o_columns = (i_column * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        place = Place(i_pair // number_of(heads), i_pair % number_of(heads), i_tile, 0, 0, seqlen_q, seqlen_k)
        if KEYS:
            m_tile = allowed(place, rules, o_columns, o_rows, META, MASK)
        else:
            m_tile = allowed(place, rules, o_rows, o_columns, META, MASK)
        o_words = (i_group * ROWS + tl.arange(0, ROWS))[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(bits + i_slot.to(tl.int64) * (TILE * 4) + o_words, words_of(m_tile))
