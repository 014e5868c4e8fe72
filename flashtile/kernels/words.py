"""The arguments of kernels, in groups.

In kernel code a prefix says what a name is: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
Scores meet the exponential in base 2 (exp2 is one instruction); the log-sum-exp is natural outside of the kernels.

A field that is None is known to be None when a kernel is compiled, so `is not None` is a compile-time switch: what a
call does not use costs nothing. Triton compiles anew where an integer becomes 1 or a multiple of 16; those that follow
from lengths come as `odd` numbers, which are neither: one kernel serves all lengths.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor (batch, row, head, column): strides in elements, columns side by side. Packed: batch stride 0."""

    pointer: Any
    batch: Any
    row: Any
    head: Any


class Stats(NamedTuple):
    """One number a query, (batch, head, row), rows side by side and padded (see `PADDED`). Packed: batch stride 0."""

    pointer: Any
    batch: Any
    head: Any


class Numbers(NamedTuple):
    """One number a query, (batch, head, row), rows side by side; strides are `odd`. Packed: batch stride 0."""

    pointer: Any
    batch: Any
    head: Any


class Packing(NamedTuple):
    """Packed sequences: where each begins (one more than there are), how many rows are in use (None: all), how many
    sequences (`odd`). All None: the problem is dense."""

    offsets_q: Any
    offsets_k: Any
    used_q: Any
    used_k: Any
    sequences: Any


class Size(NamedTuple):
    """A dense problem's lengths, or 0; programs a head (query or key tiles, packed: their `slots`). All `odd`."""

    seqlen_q: Any
    seqlen_k: Any
    heads: Any
    tiles: Any


class Grid(NamedTuple):
    """A contiguous (batch, head, row, column) tensor; strides of the first two, sizes of the last two, `odd`."""

    pointer: Any
    batch: Any
    head: Any
    rows: Any
    columns: Any


class Window(NamedTuple):
    """The keys from `left` before the diagonal to `right` behind it, `odd`; None: no limit."""

    left: Any
    right: Any


class Visits(NamedTuple):
    """Which tiles a tile meets, those that need the mask first: counts (batch, head, tile, 2), tiles (.., tile, n).

    order (batch, head, tile): the tiles, those that meet the most first. `length`, n, and the strides are `odd`.
    bits: what the mask leaves of the first `places` (`odd`) of a tile (see `kernels.bits`); None: it is to be asked.
    """

    counts: Any
    tiles: Any
    order: Any
    length: Any
    batch: Any
    head: Any
    places: Any = None
    bits: Any = None


class Modifiers(NamedTuple):
    """What changes scores: softcap; bias with strides (batch, head, query, key); slopes; arguments of functions.

    Strides are as `whole` reads them. bias_sharing: how many entries of the batch have one of the bias, `odd`; None: 1.
    `score`, `mask`: what the functions of that name get, `totals`: where gradients of the first go (see `lower`).
    """

    softcap: Any
    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_query: Any
    bias_key: Any
    bias_sharing: Any
    slopes: Any
    slopes_batch: Any
    score: Any
    totals: Any
    mask: Any


class Dropout(NamedTuple):
    """Entries whose 32-bit number is under `threshold` are dropped, the others scaled by `factor`. No field is None: in
    Triton 3.6 no tuple that holds None can be asked whether it is None."""

    seed: Any
    threshold: Any
    factor: Any


class Rules(NamedTuple):
    """What happens to scores. `factor` takes scores (or dot products that nothing modifies) to base 2, `scale` dot
    products to scores. origin: (first head, first query, first key) of a part of a larger problem with dropout; None:
    the problem is whole."""

    window: Any
    modifiers: Any
    dropout: Any
    factor: Any
    scale: Any
    origin: Any


class Place(NamedTuple):
    """What a program works on: a tile of a head of a batch entry or packed sequence, and where that lies."""

    batch: Any
    head: Any
    tile: Any
    first_q: Any
    first_k: Any
    seqlen_q: Any
    seqlen_k: Any


class Source(NamedTuple):
    """What a sweep reads tile by tile: rows [begin, end) of one head; `tiles`: a descriptor for the copy engine, or a
    pointer to row 0, or of rows in pages to the first page. Functions return it, so no field is None (Triton 3.6)."""

    rows: Any
    tiles: Any
    begin: Any
    end: Any


class Stored(NamedTuple):
    """How a cache holds what a sweep reads: the `Table` of its pages, None: in one piece; the `Scale`s of quantised
    keys and values, or None; their head; what the scores of each query are to be multiplied by, None: nothing."""

    table: Any
    k_scale: Any
    v_scale: Any
    head: Any
    q_scale: Any


class Table(NamedTuple):
    """The pages of one sequence: a pointer to their numbers, and which of its rows the sweep calls row 0."""

    pointer: Any
    first: Any


class Scale(NamedTuple):
    """What quantised rows are multiplied by, head by head; page: the stride of a page's (`odd`), None: all pages
    share them."""

    pointer: Any
    page: Any


class Cache(NamedTuple):
    """Where cached sequences lie: rows that each has before the call, its row of the cache or of the block table (None:
    its own number), its left padding (None: 0); pages, None: there are none; strides and new rows are `odd`."""

    seqlens: Any
    rows: Any
    leftpad: Any
    table: Any
    table_row: Any
    appended: Any


class Rotary(NamedTuple):
    """Tables of rotary embedding, (position, angle), and the strides of a position."""

    cos: Any
    sin: Any
    cos_row: Any
    sin_row: Any


class Parts(NamedTuple):
    """How the keys of a sequence are cut: into `splits` parts, all of `tiles` tiles or, None, as even as can be. Part i
    of sequence b is number i * batches + b. All `odd`."""

    splits: Any
    tiles: Any
    batches: Any


class Steps(NamedTuple):
    """The tiles [begin, end) of a sweep, by number, or by their place in the list at `tiles`; [full_begin, full_end)
    need no mask at the edges."""

    tiles: Any
    begin: Any
    end: Any
    full_begin: Any
    full_end: Any


def odd(number: int) -> int:
    """An integer that Triton tells apart from no other but -1 (see above). `number_of` undoes it in a kernel."""
    return 2 * number + 3
