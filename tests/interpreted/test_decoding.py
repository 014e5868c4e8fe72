"""The portable kernels of calls over a KV cache, interpreted, with tiles so small that every sequence has many."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flashtile import decoding as door
from flashtile import plan
from flashtile.backends import portable
from flashtile.backends.portable.meta import meta_of
from flashtile.decoding import CacheArguments
from flashtile.problem import describe_cached
from flashtile.tuning import decoding
from flashtile.tuning.decoding import Room
from flashtile.tuning.portable import Tiles
from tests import caches
from tests.caches import CASES, EVERYTHING, QUANTIZED, WIDE, CacheCase
from tests.oracle import assert_equal_bits

ROWS = ((10**6, Tiles(128, 16, 4, 1)),)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding, "NARROW", {"hopper": {"half": ROWS, "single": ROWS}})
    plan.choose.cache_clear()
    yield
    monkeypatch.undo()
    plan.choose.cache_clear()


def _plan(call: caches.CacheCall, **more: object) -> plan.Plan:
    return door.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options | more)).plan()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", [*CASES, *QUANTIZED, *WIDE], ids=str)
def test_matches_reference(case: CacheCase, splits: int) -> None:
    dtype = torch.float16 if splits == 3 else torch.float32
    call = caches.make(case, dtype)
    if case.stored is not None and case.stored.is_floating_point:
        with pytest.raises(NotImplementedError, match="rounds nothing to 8-bit floats"):
            call.run(backend="portable")
        call = caches.make(replace(case, appended=None, rotary=0), dtype)
    chosen = _plan(call, num_splits=splits)
    assert (chosen.backend, chosen.kernel, chosen.config.splits) == ("portable", "split_keys", splits)
    caches.check(call, num_splits=splits, backend="portable")


@pytest.mark.parametrize("splits", [2, 7, 40])
def test_any_number_of_parts(splits: int) -> None:
    """More parts than tiles, and more than are joined at a time: those without keys change nothing."""
    caches.check(caches.make(EVERYTHING, torch.float32), num_splits=splits)


def test_how_many_parts_are_joined_at_a_time() -> None:
    at_once = {splits: decoding.parts_at_once(splits) for splits in (2, 4, 5, 16, 17, 32, 33, 128)}
    assert at_once == {2: 4, 4: 4, 5: 16, 16: 16, 17: 32, 32: 32, 33: 16, 128: 16}


@pytest.mark.parametrize("splits", [3, 7])
def test_how_many_parts_are_joined_at_a_time_changes_no_bit(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, or in turns of two."""
    call = caches.make(EVERYTHING, torch.float16)
    found = []
    monkeypatch.setattr(decoding, "IN_TURN", 2)
    for at_once in (32, 2):
        monkeypatch.setattr(decoding, "COMBINE", (at_once,))
        assert decoding.parts_at_once(splits) == at_once
        found.append(call.copy().run(num_splits=splits, backend="portable"))
    assert_equal_bits(list(found[0]), list(found[1]))


@pytest.mark.parametrize(
    ("name", "tile", "whole"),
    [("paged", 16, True), ("paged", 32, False), ("paged_odd", 16, False), ("paged_leftpad", 16, False),
     ("plain", 16, False), ("int4_by_page", 16, False), ("fp8", 16, True)],
)  # fmt: skip
def test_where_a_tile_lies_in_one_page(name: str, tile: int, whole: bool) -> None:
    call = caches.make({case.name: case for case in (*CASES, *QUANTIZED)}[name], torch.float16)
    made = door.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options))
    problem = describe_cached(made.inputs, made.cache, made.options, made.interleaved)
    assert meta_of(problem, Tiles(16, tile, 4, 1), False, False, False).whole == whole


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_places_of_either_integer(dtype: torch.dtype) -> None:
    call = caches.make(EVERYTHING, torch.float32)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        call.options[name] = call.options[name].to(dtype)
    caches.check(call)


def test_strided_caches_are_written_through() -> None:
    call = caches.make(CacheCase("strided", rotary=8), torch.float32)
    both = torch.stack((call.k_cache, call.v_cache)).transpose(2, 3).contiguous().transpose(2, 3)
    call.k_cache, call.v_cache = both
    caches.check(call, backend="portable")


@pytest.mark.parametrize(("part", "page"), [(32, 0), (32, 16), (64, 0)])
def test_batch_invariant(part: int, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts in the batch and three alone, or one and two: a sequence gets equal bits."""
    monkeypatch.setattr(decoding, "PART", part)
    caches.check_invariance(torch.float32, page)


def test_a_sequence_that_is_too_long_touches_nothing_else() -> None:
    """On a GPU nobody looks at lengths: rows beyond the end of the cache are neither written nor read."""
    call = caches.make(CacheCase("long", lengths=(15, 16), capacity=16, page=16), torch.float32)
    before = call.copy()
    call.options["cache_seqlens"] = torch.tensor([16, 500])
    made = door.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options))
    chosen = made.plan()
    portable._cached().decode(made.inputs, made.cache, chosen.problem, chosen.config)
    torch.testing.assert_close(call.k_cache, before.k_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("room", "programs", "tiles", "wanted"),
    [
        *((Room(1, 1), *row) for row in ((512, 64, 1), (128, 64, 1), (32, 512, 4), (8, 1024, 16), (8, 64, 16))),
        *((Room(1, 1), *row) for row in ((32, 64, 4), (2, 64, 32))),  # latent attention, 16 sequences and one
        *((Room(3, 2), *row) for row in ((512, 128, 2), (128, 128, 2), (32, 1024, 8), (8, 2048, 32), (8, 128, 32))),
        *((Room(2, 2), *row) for row in ((512, 128, 1), (128, 128, 2), (32, 1024, 8), (8, 2048, 32), (8, 128, 32))),
        *((Room(3, 2), *row) for row in ((8, 4, 2), (396, 100, 1), (0, 9, 1), (4, 0, 1))),
    ],
)
def test_parts_fill_the_device(room: Room, programs: int, tiles: int, wanted: int) -> None:
    """Of 132 multiprocessors: the numbers of parts that were the fastest on an H100, untimed and odd ones."""
    assert decoding.decode_splits(programs, tiles, 132, room) == wanted


def test_room_on_a_multiprocessor() -> None:
    """Head dimension 128: tiles of 128 rows in 16 bits fill it, of 64 rows two are enough; in 8 bits it takes all."""
    assert decoding.room_for(Tiles(16, 128, 4, 3), 512, False, "hopper") == Room(1, 1)
    assert decoding.room_for(Tiles(16, 64, 4, 3), 512, False, "hopper") == Room(3, 2)
    assert decoding.room_for(Tiles(16, 64, 4, 3), 256, True, "hopper") == Room(2, 2)


@pytest.mark.parametrize(
    ("columns", "family", "most"),
    [
        *((128, family, 4) for family in ("hopper", "blackwell", "rdna")),
        *((512, family, 4) for family in ("hopper", "cdna")),
        *((512, family, 1) for family in ("blackwell", "ampere", "rdna")),
        (256, "rdna", 4),
        (576, "hopper", 1),
    ],
)
def test_new_rows_of_a_program(columns: int, family: str, most: int) -> None:
    assert decoding.append_most(columns, family) == most
