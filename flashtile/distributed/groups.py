"""Process groups: which processes share a sequence, and one agreement between them on what they are about to do."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashtile.check import sharding as check

Group = dist.ProcessGroup | DeviceMesh | None
"""A process group, a DeviceMesh of one dimension, or None: all processes."""


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group that is meant."""
    check.initialized(dist.is_available() and dist.is_initialized())
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(group, DeviceMesh):
        check.mesh_dimensions(group.ndim, 1, "ring")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        check.group_kind(group)
    check.member(dist.get_rank(group))
    return group


def groups_of(mesh: Any) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(ring, heads) of a DeviceMesh of two dimensions or of a pair of groups."""
    if isinstance(mesh, DeviceMesh):
        check.initialized(dist.is_initialized())
        check.mesh_dimensions(mesh.ndim, 2, "mixed")
        return mesh.get_group(0), mesh.get_group(1)
    pair = mesh if isinstance(mesh, (tuple, list)) else (mesh,)
    check.mesh_dimensions(len(pair), 2, "mixed")
    return group_of(pair[0]), group_of(pair[1])


def name_of(group: dist.ProcessGroup) -> str:
    return str(group.group_name)


def peer(group: dist.ProcessGroup, rank: int) -> int:
    """The number among all processes of a rank of the group."""
    return dist.get_global_rank(group, rank)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's small messages lie."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Agreement:
    """What the processes of some groups have agreed on; asks once for every new kind of call."""

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self.groups = [group for group in groups if group.size() > 1]
        self._known: set[Any] = set()

    def reached(self, key: Any) -> bool:
        """Whether the calls that `key` stands for need no asking."""
        return not self.groups or key in self._known

    def reach(self, key: Any, description: dict[str, str]) -> None:
        """One small all-gather a group; `description`: what must be equal, field by field.

        Raises:
            RanksDisagree: on every process, naming the fields that differ and their values by rank.
        """
        for group in self.groups:
            self._compare(group, description)
        self._known.add(key)

    def failed(self, error: Exception) -> None:
        """For a process that refuses its call, in place of `reach`: the others are told why."""
        for group in self.groups:
            try:
                self._compare(group, {"call": f"{type(error).__name__}: {error}"})
            except check.RanksDisagree:
                return

    def unanimous(self, yes: bool) -> bool:
        """Whether all processes say yes; one small all-reduce a group."""
        for group in self.groups:
            found = torch.tensor(int(yes), device=_device(group))
            dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
            yes = bool(found)
        return yes

    def _compare(self, group: dist.ProcessGroup, description: dict[str, str]) -> None:
        digest = hashlib.sha256(repr(sorted(description.items())).encode()).digest()[:16]
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(_device(group))
        found = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(found, mine, group=group)
        if len({tuple(each.tolist()) for each in found}) == 1:
            return
        descriptions: list[dict[str, str]] = [{} for _ in range(group.size())]
        dist.all_gather_object(descriptions, description, group=group)
        check.ranks_disagree(descriptions)


def shared_seed(seed: Tensor | None, groups: Sequence[dist.ProcessGroup]) -> Tensor | None:
    """The seed of the first rank, on all: each has drawn its own where none was given."""
    if seed is None:
        return None
    seed = seed.clone()
    for group in groups:
        if group.size() > 1:
            dist.broadcast(seed, peer(group, 0), group=group)
    return seed


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, which all transports take whatever its type."""
    return tensor.reshape(-1).view(torch.uint8)
