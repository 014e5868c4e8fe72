"""Layouts: which tokens of a sequence lie on which rank.

"zigzag" cuts a sequence into twice as many chunks as there are ranks; rank r holds the chunks r and 2 ranks - 1 - r.
Under a causal mask the work of a chunk grows with its place, so the sum of a pair is the same for all ranks (the
striped order of Brandon et al. 2023, in chunks, as in Llama 3's context parallelism, Dubey et al. 2024, section 3.3.2).
"contiguous" gives every rank one stretch.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile.check import sharding as check
from flashtile.distributed.groups import Agreement, Group, as_bytes, group_of, groups_of


class Piece(NamedTuple):
    """A stretch of tokens: where it begins on its rank, where in the sequence, and how long it is."""

    local: int
    begin: int
    length: int


def chunks(layout: str, rank: int, ranks: int) -> tuple[int, ...]:
    """The numbers of the chunks that a rank holds, in its order."""
    return (rank, 2 * ranks - 1 - rank) if layout == "zigzag" and ranks > 1 else (rank,)


def parts(layout: str, ranks: int) -> int:
    """Into how many chunks a sequence is cut."""
    return 2 * ranks if layout == "zigzag" and ranks > 1 else ranks


def pieces(layout: str, rank: int, ranks: int, seqlen: int) -> list[Piece]:
    """The tokens that a rank holds of a sequence of `seqlen`, which the layout divides."""
    length = seqlen // parts(layout, ranks)
    held = chunks(layout, rank, ranks)
    return [Piece(place * length, chunk * length, length) for place, chunk in enumerate(held)]


def own(tensor: Tensor, layout: str, rank: int, ranks: int, dim: int) -> Tensor:
    """A rank's share of a whole tensor, a copy."""
    held = pieces(layout, rank, ranks, tensor.shape[dim])
    return torch.cat([tensor.narrow(dim, piece.begin, piece.length) for piece in held], dim)


def joined(shares: Sequence[Tensor], layout: str, dim: int) -> Tensor:
    """The whole tensor from all ranks' shares, in the order of the sequence."""
    ranks = len(shares)
    count = len(chunks(layout, 0, ranks))
    cut = [share.chunk(count, dim) if share.shape[dim] else (share,) * count for share in shares]
    found = {
        chunk: cut[rank][place] for rank in range(ranks) for place, chunk in enumerate(chunks(layout, rank, ranks))
    }
    return torch.cat([found[chunk] for chunk in range(parts(layout, ranks))], dim)


def _levels(mesh: Any, layout: str) -> list[tuple[dist.ProcessGroup, str]]:
    """(group, its layout), outermost first: of two dimensions, the inner one cuts the outer one's shares in a row."""
    if isinstance(mesh, (tuple, list)) or getattr(mesh, "ndim", 1) == 2:
        ring, heads = groups_of(mesh)
        return [(ring, layout), (heads, "contiguous")]
    return [(group_of(mesh), layout)]


def ranks_of(mesh: Any) -> int:
    """How many processes share a sequence."""
    return prod(group.size() for group, _ in _levels(mesh, "contiguous"))


def shard(tensor: Tensor, mesh: Any = None, *, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """This process's share of a tensor that all processes hold whole: a copy of its tokens along `dim`.

    Args:
        tensor: anything with tokens along `dim`: q, k, v, token ids (batch, seqlen), positions, labels.
        mesh: as in the attention functions: a ProcessGroup, a DeviceMesh of one dimension, None for all processes; for
            `mixed_attention` a mesh of two dimensions or a pair of groups.
        dim: where the sequence is; 1 for (batch, seqlen, ...), 0 for packed tokens.
        layout: "zigzag" or "contiguous".

    Returns:
        Tensor: the share, contiguous; differentiable.

    Raises:
        ValueError: the ranks do not divide the sequence evenly (2 * ranks for zigzag), or an argument is not as
            described.
    """
    check.layout(layout)
    check.dimension(dim, tensor.ndim)
    for group, order in _levels(mesh, layout):
        ranks = group.size()
        check.divisible("tensor", tensor.shape[dim], parts(order, ranks), order)
        tensor = own(tensor, order, group.rank(), ranks, dim)
    return tensor


def unshard(tensor: Tensor, mesh: Any = None, *, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """The whole tensor on every process, from all shares: the inverse of `shard`, with its arguments.

    One all-gather a dimension of the mesh. Not differentiable: compute losses on shares, and average those.

    Raises:
        ValueError: an argument is not as described, or, on every process, the shares differ in shape or type.
    """
    check.layout(layout)
    check.dimension(dim, tensor.ndim)
    with torch.no_grad():
        for group, order in reversed(_levels(mesh, layout)):
            statement = {"call": "unshard", "tensor": f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"}
            Agreement([group]).ask(None, statement.copy).settle()
            tensor = joined(gathered(tensor, group), order, dim)
    return tensor


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which have one shape."""
    if group.size() == 1:
        return [tensor]
    tensor = tensor.detach().contiguous()
    found = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather([as_bytes(each) for each in found], as_bytes(tensor), group=group)
    return found


__all__ = ["Group", "Piece", "chunks", "gathered", "joined", "own", "parts", "pieces", "ranks_of", "shard", "unshard"]
