"""A golden problem computed part by part in one process, as the ranks of a ring would: for backends without ranks."""

from typing import Any

import torch
from torch import Tensor

from flashtile import parts
from flashtile.distributed import balance
from flashtile.distributed.scheme import Running, call, rectangles, saved_of
from flashtile.parts import Grads, Wanted, Whole
from flashtile.request import Arguments, Packing, build
from flashtile.sums import Sums
from tests.problems import Call, Tensors

QKV = ("q", "k", "v")


def results(call_: Call, ranks: int, backend: str | None = None) -> Tensors:
    """out, lse and gradients of the call, as `oracle.ours` gives them."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call_.leaves.items()}
    arguments = Arguments(**{**call_.arguments(leaves), "return_lse": True, "backend": backend})
    packing: Any = {name: call_.packing().get(name) for name in Packing._fields} if call_.shape.packed else None
    inputs, options = build(*(leaves[name] for name in QKV), arguments, Packing(**packing) if packing else None)
    wanted = Wanted(*("bias" in leaves, "alibi_slopes" in leaves, "sinks" in leaves),
                    tuple(tensor.requires_grad for tensor in inputs.score))  # fmt: skip
    with torch.no_grad():
        shares = [
            [balance.own(leaves[name].detach(), "zigzag", rank, ranks, -3) for name in QKV] for rank in range(ranks)
        ]
        wholes = [
            parts.whole_of(inputs._replace(**dict(zip(QKV, share, strict=True))), options, ranks) for share in shares
        ]
        found = [_forward(wholes, rank) for rank in range(ranks)]
        grads = [_grads(call_, rank, ranks, found[rank]) for rank in range(ranks)]
        totals = wholes[0].totals(wanted)
        sums = [tuple(Sums(tensor) for tensor in whole.inputs[:3]) for whole in wholes]
        for rank in range(ranks):
            _backward(wholes, rank, found[rank], grads[rank], totals, sums)
        given = [
            balance.joined([sums[rank][place].result() for rank in range(ranks)], "zigzag", -3) for place in range(3)
        ]
        out = balance.joined([each[0] for each in found], "zigzag", -3)
        lse = balance.joined([each[1] for each in found], "zigzag", -1)
    if call_.shape.packed and ranks > 1:
        out, lse, *given = (tensor[0] for tensor in (out, lse, *given))
    named = dict(zip(QKV, given, strict=True)) | _others(leaves, inputs, totals)
    grown = {
        name: torch.zeros_like(leaf) if named.get(name) is None else named[name].to(leaf.dtype)
        for name, leaf in leaves.items()
    }
    return {"out": out, "lse": lse, **{f"d{name}": grad for name, grad in grown.items()}}


def _others(leaves: Tensors, inputs: Any, totals: Grads) -> dict[str, Any]:
    """The gradients of all but q, k and v, by name."""
    by_identity = {id(tensor): total for tensor, total in zip(inputs.score, totals.score, strict=True)}
    found: dict[str, Any] = {name: by_identity.get(id(leaf)) for name, leaf in leaves.items() if name not in QKV}
    return found | {name: getattr(totals, name) for name in ("bias", "alibi_slopes", "sinks") if name in leaves}


def _pieces(whole: Whole, rank: int, ranks: int, side: str) -> list[balance.Piece]:
    return balance.pieces("zigzag", rank, ranks, whole.seqlen_q if side == "q" else whole.seqlen_kv)


def _forward(wholes: list[Whole], rank: int) -> tuple[Tensor, Tensor]:
    whole, ranks = wholes[rank], len(wholes)
    running = Running(whole)
    for source in range(ranks):
        k, v = wholes[source].inputs.k, wholes[source].inputs.v
        for found in rectangles(whole, _pieces(whole, rank, ranks, "q"), _pieces(whole, source, ranks, "k")):
            running.add(found.rows, *parts.forward(call(whole, found, k, v)))
    return running.result()


def _grads(call_: Call, rank: int, ranks: int, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    out = balance.own(call_.grads["out"], "zigzag", rank, ranks, -3).to(saved[0].dtype)
    lse = balance.own(call_.grads["lse"], "zigzag", rank, ranks, -1) if "lse" in call_.grads else None
    if out.ndim < saved[0].ndim:
        return out[None], None if lse is None else lse[None].to(saved[1].dtype)
    return out, None if lse is None else lse.to(saved[1].dtype)


def _backward(
    wholes: list[Whole],
    rank: int,
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    totals: Grads,
    sums: list[tuple[Sums, ...]],
) -> None:
    whole, ranks = wholes[rank], len(wholes)
    for source in range(ranks):
        k, v = wholes[source].inputs.k, wholes[source].inputs.v
        for found in rectangles(whole, _pieces(whole, rank, ranks, "q"), _pieces(whole, source, ranks, "k")):
            dq, dk, dv = parts.backward(call(whole, found, k, v), *saved_of(found, saved, grads), totals)
            sums[rank][0].add(found.rows, dq)
            sums[source][1].add(found.keys, dk)
            sums[source][2].add(found.keys, dv)
    parts.sinks_backward(whole, saved, grads, totals)
