"""Sequences that several processes share: groups, layouts, lengths, and what the processes must agree on."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from flashtile.scaled import Scaled

LAYOUTS = ("zigzag", "contiguous")
SCHEMES = ("ring", "ulysses", "gather", "mixed")


class RanksDisagree(ValueError):
    """The processes of a group made different calls; raised on every one of them."""


def known_sharding(name: str, known: Container[str]) -> None:
    if name not in known:
        raise ValueError(
            f"sharding: got {name!r}, need one that this process has made; try calling flashtile.distributed's "
            "functions, or context_parallel, with the groups of this process first"
        )


def layout(value: Any) -> None:
    if value not in LAYOUTS:
        raise ValueError(f"layout: got {value!r}, need 'zigzag' (default: causal work is balanced) or 'contiguous'")


def scheme(value: Any) -> None:
    if value not in SCHEMES:
        raise ValueError(f"scheme: got {value!r}, need one of {', '.join(map(repr, SCHEMES))}")


def initialized(ready: bool) -> None:
    if not ready:
        raise ValueError(
            "group: got no process group, need one; try torch.distributed.init_process_group, and run under torchrun"
        )


def member(rank: int) -> None:
    if rank < 0:
        raise ValueError("group: got one that this process is not part of, need one that it is; try its own group")


def group_destroyed() -> NoReturn:
    raise ValueError(
        "group: got one that is no more, need it as long as calls use it; try destroy_process_group after the last "
        "backward pass"
    )


def group_kind(value: Any) -> NoReturn:
    raise TypeError(
        f"group: got {type(value).__name__}, need a torch ProcessGroup, a DeviceMesh or None (all processes)"
    )


def mesh_dimensions(found: int, needed: int, scheme: str) -> None:
    if found != needed:
        way = "mesh['name'] for one of its dimensions" if needed == 1 else "a mesh ('ring', 'heads') of two dimensions"
        raise ValueError(f"group: got a mesh of {found} dimensions, need {needed} for the scheme {scheme!r}; try {way}")


def divisible(what: str, length: int, parts: int, layout: str) -> None:
    """`what`: a sequence to be cut into equal parts."""
    if length % parts:
        raise ValueError(
            f"{what}: got {length}, need a multiple of {parts} for the layout {layout!r}; try padding to "
            f"{-(-length // parts) * parts} and mask=masks.prefix({length})"
        )


def dimension(dim: Any, ndim: int) -> None:
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise ValueError(f"dim: got {dim!r}, need the place of the sequence among {ndim} dimensions; try 1")


def heads_over_ranks(heads: int, ranks: int) -> None:
    if heads % ranks:
        raise ValueError(
            f"q: got {heads} heads for {ranks} ranks, need a multiple: each rank takes as many heads; try "
            "ring_attention, or mixed_attention over fewer ranks for heads"
        )


def no_packed_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(
            "dropout_p: got one beside cu_seqlens_q on a ring, need 0: a rank meets parts of sequences, whose bits no "
            "kernel counts; try ulysses_attention"
        )


def no_options(names: Sequence[str]) -> None:
    if names:
        raise TypeError(f"options: got {names[0]!r}, need keyword arguments of flashtile.attention; try leaving it out")


def sequence_sharded(name: str, placements: Sequence[Any], dim: int) -> None:
    """A DTensor must be sharded along the sequence in every dimension of its mesh."""
    if any(getattr(placement, "dim", None) != dim for placement in placements):
        raise ValueError(
            f"{name}: got a DTensor with placements {tuple(placements)}, need Shard({dim}), the sequence, in all of "
            f"them; try {name}.redistribute(placements=[Shard({dim})])"
        )


def all_distributed(distributed: Sequence[bool]) -> None:
    if any(distributed) and not all(distributed):
        raise TypeError(
            "q, k, v: got DTensors and plain tensors, need all of one kind; try .to_local() on the DTensors"
        )


def unrounded(q: Any, k: Any, v: Any) -> None:
    """Parts of a sequence begin anywhere in the blocks of rows that share a scale."""
    for name, value in zip("qkv", (q, k, v), strict=True):
        if isinstance(value, Scaled):
            raise NotImplementedError(
                f"{name}: got flashtile.fp8.Scaled, need a tensor where processes share a sequence; try the one that "
                "was rounded"
            )


def dtensors(distributed: Sequence[bool], packed: bool) -> None:
    """`distributed`: which of q, k and v are DTensors."""
    all_distributed(distributed)
    if packed:
        raise NotImplementedError(
            "q: got a DTensor beside cu_seqlens_q, need plain tensors: sequences of different lengths have no batch "
            "to shard; try flashtile.distributed, or .to_local()"
        )


def seed_of_all(dropout_p: float, seed: Any) -> None:
    """What every device of a mesh computes alike must be drawn alike."""
    if dropout_p and seed is None:
        raise ValueError(
            "seed: got None beside dropout on DTensors, need one number that is the same on every device; try seed=0"
        )


def buffers(given: Sequence[Any], dims: Sequence[int]) -> None:
    """Tensors that a context shards, one dimension each."""
    if len(given) != len(dims):
        raise ValueError(
            f"buffer_seq_dims: got {len(dims)} numbers for {len(given)} buffers, need one a buffer; try "
            "[1] * len(buffers)"
        )
    for index, value in enumerate(given):
        if not isinstance(value, Tensor):
            raise TypeError(f"buffers: got {type(value).__name__} at place {index}, need tensors")


def inside_context() -> NoReturn:
    raise ValueError("context_parallel: got one inside of another, need one at a time; try leaving the outer one first")


def ranks_disagree(statements: Mapping[int, Mapping[str, str]]) -> NoReturn:
    """`statements`: by rank, what its call was, field by field; those that differ and that all calls have are named."""
    names = list(dict.fromkeys(name for fields in statements.values() for name in fields))
    lines = []
    for name in names:
        values = [fields.get(name) for fields in statements.values()]
        if None not in values and len(set(values)) > 1:
            said = ", ".join(f"{value} on rank {rank}" for rank, value in zip(statements, values, strict=True))
            lines.append(f"{name}: got {said}")
    raise RanksDisagree(
        "; ".join(lines) + "; need the same on every rank; try giving all ranks equal shares and equal options"
    )
