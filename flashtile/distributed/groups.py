"""Process groups: which processes share a sequence, and one agreement between them on what they are about to do."""

import atexit
import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Its functions' defaults are the group of all processes at the time of the import, and keep it for ever. PyTorch's
# compiler imports it, and optimizers import that; before there is a group they keep none.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashtile.check import sharding as check

Group = dist.ProcessGroup | DeviceMesh | None
"""A process group, a DeviceMesh of one dimension, or None: all processes."""

Borrowed = weakref.ref[dist.ProcessGroup]
"""A process group as this package remembers it from call to call: it ends when `destroy_process_group` lets go of it,
and its engine's threads with it. They must end before the interpreter does, or they may abort the process."""


def living(group: Borrowed) -> dist.ProcessGroup:
    """The group, of which a call is to be made."""
    found = group()
    if found is None:
        check.group_destroyed()
    return found


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


class Statement(NamedTuple):
    """What a process is about to do, field by field, and a digest of that."""

    fields: dict[str, str]
    digest: tuple[int, int]

    @classmethod
    def of(cls, fields: dict[str, str]) -> "Statement":
        digest = hashlib.sha256(repr(sorted(fields.items())).encode()).digest()
        first, second = (int.from_bytes(digest[place : place + 8], "little", signed=True) for place in (0, 8))
        return cls(fields, (first, second))


_APART = (0, 0)
"""In place of a digest: from a process that has found its group disagreeing, for its other groups."""
_MOST_KINDS = 4096


class Agreement:
    """What the processes of some groups do next, compared before the first message of every call.

    The few bytes that this takes go from host to host (see `_line`), and while they are under way the host prepares the
    call, so that no device waits for them.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self._groups = [Borrowed(group) for group in groups if group.size() > 1]
        self._known: dict[Any, Statement] = {}

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return [living(group) for group in self._groups]

    def knows(self, key: Any) -> bool:
        """Whether this process has made such a call before."""
        return not self._groups or key in self._known

    def ask(self, key: Any, describe: Callable[[], dict[str, str]]) -> "Question":
        """`describe`: what must be equal, field by field, of all calls that `key` stands for."""
        if not self._groups:
            return Question((), _NOTHING)
        statement = self._known.get(key)
        if statement is None:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            statement = self._known[key] = Statement.of(describe())
        return Question(self.groups, statement)

    def failed(self, error: Exception) -> None:
        """For a process that refuses its call: the others are told why."""
        try:
            Question(self.groups, Statement.of({"call": f"{type(error).__name__}: {error}"})).settle()
        except check.RanksDisagree:
            return

    def unanimous(self, yes: bool) -> bool:
        """Whether all processes say yes.

        Raises:
            RanksDisagree: another process makes a call meanwhile.
        """
        return Question(self.groups, Statement.of({"call": "a vote"}), int(yes)).settle() > 0


class Question:
    """A statement on its way to all processes of some groups."""

    def __init__(self, groups: Sequence[dist.ProcessGroup], statement: Statement, value: int = 1) -> None:
        self.groups, self.statement, self.value = groups, statement, value
        self.first = _send(groups[0], (*statement.digest, value)) if groups else None

    def settle(self) -> int:
        """Waits for the others' statements, before the first message that depends on them; the smallest `value`.

        Raises:
            RanksDisagree: on every process, naming the fields that differ and their values by rank.
        """
        digest, value = self.statement.digest, self.value
        told = {dist.get_rank(): self.statement.fields} if self.groups else {}
        apart = False
        for place, group in enumerate(self.groups):
            under_way = self.first if place == 0 and self.first is not None else _send(group, (*digest, value))
            answers = under_way.wait()
            value = min(int(answer[2]) for answer in answers)
            if len({(int(answer[0]), int(answer[1])) for answer in answers}) > 1:
                told, apart, digest = _exchanged(group, told), True, _APART
        if apart:
            check.ranks_disagree(told)
        return value


_NOTHING = Statement({}, _APART)
_Told = dict[int, dict[str, str]]


def _exchanged(group: dist.ProcessGroup, told: _Told) -> _Told:
    """What each process of the group has been told, together: statements by rank among all processes."""
    text = json.dumps(sorted(told.items())).encode()
    lengths = [int(answer[0]) for answer in _send(group, (len(text),)).wait()]
    padded = text.ljust(max(lengths), b" ")
    found: _Told = {}
    for answer in _send(group, padded, torch.uint8).wait():
        found |= dict(json.loads(bytes(answer.tolist())))
    return dict(sorted(found.items()))


class _Sent(NamedTuple):
    """Numbers that go from every process of a group to every other."""

    found: list[Tensor]
    work: Any

    def wait(self) -> list[Tensor]:
        self.work.wait()
        return self.found


def _send(group: dist.ProcessGroup, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> _Sent:
    line = _line(group)
    mine = torch.tensor(list(numbers), dtype=dtype, device=line.device)
    found = [torch.empty_like(mine) for _ in range(group.size())]
    return _Sent(found, line.gather(group, found, mine))


class _Line(NamedTuple):
    """What carries a group's small messages, and where these lie."""

    device: str
    gather: Callable[[dist.ProcessGroup, list[Tensor], Tensor], Any]


_lines: weakref.WeakKeyDictionary[dist.ProcessGroup, _Line] = weakref.WeakKeyDictionary()
# Also where nobody destroys the groups.
atexit.register(_lines.clear)


def _line(group: dist.ProcessGroup) -> _Line:
    """From host to host: through the group itself if it speaks for CPUs, else through Gloo between the same processes,
    for on NCCL every answer would wait for what the devices still have to do."""
    known = _lines.get(group)
    if known is None:
        on_cpu = "cpu:" in dist.get_backend_config(group)
        known = _through("cpu") if on_cpu else _beside(group) if dist.is_gloo_available() else None
        _lines[group] = known = known or _through("cuda")
    return known


def _through(device: str) -> _Line:
    return _Line(device, lambda group, found, mine: dist.all_gather(found, mine, group=group, async_op=True))


def _beside(group: dist.ProcessGroup) -> _Line:
    """Members only take part, so that nobody else must know; waits as long as the group itself would."""
    engines: Any = dist
    store: Any = engines.distributed_c10d._get_default_store()
    name = f"flashtile/{name_of(group)}/{peer(group, 0)}"
    # A store may outlive groups: every line has keys of its own.
    count = store.add(f"{name}/{group.rank()}", 1)
    place = engines.PrefixStore(f"{name}/{count}", store)
    engine = engines.ProcessGroupGloo(place, group.rank(), group.size(), _timeout(group))
    return _Line("cpu", lambda _, found, mine: engine.allgather([found], [mine]))


def _timeout(group: dist.ProcessGroup) -> timedelta:
    own: Any = group
    try:
        found: timedelta = own._get_backend(torch.device("cuda")).options._timeout
    except (AttributeError, RuntimeError):
        found = dist.constants.default_pg_timeout
    return found


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
