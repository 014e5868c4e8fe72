"""The doors of the library: what is drawn for each, and how a drawn call is checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from tests import caches
from tests.caches import CacheCase
from tests.fuzz import guests, masks, problems, wrong
from tests.fuzz.where import Where


@dataclass(frozen=True)
class Door:
    """draws: what a call is made of. check: asserts that it is right; False: it was refused, as it may be."""

    draws: Callable[[Where], st.SearchStrategy[Any]]
    check: Callable[[Any, Where], bool]


def _cached(where: Where) -> st.SearchStrategy[tuple[CacheCase, torch.dtype]]:
    """Calls over KV caches."""
    lengths = st.lists(st.integers(0, where.longest), min_size=1, max_size=4)
    fields: dict[str, Any] = {
        "name": st.just("drawn"),
        "lengths": lengths.map(tuple),
        "seqlen_q": st.integers(1, 9),
        "appended": st.none() | st.integers(0, 20),
        "headdim": st.sampled_from(where.widths),
        "headdim_v": st.sampled_from(where.widths),
        "page": st.sampled_from((0, 0, 16, 24, 32)),
        "indexed": st.booleans(),
        "rotary": st.integers(0, 16),
        "interleaved": st.booleans(),
        "causal": st.booleans(),
        "window": st.none() | st.tuples(masks.SIDE, masks.SIDE),
        "softcap": st.sampled_from((None, None, 4.0)),
        "alibi": st.booleans(),
        "sinks": st.booleans(),
        "stored": st.sampled_from((None, None, caches.INT8, caches.FP8, torch.float8_e5m2)),
        "scale_by_page": st.booleans(),
    }
    cases = st.builds(CacheCase, **fields)
    heads, pads = st.tuples(st.integers(1, 3), st.integers(1, 4)), st.none() | st.integers(0, 64)
    room = st.integers(0, 3)
    return st.tuples(st.tuples(cases, heads, pads, room).map(_settled), st.sampled_from(where.dtypes))


def _settled(parts: tuple[CacheCase, tuple[int, int], int | None, int]) -> CacheCase:
    """A case that is whole: heads in groups, padding within the rows, `room` for rows of no call, pages of scales."""
    case, (groups, group), pad, room = parts
    appended = 0 if case.appended is None else case.appended
    rotary = min(case.rotary, case.headdim) // 2 * 2 if appended else 0
    capacity = max(1, max(case.lengths) + appended + room)
    page = case.page
    return replace(
        case,
        heads=groups * group,
        heads_kv=groups,
        rotary=rotary,
        capacity=-(-capacity // page) * page if page else capacity,
        leftpad=None if pad is None else tuple(length * pad // 64 for length in case.lengths),
        scale_by_page=case.scale_by_page and bool(page) and case.stored is not None,
        # A name of its own gives it numbers of its own.
        name=repr((case.lengths, case.headdim, page, case.stored)),
    )


def _check_cached(drawn: tuple[CacheCase, torch.dtype], where: Where) -> bool:
    case, dtype = drawn
    more: dict[str, Any] = {"backend": where.backends[-1]} if where.device == "interpreter" else {}
    try:
        caches.check(caches.make(case, dtype, where.tensors), slack=problems.SLACK, **more)
    except NotImplementedError:
        if not more:
            raise
        return False
    return True


DOORS: dict[str, Door] = {
    "dense": Door(lambda where: problems.problems(where, packs=False), problems.check),
    "packed": Door(lambda where: problems.problems(where, packs=True), problems.check),
    "cached": Door(_cached, _check_cached),
    "sdpa": Door(guests.sdpa_calls, guests.check_sdpa),
    "evoformer": Door(guests.evoformer_calls, guests.check_evoformer),
    "wrong": Door(wrong.calls, wrong.check),
}
INTERPRETED = ("dense", "packed", "cached")
"""Those that lead to other kernels there; the guests call `attention`."""
EMULATED = ("dense", "packed")
