"""The order in which the tiles of a mask's lists are handed out."""

import pytest

pytest.importorskip("triton")

import torch

from flashtile.kernels import visits


def test_few_tiles_come_heaviest_first() -> None:
    weights = torch.randint(0, 50, (2, 3, visits._MANY), generator=torch.Generator().manual_seed(1))
    order = visits._heaviest_first(weights)
    assert torch.equal(weights.gather(-1, order), weights.sort(dim=-1, descending=True).values)


@pytest.mark.parametrize("tiles", [visits._MANY + 1, 1024, 1000])
def test_of_many_tiles_neighbours_stay_together(tiles: int) -> None:
    weights = torch.randint(0, 50, (2, 3, tiles), generator=torch.Generator().manual_seed(1))
    order = visits._heaviest_first(weights)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(tiles).expand(2, 3, -1))
    some = -(-tiles // visits._NEIGHBOURS)
    for head, found in zip(weights.flatten(0, 1), order.flatten(0, 1), strict=True):
        groups = [int(group) for group in (found // visits._NEIGHBOURS).unique_consecutive()]
        assert sorted(groups) == list(range(some))
        sums = [int(head[group * visits._NEIGHBOURS : (group + 1) * visits._NEIGHBOURS].sum()) for group in groups]
        assert sums == sorted(sums, reverse=True)
        for group in groups:
            of_group = head[found[found // visits._NEIGHBOURS == group]]
            assert of_group.tolist() == sorted(of_group.tolist(), reverse=True)
