"""States: an attention result and its log-sum-exp, which together merge associatively.

Attention over a set of keys is fully described by (out, lse). Attention over the union of two disjoint sets is the
average of the two outputs weighted by exp(lse) (FlashAttention, Dao et al. 2022, section 3.1; "attention states" in
FlashInfer, Ye et al. 2024, section 2.2). Split-KV, shared prefixes and rings are this one operation.

At the API, log-sum-exps are natural logarithms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import check


class State(NamedTuple):
    """`out` (batch, seqlen_q, heads, headdim_v) and `lse` (batch, heads, seqlen_q), float32, natural logarithm.

    For packed sequences `out` is (total_q, heads, headdim_v) and `lse` (heads, total_q). A query that sees no key has
    out 0 and lse -inf, the neutral element of `merge`.
    """

    out: Tensor
    lse: Tensor


def empty(like: State) -> State:
    """The neutral element of `merge`, shaped like `like`: out 0, lse -inf."""
    return State(torch.zeros_like(like.out), torch.full_like(like.lse, -torch.inf))


def merge(states: Sequence[State | tuple[Tensor, Tensor]]) -> State:
    """Attention over the union of disjoint key sets, from the State over each.

    out = sum_i w_i out_i with w_i = exp(lse_i - lse), lse = log sum_i exp(lse_i). Stable for any gap between the
    log-sum-exps and for -inf, associative and commutative, differentiable in every out_i and lse_i.

    Args:
        states: one or more (out, lse) pairs, all of one shape: out (batch, seqlen_q, heads, headdim_v) with lse
            (batch, heads, seqlen_q), or packed out (total_q, heads, headdim_v) with lse (heads, total_q).

    Returns:
        State: out in the dtype of the first state's out (weights are float32), lse float32.

    Raises:
        ValueError: `states` is empty, or shapes or devices do not agree.
        TypeError: `states` is no list, or a state is not a pair of floating-point tensors.

    A sink (see `attention`) is part of the lse it was given to: give it to one of the states only.
    """
    check.states(states)
    lses = torch.stack([lse for _, lse in states])
    outs = torch.stack([out.to(lses.dtype) for out, _ in states])
    highest = lses.detach().amax(dim=0)
    # Rows that no state sees: subtract 0 rather than -inf, so that exp(-inf - 0) = 0 and no NaN appears.
    base = torch.where(highest == -torch.inf, 0.0, highest)
    weights = torch.exp(lses - base)
    total = weights.sum(dim=0)
    seen = total != 0
    divisor = torch.where(seen, total, 1.0)
    share = (weights / divisor).transpose(-1, -2).unsqueeze(-1)
    lse = torch.where(seen, base + torch.log(divisor), -torch.inf)
    return State((share * outs).sum(dim=0).to(states[0][0].dtype), lse)


def combine(outputs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> State:
    """`merge` of parts given as two lists, or as two tensors stacked along a first dimension.

    A shared prefix (cascade, Ye et al. 2024, section 3.1.2) is attended to once, by the queries of all sequences that
    share it as one batch entry; this joins the result with that of each sequence's own keys.

    Args:
        outputs: (batch, seqlen_q, heads, headdim_v) each; lses: (batch, heads, seqlen_q) each, as many.

    Returns:
        State: as `merge` does.

    Raises:
        TypeError, ValueError: as `merge` does, and where there are not as many of both.
    """
    check.combined(outputs, lses)
    return merge([*zip(outputs, lses, strict=True)])
