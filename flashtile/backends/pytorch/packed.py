"""Packed sequences on the PyTorch backend: one dense problem after the other, over the same tensors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flashtile import check
from flashtile.backends import Gradients, Memory
from flashtile.problem import Inputs, Problem
from flashtile.scaled import plain
from flashtile.scores import Grads, zero_grads
from flashtile.tuning.cpu import SweepConfig

DenseForward = Callable[[Inputs, Problem, SweepConfig, int], tuple[Tensor, Tensor]]
DenseBackward = Callable[
    [Inputs, Problem, SweepConfig, Tensor, Tensor, Tensor, Tensor | None, Grads, int], tuple[Tensor, Tensor, Tensor]
]
Forward = Callable[[Inputs, Problem, SweepConfig, Memory], tuple[Tensor, Tensor]]
Backward = Callable[[Inputs, Problem, SweepConfig, Tensor, Tensor, Tensor | None, Tensor | None, Memory], Gradients]


def over_sequences(dense_forward: DenseForward, dense_backward: DenseBackward) -> tuple[Forward, Backward]:
    """A kernel's forward and backward, for dense and packed calls, from those of one dense problem."""

    def forward(inputs: Inputs, problem: Problem, config: SweepConfig, memory: Memory) -> tuple[Tensor, Tensor]:
        inputs, problem = plain(inputs, problem)
        if not problem.varlen:
            return dense_forward(inputs, problem, config, 0)
        q = inputs.q
        out = q.new_zeros(*q.shape[:2], problem.headdim_v, dtype=problem.out_dtype)
        lse = q.new_full((problem.heads, len(q)), -torch.inf, dtype=problem.accumulator)
        for index, queries, keys in _sequences(inputs, problem):
            one, part = _only(inputs, problem, queries, keys)
            out[None, queries], lse[None, :, queries] = dense_forward(one, part, config, index)
        return out, lse

    def backward(
        inputs: Inputs,
        problem: Problem,
        config: SweepConfig,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        memory: Memory,
    ) -> Gradients:
        grads = zero_grads(inputs, problem)
        if grad_out is None:
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        saved = (out, lse, grad_out, grad_lse)
        if not problem.varlen:
            dq, dk, dv = dense_backward(inputs, problem, config, *saved, grads, 0)
        else:
            dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (inputs.q, inputs.k, inputs.v))
            for index, queries, keys in _sequences(inputs, problem):
                one, part = _only(inputs, problem, queries, keys)
                here = (out[None, queries], lse[None, :, queries], grad_out[None, queries])
                here_lse = None if grad_lse is None else grad_lse[None, :, queries]
                dq[None, queries], dk[None, keys], dv[None, keys] = dense_backward(
                    one, part, config, *here, here_lse, grads, index
                )
        return Gradients(dq, dk, dv, grads.bias, grads.alibi_slopes, grads.sinks, grads.score)

    return forward, backward


def _sequences(inputs: Inputs, problem: Problem) -> Iterator[tuple[int, slice, slice]]:
    """(index, its queries, its keys) of each packed sequence that has a query."""
    queries = _slices("q", inputs.cu_seqlens_q, inputs.seqused_q, len(inputs.q), problem.max_seqlen_q)
    keys = _slices("k", inputs.cu_seqlens_k, inputs.seqused_k, len(inputs.k), problem.max_seqlen_k)
    longest = [max((part.stop - part.start for part in side), default=0) for side in (queries, keys)]
    check.packed_bias(inputs.bias, problem.batch, problem.heads, *longest)
    for index, (q, k) in enumerate(zip(queries, keys, strict=True)):
        if q.stop > q.start:
            check.mask(inputs, replace(problem, seqlen_q=q.stop - q.start, seqlen_kv=k.stop - k.start))
            yield index, q, k


def _slices(
    side: str, cu_seqlens: Tensor | None, seqused: Tensor | None, total: int, longest: int | None
) -> list[slice]:
    offsets = [0] if cu_seqlens is None else cu_seqlens.tolist()
    used = None if seqused is None else seqused.tolist()
    check.offsets(side, offsets, used, total, longest)
    lengths = used or [end - begin for begin, end in pairwise(offsets)]
    return [slice(begin, begin + length) for begin, length in zip(offsets, lengths, strict=False)]


def _only(inputs: Inputs, problem: Problem, queries: slice, keys: slice) -> tuple[Inputs, Problem]:
    """One packed sequence as a dense problem of batch 1, over views."""
    q, k, v = inputs.q[None, queries], inputs.k[None, keys], inputs.v[None, keys]
    one = inputs._replace(q=q, k=k, v=v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None)
    return one, problem.one_sequence(queries.stop - queries.start, keys.stop - keys.start)
