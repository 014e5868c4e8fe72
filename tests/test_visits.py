"""The order in which the tiles of a mask's lists are handed out."""

import pytest

pytest.importorskip("triton")

import torch

from flashtile.kernels import visits


@pytest.mark.parametrize("tiles", [1, 7, 32, 33, 1000, 1024])
def test_neighbours_stay_together_and_the_heaviest_come_first(tiles: int) -> None:
    weights = torch.randint(0, 50, (2, 3, tiles), generator=torch.Generator().manual_seed(1))
    order = visits._heaviest_first(weights)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(tiles).expand(2, 3, -1))
    some = min(tiles, visits._NEIGHBOURS)
    for head, found in zip(weights.flatten(0, 1), order.flatten(0, 1), strict=True):
        groups = [int(group) for group in (found // some).unique_consecutive()]
        assert sorted(groups) == list(range(-(-tiles // some)))
        sums = [int(head[group * some : (group + 1) * some].sum()) for group in groups]
        assert sums == sorted(sums, reverse=True)
        for group in groups:
            numbers = found[found // some == group].tolist()
            assert numbers in (sorted(numbers), sorted(numbers, reverse=True))


@pytest.mark.parametrize("tiles", [10, 32, 100])
def test_where_later_tiles_meet_more_they_come_first(tiles: int) -> None:
    rising = torch.arange(1, tiles + 1)
    order = visits._heaviest_first(torch.stack((rising, rising.flip(0))))
    whole = tiles // visits._NEIGHBOURS * visits._NEIGHBOURS or tiles
    assert order[0][order[0] < whole].tolist() == list(range(whole))[::-1]
    assert order[1].tolist() == list(range(tiles))
