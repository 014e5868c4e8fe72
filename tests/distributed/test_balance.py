"""Layouts: every token once, causal work alike, and shards that put together are the whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashtile.distributed import balance, shard, unshard
from tests.distributed import processes
from tests.distributed.jobs import mesh_of

WORLDS = [(layout, ranks) for layout in ("zigzag", "contiguous") for ranks in (1, 2, 3, 5, 8)]


@pytest.mark.parametrize(("layout", "ranks"), WORLDS)
def test_every_token_lies_on_one_rank(layout: str, ranks: int) -> None:
    seqlen = 6 * balance.parts(layout, ranks)
    held = [balance.pieces(layout, rank, ranks, seqlen) for rank in range(ranks)]
    tokens = [token for pieces in held for piece in pieces for token in range(piece.begin, piece.begin + piece.length)]
    assert sorted(tokens) == list(range(seqlen))
    for pieces in held:
        assert sum(piece.length for piece in pieces) == seqlen // ranks
        assert [piece.local for piece in pieces] == [place * pieces[0].length for place in range(len(pieces))]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zigzag_balances_causal_work(ranks: int) -> None:
    def pairs(layout: str, rank: int) -> int:
        held = balance.pieces(layout, rank, ranks, 48 * ranks)
        return sum(token + 1 for piece in held for token in range(piece.begin, piece.begin + piece.length))

    assert len({pairs("zigzag", rank) for rank in range(ranks)}) == 1
    assert pairs("contiguous", ranks - 1) > 2 * pairs("contiguous", 0)


@pytest.mark.parametrize(("layout", "ranks"), WORLDS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shares_joined_are_the_whole(layout: str, ranks: int, dim: int) -> None:
    sizes = [3, 4, 5]
    sizes[dim] = 2 * balance.parts(layout, ranks)
    whole = torch.randn(sizes)
    shares = [balance.own(whole, layout, rank, ranks, dim) for rank in range(ranks)]
    assert torch.equal(balance.joined(shares, layout, dim), whole)


def test_nothing_is_shared_too() -> None:
    empty = torch.randn(2, 0, 3)
    assert balance.joined([balance.own(empty, "zigzag", rank, 2, 1) for rank in range(2)], "zigzag", 1).shape == (
        2,
        0,
        3,
    )


def back_and_forth(rank: int, ranks: int) -> None:
    words = torch.arange(48).view(2, 24)
    for mesh in (None, dist.group.WORLD, dist.init_device_mesh("cpu", (ranks,)), mesh_of((2, 2)), mesh_of((4, 1))):
        for layout in ("zigzag", "contiguous"):
            share = shard(words, mesh, layout=layout)
            assert share.shape == (2, 24 // ranks)
            assert torch.equal(unshard(share, mesh, layout=layout), words)
    # Within a place of the ring, heads' ranks hold its tokens in a row.
    place, inner = divmod(rank, 2)
    ring = balance.own(words, "zigzag", place, 2, 1)
    assert torch.equal(shard(words, mesh_of((2, 2))), ring[:, 6 * inner : 6 * inner + 6])
    leaf = torch.randn(8, 3, requires_grad=True)
    shard(leaf, dim=0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].sum() == 2


def test_shards_over_processes(tmp_path: Path) -> None:
    processes.succeeded(processes.run([back_and_forth], 4, tmp_path)[0])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.zeros(2, 9)
    with pytest.raises(ValueError, match="dim: got 2, need the place of the sequence among 2 dimensions"):
        shard(words, dim=2)
    with pytest.raises(ValueError, match="layout: got 'striped', need 'zigzag'"):
        unshard(words, layout="striped")
    monkeypatch.setattr(dist.ProcessGroup, "size", lambda group: 2)
    said = "tensor: got 9, need a multiple of 4 for the layout 'zigzag'; try padding to 12 and mask=masks.prefix"
    with pytest.raises(ValueError, match=said):
        shard(words)
