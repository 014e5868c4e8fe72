"""Ulysses: heads are dealt out, so that every rank attends over all tokens with some of them (Jacobs et al. 2023).

One all-to-all turns (tokens of a rank, all heads) into (all tokens, heads of a rank), another turns the result back.
Where there are fewer key/value heads than ranks, or they do not divide evenly, a rank gets a copy of each head that its
query heads read, and the copies' gradients are added up. Both ways are differentiable, so what autograd keeps is the
dealt tensors: the backward pass exchanges gradients alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile.check import sharding as check
from flashtile.distributed import balance
from flashtile.distributed.groups import Agreement, Borrowed, as_bytes, living, name_of


@dataclass(frozen=True, eq=False)
class Dealer:
    """Deals heads out over a group whose ranks hold tokens in a layout."""

    name: str
    group: Borrowed
    ranks: int
    layout: str
    agreement: Agreement

    def heads_kv_of(self, heads: int, heads_kv: int) -> list[int]:
        """Which key/value heads each rank gets, as many for all: rank after rank."""
        each, group = heads // self.ranks, heads // heads_kv
        lists = [
            list(dict.fromkeys(head // group for head in range(rank * each, (rank + 1) * each)))
            for rank in range(self.ranks)
        ]
        if each % group and group % each:
            # Some ranks' query heads read one head more often than another: each gets its own copy.
            lists = [[head // group for head in range(rank * each, (rank + 1) * each)] for rank in range(self.ranks)]
        return [head for held in lists for head in held]

    def deal(self, tensors: Sequence[Tensor], picked: Sequence[list[int] | None]) -> list[Tensor]:
        """(batch, tokens of a rank, heads, d) -> (batch, all tokens, heads of a rank, d), in the sequence's order.

        picked: the heads that the ranks get, rank after rank; None: every head once.
        """
        chosen = [
            tensor if heads is None or heads == list(range(tensor.shape[-2])) else _pick(tensor, heads)
            for tensor, heads in zip(tensors, picked, strict=True)
        ]
        ranks = self.ranks
        leaving = [tensor.unflatten(-2, (ranks, -1)).movedim(-3, 0) for tensor in chosen]
        return [self._in_order(tensor) for tensor in self._exchange(leaving)]

    def collect(
        self, tensors: Sequence[Tensor], picked: Sequence[list[int] | None], heads: Sequence[int]
    ) -> list[Tensor]:
        """The way back, and the derivative: copies of a head are added up."""
        found = []
        arrived = self._exchange([self._by_rank(tensor) for tensor in tensors])
        for tensor, chosen, count in zip(arrived, picked, heads, strict=True):
            together = tensor.movedim(0, -3).flatten(-3, -2)
            found.append(_add_up(together, chosen, count))
        return found

    def _exchange(self, leaving: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (ranks, ...), whose entry r goes to rank r, in one message a pair of ranks."""
        ranks = self.ranks
        flat = torch.cat([as_bytes(tensor.contiguous()).view(ranks, -1) for tensor in leaving], 1)
        arrived = torch.empty_like(flat)
        dist.all_to_all_single(arrived, flat, group=living(self.group))
        sizes = [prod(tensor.shape[1:]) * tensor.element_size() for tensor in leaving]
        return [
            part.contiguous().view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(arrived.split(sizes, 1), leaving, strict=True)
        ]

    def _in_order(self, tensor: Tensor) -> Tensor:
        """(ranks, ..., tokens of a rank, heads, d) -> (..., all tokens, heads, d)."""
        if self.layout != "zigzag" or self.ranks == 1:
            return tensor.movedim(0, -4).flatten(-4, -3)
        early, late = tensor.unflatten(-3, (2, -1)).unbind(-4)
        return torch.cat((early, late.flip(0))).movedim(0, -4).flatten(-4, -3)

    def _by_rank(self, tensor: Tensor) -> Tensor:
        """The inverse."""
        if self.layout != "zigzag" or self.ranks == 1:
            return tensor.unflatten(-3, (self.ranks, -1)).movedim(-4, 0)
        early, late = tensor.unflatten(-3, (2 * self.ranks, -1)).movedim(-4, 0).chunk(2)
        return torch.stack((early, late.flip(0)), -4).flatten(-4, -3)

    def agree(self, call: str, **tensors: Tensor) -> None:
        """On the tensors that are exchanged.

        Raises:
            RanksDisagree: on every rank.
        """
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors.values())
        fields = {name: f"{tuple(each.shape)} {str(each.dtype)[6:]}" for name, each in tensors.items()}
        self.agreement.ask((call, shapes), lambda: {"call": call} | fields).settle()

    def check(self, q: Tensor, k: Tensor) -> None:
        check.heads_over_ranks(q.shape[-2], self.ranks)
        count = len(balance.chunks(self.layout, 0, self.ranks))
        for what, tensor in (("q", q), ("k", k)):
            check.divisible(f"{what}: tokens of a rank", tensor.shape[-3], count, self.layout)


def _pick(tensor: Tensor, heads: list[int]) -> Tensor:
    return tensor.index_select(-2, torch.tensor(heads, device=tensor.device))


def _add_up(tensor: Tensor, chosen: list[int] | None, count: int) -> Tensor:
    """(..., copies, d) -> (..., heads, d): copies of a head are neighbours, and are added in float32."""
    if chosen is None or chosen == list(range(count)):
        return tensor
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    total = torch.zeros(*tensor.shape[:-2], count, tensor.shape[-1], dtype=wide, device=tensor.device)
    for place, head in enumerate(chosen):
        total[..., head, :] += tensor[..., place, :]
    return total.to(tensor.dtype)


_dealers: dict[str, Dealer] = {}


def dealer_of(group: dist.ProcessGroup, layout: str) -> Dealer:
    """The one for a group and layout."""
    name, borrowed = f"{layout}/{name_of(group)}", Borrowed(group)
    known = _dealers.get(name)
    if known is None or known.group != borrowed:
        known = _dealers[name] = Dealer(name, borrowed, group.size(), layout, Agreement([group]))
    return known


_QKV = "Tensor q, Tensor k, Tensor v"


def _picks(dealer: Dealer, heads: int, heads_kv: int) -> list[list[int] | None]:
    held = dealer.heads_kv_of(heads, heads_kv)
    return [None, held, held]


def _deal(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    dealer = _dealers[name]
    dealer.agree(f"{dealer.layout} heads forward", q=q, k=k, v=v)
    found = dealer.deal((q, k, v), _picks(dealer, q.shape[-2], k.shape[-2]))
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


def _undeal(q: Tensor, k: Tensor, v: Tensor, name: str, heads: int, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    dealer = _dealers[name]
    found = dealer.collect((q, k, v), _picks(dealer, heads, heads_kv), (heads, heads_kv, heads_kv))
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


def _collect(out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """lse (..., heads, tokens) travels as (..., tokens, heads, 1)."""
    dealer = _dealers[name]
    heads = out.shape[-2] * dealer.ranks
    column = lse.transpose(-1, -2).unsqueeze(-1)
    found = dealer.collect((out, column), (None, None), (heads, heads))
    return found[0].contiguous(), found[1].squeeze(-1).transpose(-1, -2).contiguous()


def _uncollect(out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    dealer = _dealers[name]
    dealer.agree(f"{dealer.layout} heads backward", out=out)
    found = dealer.deal((out, lse.transpose(-1, -2).unsqueeze(-1)), (None, None))
    return found[0].contiguous(), found[1].squeeze(-1).transpose(-1, -2).contiguous()


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rest = (name, q.shape[-2], k.shape[-2])
        return _deal(q, k, v, name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (*_undeal(*(*grads, *ctx.rest)), None)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
        ctx.name = name
        return _collect(out, lse, name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (*_uncollect(*(*grads, ctx.name)), None)


deal_operator = torch.library.custom_op(
    "flashtile::deal_heads", _deal, mutates_args=(), schema=f"({_QKV}, str name) -> (Tensor, Tensor, Tensor)"
)
undeal_operator = torch.library.custom_op(
    "flashtile::undeal_heads",
    _undeal,
    mutates_args=(),
    schema=f"({_QKV}, str name, SymInt heads, SymInt heads_kv) -> (Tensor, Tensor, Tensor)",
)
collect_operator = torch.library.custom_op(
    "flashtile::collect_heads",
    _collect,
    mutates_args=(),
    schema="(Tensor out, Tensor lse, str name) -> (Tensor, Tensor)",
)
uncollect_operator = torch.library.custom_op(
    "flashtile::uncollect_heads",
    _uncollect,
    mutates_args=(),
    schema="(Tensor out, Tensor lse, str name) -> (Tensor, Tensor)",
)


def _like(tensor: Tensor, tokens: int, heads: int) -> Tensor:
    return tensor.new_empty((*tensor.shape[:-3], tokens, heads, tensor.shape[-1]))


@deal_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, ...]:
    dealer = _dealers[name]
    ranks, held = dealer.ranks, len(dealer.heads_kv_of(q.shape[-2], k.shape[-2])) // dealer.ranks
    counts = (q.shape[-2] // ranks, held, held)
    return tuple(_like(each, each.shape[-3] * ranks, count) for each, count in zip((q, k, v), counts, strict=True))


@undeal_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str, heads: int, heads_kv: int) -> tuple[Tensor, ...]:
    ranks, counts = _dealers[name].ranks, (heads, heads_kv, heads_kv)
    return tuple(_like(each, each.shape[-3] // ranks, count) for each, count in zip((q, k, v), counts, strict=True))


@collect_operator.register_fake
def _(out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    ranks = _dealers[name].ranks
    *batch, heads, tokens = lse.shape
    return _like(out, tokens // ranks, heads * ranks), lse.new_empty((*batch, heads * ranks, tokens // ranks))


@uncollect_operator.register_fake
def _(out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    ranks = _dealers[name].ranks
    *batch, heads, tokens = lse.shape
    return _like(out, tokens * ranks, heads // ranks), lse.new_empty((*batch, heads // ranks, tokens * ranks))


def _keep_deal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, _, name = inputs
    ctx.rest = (name, q.shape[-2], k.shape[-2])


def _keep_collect(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.name = inputs[2]


deal_operator.register_autograd(
    lambda ctx, *grads: (*undeal_operator(*grads, *ctx.rest), None), setup_context=_keep_deal
)
collect_operator.register_autograd(
    lambda ctx, *grads: (*uncollect_operator(*grads, ctx.name), None), setup_context=_keep_collect
)


def deal(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with all tokens of this rank's heads, differentiable; `name`: of a Dealer."""
    if torch.compiler.is_compiling():
        return deal_operator(q, k, v, name)
    return _Deal.apply(q, k, v, name)


def collect(out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(out, lse) with all heads of this rank's tokens, differentiable."""
    if torch.compiler.is_compiling():
        return collect_operator(out, lse, name)
    return _Collect.apply(out, lse, name)
