"""Where programs of the Hopper backward kernel find themselves."""

import itertools

import pytest

from flashtile.backends.hopper.calls import MOST, grid_of_keys


def _places(tiles: int, pairs: int, section: int, sections: bool) -> list[tuple[int, int]]:
    """(pair, tile) of each program, in the order in which they are handed out, as `schedule.key_tile` finds them."""
    together, (x_side, y_side, z_side) = grid_of_keys(tiles, pairs, section, sections)
    sides = itertools.product(range(z_side), range(y_side), range(x_side))
    return [(z * x_side + x, y) if together else (y, x) for z, y, x in sides]


@pytest.mark.parametrize("sections", [False, True])
@pytest.mark.parametrize(("tiles", "pairs", "section"), [(1, 1, 1), (3, 12, 4), (5, 7, 3), (4, 25, 6), (2, 32, 100)])
def test_every_tile_has_a_program(tiles: int, pairs: int, section: int, sections: bool) -> None:
    places = _places(tiles, pairs, section, sections)
    assert sorted(places) == [*itertools.product(range(pairs), range(tiles))]


def test_first_tiles_of_several_heads_come_first() -> None:
    assert _places(2, 4, 2, True) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert _places(2, 2, 2, False) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(("pairs", "section", "side"), [(32, 7, 8), (32, 3, 4), (37, 5, 1), (12, 100, 12)])
def test_as_many_as_leave_no_remainder(pairs: int, section: int, side: int) -> None:
    assert grid_of_keys(9, pairs, section, True) == (True, (side, 9, pairs // side))


@pytest.mark.parametrize("sections", [False, True])
@pytest.mark.parametrize(("tiles", "pairs"), [(MOST + 1, 3), (2, 70_000), (2, 70_001), (1, 4 * MOST)])
def test_no_side_is_longer_than_the_hardware_takes(tiles: int, pairs: int, sections: bool) -> None:
    _together, (x_side, y_side, z_side) = grid_of_keys(tiles, pairs, 16, sections)
    assert x_side * y_side * z_side == tiles * pairs
    assert max(y_side, z_side) <= MOST


@pytest.mark.parametrize(("tiles", "pairs"), [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_do_has_no_programs(tiles: int, pairs: int) -> None:
    assert 0 in grid_of_keys(tiles, pairs, 4, True)[1]
