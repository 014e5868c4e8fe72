"""The search for tiles: its parts that need no kernel."""

import pytest

from flashtile.bench import tune
from flashtile.bench.tune import Tried
from flashtile.tuning.portable import PortableConfig, Tiles

A, B, C, D = Tiles(32, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)


def test_candidates_fit() -> None:
    found = list(tune.candidates(128, 2, 99 * 1024))
    assert len(found) == len(set(found)) > 10
    for tiles in found:
        assert 2 * tiles.stages * min(tiles.tile_q, tiles.tile_kv) * 128 * 2 <= 99 * 1024
    assert len(list(tune.candidates(128, 2, 227 * 1024))) > len(found)


def test_the_fastest_that_is_right_comes_first() -> None:
    def measure(tiles: Tiles) -> float:
        if tiles == D:
            raise RuntimeError("too many registers")
        return {A: 3.0, B: 2.0, C: 1.0}[tiles]

    found = tune.fastest((A, B, C, D), lambda tiles: "out: off" if tiles == C else "", measure, lambda text: None)
    assert [one.tiles for one in found[:2]] == [B, A]
    assert {one.reason for one in found[2:]} == {"out: off", "RuntimeError: too many registers"}
    assert all(one.ms is None for one in found[2:])


@pytest.mark.parametrize(("apart", "key", "value"), [(1.0, A, B), (2.0, C, None)])
def test_dk_and_dv_part_where_that_is_faster(apart: float, key: Tiles, value: Tiles | None) -> None:
    times = {"forward": (D, 1.0), "query": (D, 1.0), "key": (C, 3.0), "dk": (A, apart), "dv": (B, apart)}
    found = {role: [Tried(tiles, ms)] for role, (tiles, ms) in times.items()}
    config = tune.best(found)
    assert config == PortableConfig(D, D, key, value)
    assert tune.row(64, config).startswith("(64, PortableConfig(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(")
    found["query"] = [Tried(A, None, "wrong")]
    assert tune.best(found) is None


def test_each_role_changes_its_own_tiles() -> None:
    base = PortableConfig(A, A, A)
    assert tune.config_for("forward", D, base) == PortableConfig(D, A, A)
    assert tune.config_for("query", D, base) == PortableConfig(A, D, A)
    assert tune.config_for("key", D, base._replace(value=B)) == PortableConfig(A, A, D)
    assert tune.config_for("dk", D, base) == PortableConfig(A, A, D, A)
    assert tune.config_for("dv", D, base) == PortableConfig(A, A, A, D)


def test_what_is_like_the_tiles_in_use_is_tried_first() -> None:
    ordered = tune.nearest_first((D, A, B), C)
    assert ordered == [C, B, A, D]
    assert all(tiles.lean for tiles in tune.nearest_first((D, A, B), C._replace(lean=True)))
    base = PortableConfig(A, B, C)
    assert [tune.tiles_of(role, base) for role in tune.ROLES] == [A, B, C, C, C]
    assert tune.tiles_of("dv", base._replace(value=D)) == D


def test_the_search_ends_when_its_time_is_over() -> None:
    def measure(tiles: Tiles) -> float:
        return 1.0

    assert len(tune.fastest((A, B, C), lambda tiles: "", measure, lambda text: None, seconds=0.0)) == 1
    assert len(tune.fastest((A, B, C), lambda tiles: "", measure, lambda text: None, seconds=60.0)) == 3
