"""Calls on DTensors: each device attends for its own batch entries and heads, which need no word from the others.

A dimension of the mesh that shards the batch or the heads of q, k or v goes on doing so, and everything else of the
call is laid out to fit: tables are sharded along with what they are about, or whole on every device. A dimension that
shards anything else, the sequence above all, is gathered first (`flashtile.distributed` keeps sequences apart). Where a
device must know which entry or head it has (functions of scores and masks, dropout, a bias that entries share), all is
gathered too, and every device of the mesh does the same.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from flashtile import check, recall
from flashtile.check import sharding as sharding_check
from flashtile.masks import Mask
from flashtile.request import Arguments, Packing, mask_value

BATCH, HEADS, SAME = "batch", "heads", "same"
"""What a dimension of the mesh deals out; SAME: nothing."""

Dims = dict[str, int]
"""Which dimension of a tensor is its batch, and which its heads; absent: all entries or heads share it."""


def spread(tensor: Any) -> bool:
    """Whether a tensor lies on several devices; it is known by its mesh, for DTensor's module is long to load."""
    return hasattr(tensor, "device_mesh")


def attention(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None) -> tuple[Any, Any]:
    """(out, lse) as DTensors, sharded as q is along batch and heads."""
    sharding_check.dtensors([spread(tensor) for tensor in (q, k, v)], packing is not None)
    check.tensors(q, k, v)
    check.qkv(q, k, v, varlen=False)
    mesh = q.device_mesh
    roles = _roles((q, k, v), arguments)
    shared_key = roles.count(HEADS) and k.shape[2] == 1
    own, keys = {BATCH: 0, HEADS: 2}, {BATCH: 0} if shared_key else {BATCH: 0, HEADS: 2}
    mask = Mask("") if arguments.mask is None else mask_value(arguments.mask)
    named = {"bias": arguments.bias, "alibi_slopes": arguments.alibi_slopes, "sinks": arguments.sinks}
    here: dict[str, Any] = {
        name: _local(table, _dims(name, table), roles, mesh) for name, table in named.items() if table is not None
    }
    if mask.token:
        here["mask"] = Mask(mask.token, tuple([_local(table, dims, roles, mesh) for table, dims in _of_mask(mask)]))
    part = arguments._replace(**here)
    local = [_local(tensor, dims, roles, mesh) for tensor, dims in ((q, own), (k, keys), (v, keys))]
    out, lse = recall.attention(local[0], local[1], local[2], part)
    sizes = (*q.shape[:-1], v.shape[-1])
    return (
        _whole(out, own, roles, mesh, sizes),
        _whole(lse, {BATCH: 0, HEADS: 1}, roles, mesh, (q.shape[0], q.shape[2], q.shape[1])),
    )


def _roles(qkv: Sequence[Any], arguments: Arguments) -> list[str]:
    """What each dimension of the mesh deals out."""
    mesh = qkv[0].device_mesh
    mask = Mask("") if arguments.mask is None else mask_value(arguments.mask)
    by_place = _is_function(mask) or arguments.block_mask is not None or arguments.score_mod is not None
    shared_bias = arguments.bias is not None and arguments.bias.ndim == 5
    if by_place or shared_bias or arguments.dropout_p:
        sharding_check.seed_of_all(arguments.dropout_p, arguments.seed)
        return [SAME] * mesh.ndim
    names = {0: BATCH, 2: HEADS}
    roles = []
    for dim in range(mesh.ndim):
        placed = [getattr(tensor.placements[dim], "dim", None) for tensor in qkv]
        roles.append(next((names[at] for at in placed if at in names), SAME))
    heads, heads_kv = qkv[0].shape[2], qkv[1].shape[2]
    parts = math.prod([mesh.size(dim) for dim, role in enumerate(roles) if role == HEADS])
    if heads % parts or (heads_kv % parts and heads_kv != 1):
        # A device would have half a group of queries.
        roles = [SAME if role == HEADS else role for role in roles]
    return roles


def _is_function(mask: Mask) -> bool:
    return '"custom"' in mask.token


def _of_mask(mask: Mask) -> list[tuple[Any, Dims]]:
    """The tensors of a mask, each with its dimensions."""
    return [(tensor, _dims(kind, tensor)) for kind, tensor in zip(_kinds(mask.token), mask.tensors, strict=True)]


def _kinds(token: str) -> list[str]:
    """For each tensor that a mask's token refers to, what it is."""
    return list(_walked(json.loads(token))) if token else []


# The compiler takes what it returns as constants (see `trace._constant_route`).
_kinds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _walked(expression: list[Any]) -> Iterator[str]:
    kind, *rest = expression
    if kind in ("and", "or"):
        for part in rest:
            yield from _walked(part)
    elif kind == "block":
        yield kind
        yield from _walked(rest[2])
    elif kind == "prefix" and rest[0] == -1:
        yield kind
    elif kind == "document":
        yield from (kind, kind)
    elif kind == "dense":
        yield kind
    elif kind == "custom":
        yield from [kind] * rest[1]


def _dims(kind: str, tensor: Tensor) -> Dims:
    """kind: an argument of `attention`, or what a tensor of a mask is."""
    if kind == "custom":
        return {}
    if kind == "sinks":
        return {HEADS: 0}
    if kind == "prefix":
        return {BATCH: 0}
    if kind == "alibi_slopes":
        return {BATCH: 0, HEADS: 1} if tensor.ndim == 2 else {HEADS: 0}
    if kind == "document":
        return {BATCH: 0} if tensor.ndim == 2 else {}
    # Tables that broadcast to (batch, heads, seqlen_q, seqlen_kv).
    places = {BATCH: tensor.ndim - 4, HEADS: tensor.ndim - 3}
    return {role: dim for role, dim in places.items() if dim >= 0 and tensor.shape[dim] > 1}


def _local(tensor: Any, dims: Dims, roles: Sequence[str], mesh: Any) -> Tensor:
    """This device's part. Gradients of what several parts share are added up."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not spread(tensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    kept: list[Any] = [Shard(dims[role]) if role in dims else Replicate() for role in roles]
    summed = [Partial() if role != SAME and role not in dims else kept[at] for at, role in enumerate(roles)]
    found: Tensor = tensor.redistribute(mesh, kept).to_local(grad_placements=summed)
    return found


def _whole(tensor: Tensor, dims: Dims, roles: Sequence[str], mesh: Any, shape: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(dims[role]) if role in dims else Replicate() for role in roles]
    sizes: Any = shape
    stride = tuple([math.prod(shape[dim + 1 :]) for dim in range(len(shape))])
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=sizes, stride=stride)
