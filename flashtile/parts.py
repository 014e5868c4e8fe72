"""Attention part by part: some queries against some keys of a call, given the whole call's tables and, on the way back,
its (out, lse).

With the whole's log-sum-exp a part's weights exp(score - lse) are the whole's, so the gradients of a part are exact by
themselves and only need to be added up. `flashtile.distributed` runs on this; it is written for nobody's kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashtile import autograd, check, cut, recall, scores
from flashtile.backends import Gradients
from flashtile.check import packing_complete
from flashtile.check import sharding as check_sharding
from flashtile.contents import fingerprint
from flashtile.cut import Part, Tables
from flashtile.forgetting import Made, remembered
from flashtile.masks import Mask
from flashtile.problem import Inputs, Options, Wanted, describe
from flashtile.recall import attention
from flashtile.request import Arguments, Packing
from flashtile.scores import Grads

_calls: dict[Any, autograd.Call] = {}
_made: Made = {}
_KEPT = 4096

__all__ = [
    "Arguments",
    "Gradients",
    "Grads",
    "Inputs",
    "Local",
    "Options",
    "Packing",
    "Part",
    "Wanted",
    "Whole",
    "attention",
    "fingerprint",
    "packing_complete",
]


@dataclass(frozen=True, eq=False)
class Whole:
    """A call as all processes make it together: every tensor describes the whole but q, k and v, this process's own.

    Packed sequences that are cut into parts are a batch of one, with `tables` (None: as documents, or not packed).
    head: the first of this process's query heads among `heads_of_all`. memory: what was found out about the call.
    """

    inputs: Inputs
    options: Options
    seqlen_q: int
    seqlen_kv: int
    tables: Tables | None = None
    head: int = 0
    heads_of_all: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def placeless(self) -> bool:
        """Whether scores depend on positions through the mask alone."""
        inputs = self.inputs
        modified = inputs.bias is not None or inputs.alibi_slopes is not None or bool(self.options.score_mod)
        return not modified and inputs.seed is None and self.tables is None

    def part(self, query: int, queries: int, key: int, keys: int) -> Part:
        """The rectangle of the whole that begins there, of this process's heads."""
        return Part(query, queries, key, keys, self.seqlen_q, self.seqlen_kv, *self.heads)

    @property
    def heads(self) -> tuple[int, int | None]:
        """(first, count) of this process's query heads; the count is None where they are all."""
        count = self.inputs.q.shape[-2]
        return self.head, None if self.heads_of_all == count else count

    def of_heads(self, heads: slice) -> "Whole":
        """The same call of some of this process's key/value heads, and of the query heads that read them."""
        inputs = self.inputs
        group = inputs.q.shape[-2] // inputs.k.shape[-2]
        queries = slice(group * heads.start, group * heads.stop)
        some = inputs._replace(q=inputs.q[..., queries, :], k=inputs.k[..., heads, :], v=inputs.v[..., heads, :])
        # Where parts lie is found out once, unless the mask differs among heads.
        memory = self.memory if cut.same_for_all_heads(self.options.mask) else {}
        return replace(self, inputs=some, head=self.head + queries.start, memory=memory)

    def totals(self, wanted: Wanted) -> Grads:
        """Zeros for the gradients of all but q, k and v, in the shapes of the whole."""
        return scores.zero_grads(self.inputs, describe(self.inputs, self.options, True, wanted))


def whole_of(inputs: Inputs, options: Options, ranks: int, head: int = 0, heads_of_all: int | None = None) -> Whole:
    """The call that `ranks` processes make together, each with an equal share of the sequences."""
    heads_of_all = heads_of_all or inputs.q.shape[-2]
    options = replace(options, sharding="")
    lengths = (inputs.q.shape[-3] * ranks, inputs.k.shape[-3] * ranks)
    if inputs.cu_seqlens_q is None or ranks == 1:
        return Whole(inputs, options, *lengths, None, head, heads_of_all)
    check_sharding.no_packed_dropout(options.dropout_p)
    where = _tables(inputs, lengths)
    dense = inputs._replace(
        q=inputs.q[None],
        k=inputs.k[None],
        v=inputs.v[None],
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
    )
    options = replace(options, max_seqlen_q=None, max_seqlen_k=None)
    whole = Whole(dense, options, *lengths, None, head, heads_of_all)
    if whole.placeless and _same_sequences(inputs) and cut.windows_only(options.mask):
        # Both sides packed alike: a window within a sequence is that window among all tokens.
        documents = Mask('["document"]', (where.sequence_q, where.sequence_k)) & Mask(options.mask)
        return replace(
            whole, inputs=dense._replace(mask=documents.tensors), options=replace(options, mask=documents.token)
        )
    return replace(whole, tables=where)


def _tables(inputs: Inputs, lengths: tuple[int, int]) -> Tables:
    queries: Any = inputs.cu_seqlens_q
    keys: Any = inputs.cu_seqlens_k
    used = (inputs.seqused_q, inputs.seqused_k)
    tensors = [tensor for tensor in (queries, keys, *used) if tensor is not None]
    what = ("tables", lengths, tuple(tensor is None for tensor in used))
    return remembered(_made, what, tensors, lambda: cut.tables(queries, keys, used, lengths), _KEPT)


def _same_sequences(inputs: Inputs) -> bool:
    if inputs.seqused_q is not None or inputs.seqused_k is not None:
        return False
    queries, keys = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    if queries is None or keys is None or queries.is_cuda:
        return queries is keys
    return torch.equal(queries, keys)


def checked(whole: Whole, ranks: int) -> None:
    """Raises where the tables do not fit the whole's sizes; reads them, so once a kind of call."""
    if whole.tables is None and whole.inputs.cu_seqlens_q is None:
        problem = describe(whole.inputs, whole.options)
        lengths = whole.seqlen_q, whole.seqlen_kv
        check.mask(
            whole.inputs,
            replace(problem, seqlen_q=lengths[0], seqlen_kv=lengths[1], heads=whole.heads_of_all),
        )


@dataclass(frozen=True, eq=False)
class Local:
    """A part as a call of its own, and where the gradients of its tensors belong in the whole's.

    bias, slopes: slices of the whole's, for tensors that are slices of it; score: for each tensor that the score
    function reads ("bias", 0), ("slopes", 0), ("score", place) or None.
    """

    inputs: Inputs
    options: Options
    bias: tuple[slice, ...]
    slopes: slice
    score: tuple[tuple[str, int] | None, ...]


def mask_of(whole: Whole, part: Part) -> Mask | None:
    """The mask of a part, None: nothing of it is visible; one object as long as the whole mask's tensors are the same,
    so that what kernels derive from it is kept too."""
    given, device, tables = Mask(whole.options.mask, whole.inputs.mask), whole.inputs.q.device, whole.tables
    if cut.same_for_all_heads(given.token):
        part = replace(part, head=0, heads=None)
    what = ("mask" if tables is None else "packed", given.token, part, device)
    if tables is None:
        return remembered(_made, what, given.tensors, lambda: cut.mask(given, part, device), _KEPT)
    tensors = (*given.tensors, *vars(tables).values())
    return remembered(_made, what, tensors, lambda: cut.packed_mask(given, tables, part, device), _KEPT)


def local(whole: Whole, part: Part, mask: Mask, qkv: Sequence[Tensor]) -> Local:
    """The part, whose mask is `mask`, over these slices of q, k and v and of the call's own heads. Without sinks: those
    belong to no part."""
    inputs, options, device = whole.inputs, whole.options, whole.inputs.q.device
    if (part.head, part.heads) != whole.heads:
        part = replace(part, head=whole.heads[0], heads=whole.heads[1])
    bias, slopes, score = inputs.bias, inputs.alibi_slopes, inputs.score
    heads = slice(None) if part.heads is None else slice(part.head, part.head + part.heads)
    key, alignment = options.score_mod, _alignment(part, options.alignment)
    sources: dict[int, tuple[str, int]] = {id(tensor): ("score", place) for place, tensor in enumerate(score)}
    if whole.tables is not None:
        sources |= {
            id(tensor): (name, 0) for name, tensor in (("bias", bias), ("slopes", slopes)) if tensor is not None
        }
        if bias is not None or slopes is not None or key:
            given = (key, score, bias, slopes, options.alignment, whole.tables, part, device)
            key, score = cut.packed_score(*given)
        bias = slopes = None
    elif slopes is not None and alignment is None:
        sources[id(slopes)] = ("slopes", 0)
        key, score = cut.score(key, score, slopes, options.alignment, part, device)
        slopes = None
    elif key and (part.query, part.key, part.head) != (0, 0, 0):
        key, score = cut.score(key, score, None, options.alignment, part, device)
    q, k, v = qkv
    here = inputs._replace(
        q=q,
        k=k,
        v=v,
        bias=None if bias is None else cut.sliced(bias, part),
        alibi_slopes=None if slopes is None else slopes[..., heads],
        sinks=None,
        seed=None if inputs.seed is None else _counted_from(inputs.seed, part),
        mask=mask.tensors,
        score=tuple(score),
    )
    changed = replace(options, mask=mask.token, score_mod=key, alignment=alignment or options.alignment)
    where = () if bias is None else cut.table_slices(bias, part)
    return Local(here, changed, where, heads, tuple(sources.get(id(tensor)) for tensor in score))


def _alignment(part: Part, alignment: str) -> str | None:
    """The alignment that puts a part's own diagonal where the whole's is; None: neither does."""
    diagonal = part.diagonal(alignment)
    if diagonal == part.keys - part.queries:
        return "bottom_right"
    return "top_left" if diagonal == 0 else None


def _counted_from(seed: Tensor, part: Part) -> Tensor:
    """See `dropout.keep`."""
    if part.whole:
        return seed
    return torch.stack((seed, *cut.numbers((part.head, part.query, part.key), seed.device)))


def forward(part: Local) -> tuple[Tensor, Tensor]:
    """(out, lse) over the part's keys."""
    return autograd.run_forward(part.inputs, _call(part, (False,) * (3 + len(part.inputs.score))))


def backward(
    part: Local, saved: tuple[Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None], totals: Grads
) -> tuple[Tensor, Tensor, Tensor]:
    """What this part adds to the gradients of q, k and v; adds to `totals` what it adds to the others.

    saved: (out, lse) of the part's queries over all keys; grads: the gradients of those.
    """
    inputs = part.inputs
    bias = inputs.bias is not None and totals.bias is not None
    slopes = inputs.alibi_slopes is not None and totals.alibi_slopes is not None
    targets = [None if source is None else _total(totals, source) for source in part.score]
    wanted = (bias, slopes, False, *(target is not None for target in targets))
    call = _call(part, wanted)
    found: Sequence[Any] = autograd.run_backward(inputs, call, saved, grads)
    dq, dk, dv, grad_bias, grad_slopes, _, *grad_score = found
    if grad_bias is not None and totals.bias is not None:
        scores.four_dimensions(totals.bias)[part.bias] += grad_bias
    if grad_slopes is not None and totals.alibi_slopes is not None:
        totals.alibi_slopes[..., part.slopes] += grad_slopes
    for target, gradient in zip(targets, grad_score, strict=True):
        if target is not None and gradient is not None:
            target += gradient.view(target.shape)
    return dq, dk, dv


def _total(totals: Grads, source: tuple[str, int]) -> Tensor | None:
    name, place = source
    if name == "score":
        return totals.score[place]
    return totals.bias if name == "bias" else totals.alibi_slopes


def _call(part: Local, wanted: tuple[bool, ...]) -> autograd.Call:
    """What is known of calls that differ from this one in addresses alone."""
    inputs = part.inputs
    layouts = recall.layouts((*inputs[:-3], *inputs.mask, *inputs.score))
    key = None if layouts is None else (part.options, wanted, len(inputs.mask), layouts)
    call = _calls.get(key)
    if call is None:
        call = autograd.Call(part.options, wanted)
        if key is not None:
            recall.keep(_calls, key, call)
    return call


def sinks_backward(
    whole: Whole, saved: tuple[Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None], totals: Grads
) -> None:
    """Adds the gradient of the sinks, which no part has: their share of this process's queries."""
    (out, lse), (grad_out, grad_lse) = saved, grads
    sinks = whole.inputs.sinks
    if sinks is None or totals.sinks is None:
        return
    heads = slice(whole.head, whole.head + lse.shape[-2])
    delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    if grad_out is not None:
        delta = delta + (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    totals.sinks[heads] -= scores.sink_gradient(sinks[heads], lse, delta)
