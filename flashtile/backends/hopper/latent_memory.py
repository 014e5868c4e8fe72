"""What the latent kernel has in shared memory, and who waits for what."""

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS

COLUMNS = gl.constexpr(512)
"""Of a key that are its value too."""

HELD = gl.constexpr(448)
"""Columns of the queries that registers hold."""


class Memory(NamedTuple):
    """keys: slots for the first columns of tiles, the first of which have the queries' at first. rest: the last columns
    of one tile. queries: the columns from HELD on. weights: of one tile. scales: what an output is multiplied with, of
    a step and the one before."""

    keys: Any
    rest: Any
    queries: Any
    weights: Any
    scales: Any


class Barriers(NamedTuple):
    """full: a slot of keys; rest_full: the last columns of a step's keys; empty: the values in a slot are multiplied;
    ready: weights and scale of a step are there; go: the scores of the next step are multiplied; asked: the queries."""

    full: Any
    rest_full: Any
    empty: Any
    ready: Any
    go: Any
    asked: Any


class Arriving(NamedTuple):
    """Tiles of 8 bits, before they are widened."""

    full: Any
    keys: Any
    rest: Any


@triton.constexpr_function
def query_slots(META):
    """Slots that the queries have at first."""
    return ROWS.value // META.tile_kv


@gluon.jit
def slot_of(i_step, META: gl.constexpr):
    """(slot of a step's keys, how often it was filled before, by the queries too)."""
    i_fill = i_step + query_slots(META)
    return i_fill % META.stages, i_fill // META.stages
