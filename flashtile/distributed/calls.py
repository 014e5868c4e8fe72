"""The public calls: attention whose sequence is shared by the processes of a group."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import parts, sharding
from flashtile.check import qkv, tensors
from flashtile.check import sharding as check
from flashtile.distributed import ulysses
from flashtile.distributed.gather import Gather
from flashtile.distributed.groups import Agreement, Borrowed, group_of, groups_of, name_of
from flashtile.distributed.ring import Ring
from flashtile.distributed.scheme import Scheme
from flashtile.parts import Arguments, Packing
from flashtile.state import State

_PACKING = Packing._fields
_schemes: dict[str, Scheme] = {}


def names_of(mesh: Any, scheme: str, layout: str) -> tuple[str, str | None]:
    """(name of the scheme that the operators run, name of the Dealer of heads around it or None)."""
    check.scheme(scheme)
    check.layout(layout)
    if scheme == "mixed":
        ring, heads = groups_of(mesh)
        return _named(Ring, ring, heads, layout), ulysses.dealer_of(heads, "contiguous").name
    group = group_of(mesh)
    if scheme == "ulysses":
        return _named(Ring, None, group, layout), ulysses.dealer_of(group, layout).name
    return _named(Ring if scheme == "ring" else Gather, group, None, layout), None


# The compiler takes the names as constants; groups are known before it runs.
names_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _named(kind: type[Scheme], tokens: dist.ProcessGroup | None, heads: dist.ProcessGroup | None, layout: str) -> str:
    groups = [tokens, heads]
    name = "/".join((kind.__name__, layout, *("-" if group is None else name_of(group) for group in groups)))
    known = _schemes.get(name)
    if known is None or known.borrowed != [Borrowed(group) for group in groups if group is not None]:
        known = _schemes[name] = kind(tokens, heads, layout)
        sharding.register(name, known)
    return name


def run(
    q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: Packing | None, names: tuple[str, str | None]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's tokens."""
    check.unrounded(q, k, v)
    name, dealer = names
    arguments = arguments._replace(sharding=name)
    if dealer is None:
        out, lse = parts.attention(q, k, v, arguments, packing)
        return out, lse
    if not torch.compiler.is_compiling():
        _check_dealt(q, k, v, packing, dealer)
    dealt = ulysses.deal(q, k, v, dealer)
    out, lse = parts.attention(*dealt, arguments, packing)
    return ulysses.collect(out, lse, dealer)


def _check_dealt(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, name: str) -> None:
    """Before anything is sent; the other ranks are told."""
    dealer = ulysses._dealers[name]
    try:
        tensors(q, k, v)
        qkv(q, k, v, varlen=packing is not None)
        dealer.check(q, k)
    except (TypeError, ValueError) as error:
        dealer.agreement.failed(error)
        raise


def agreement_of(names: tuple[str, str | None]) -> Agreement:
    """Between all processes of a call."""
    return _schemes[names[0]].agreement


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: Any = None,
    *,
    scheme: str = "ring",
    layout: str = "zigzag",
    **options: Any,
) -> Any:
    """`flashtile.attention` over a sequence whose tokens lie on several processes; all of them make the same call.

    q, k and v are this process's tokens (see `shard`); everything else is said as to one process that held them all:
    lengths, masks, tables, ids, slopes and captured tensors are those of the whole sequence and of all heads.
    Dropout drops what one process would drop. Gradients of q, k and v are this process's; those of other tensors are
    its share, as for any parameter of a model whose tokens are dealt out: their sum over the processes is the whole.

    Args:
        q: (batch, tokens, heads, headdim), this process's tokens; k, v likewise. DTensors sharded along the sequence
            are taken too, and returned. With cu_seqlens_q and cu_seqlens_k, packed: (tokens, heads, headdim).
        mesh: a ProcessGroup, a DeviceMesh of one dimension, or None: all processes. For "mixed", a DeviceMesh of two
            dimensions, or a pair of groups: ring, then heads.
        scheme: "ring": keys and values travel, any number of heads; "ulysses": heads are dealt out, which the number of
            ranks must divide; "gather": all keys on all ranks; "mixed": a ring whose every place is a group of ranks
            that share out heads.
        layout: "zigzag" (default; balances causal work) or "contiguous", as given to `shard`.
        **options: those of `flashtile.attention`; for packed tokens also those of `flashtile.attention_varlen`, the
            offsets being those of the whole packing.

    Returns:
        out, with return_lse State(out, lse), of this process's queries, as `flashtile.attention` describes them.

    Raises:
        TypeError, ValueError: an argument is not as described. Where the processes' calls differ, or one of them
            refuses its own, all raise; this is compared at the first call of a kind.
        NotImplementedError: packed dropout on a ring, or no backend takes a part.
    """
    unknown = [name for name in options if name not in (*Arguments._fields, *_PACKING) or name == "sharding"]
    check.no_options(unknown)
    packing = _packing(options)
    arguments = Arguments(**{name: value for name, value in options.items() if name not in _PACKING})
    if _is_distributed(q) or _is_distributed(k) or _is_distributed(v):
        return _on_dtensors((q, k, v), mesh, scheme, layout, arguments, packing)
    out, lse = run(q, k, v, arguments, packing, names_of(mesh, scheme, layout))
    return State(out, lse) if arguments.return_lse else out


def _packing(options: dict[str, Any]) -> Packing | None:
    given: dict[str, Any] = {name: options.get(name) for name in _PACKING}
    parts.packing_complete(given)
    return Packing(**given) if given["cu_seqlens_q"] is not None else None


def _is_distributed(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def _on_dtensors(
    qkv: Sequence[Any], mesh: Any, scheme: str, layout: str, arguments: Arguments, packing: Packing | None
) -> Any:
    """The same on DTensors that are sharded along the sequence."""
    from torch.distributed.tensor import DTensor, Shard

    check.all_distributed([_is_distributed(tensor) for tensor in qkv])
    dim = 0 if packing is not None else 1
    for name, tensor in zip("qkv", qkv, strict=True):
        check.sequence_sharded(name, tensor.placements, dim)
    mesh = qkv[0].device_mesh if mesh is None else mesh
    local = [tensor.to_local() for tensor in qkv]
    out, lse = run(local[0], local[1], local[2], arguments, packing, names_of(mesh, scheme, layout))
    device_mesh, count = qkv[0].device_mesh, len(qkv[0].placements)
    whole = DTensor.from_local(out, device_mesh, [Shard(dim)] * count)
    if not arguments.return_lse:
        return whole
    return State(whole, DTensor.from_local(lse, device_mesh, [Shard(lse.ndim - 1)] * count))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mesh: Any = None, *, layout: str = "zigzag", **options: Any) -> Any:
    """`attention` with the scheme "ring": any number of heads and ranks, least memory."""
    return attention(q, k, v, mesh, scheme="ring", layout=layout, **options)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, mesh: Any = None, *, layout: str = "zigzag", **options: Any
) -> Any:
    """`attention` with the scheme "ulysses": the number of ranks divides the query heads."""
    return attention(q, k, v, mesh, scheme="ulysses", layout=layout, **options)


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, mesh: Any = None, *, layout: str = "zigzag", **options: Any
) -> Any:
    """`attention` with the scheme "gather": fewest messages, the keys of all ranks in memory."""
    return attention(q, k, v, mesh, scheme="gather", layout=layout, **options)


def mixed_attention(q: Tensor, k: Tensor, v: Tensor, mesh: Any, *, layout: str = "zigzag", **options: Any) -> Any:
    """`attention` with the scheme "mixed": a mesh (ring, heads), the first across nodes, the second within."""
    return attention(q, k, v, mesh, scheme="mixed", layout=layout, **options)
