"""The operators `flashtile::forward` and `flashtile::backward`: all that torch.compile, export and autograd see.

Both are opaque custom operators with fake kernels; shapes may be symbolic. Masks and score modifiers travel as tokens
(see `masks.Mask.token`, `trace.Lifted.key`) beside the tensors they refer to.
"""

from typing import Any

import torch
from torch import Tensor

from flashtile import backends, check, plan
from flashtile.problem import Inputs, Options, Wanted, describe

# The same tail in both operators: where sequences lie, the modifiers' tensors, the options.
_TAIL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? bias, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, Tensor[] mask_tensors, Tensor[] score_tensors, str mask, "
    "str score_mod, float scale, float softcap, float dropout_p, str alignment, ScalarType out_dtype, "
    "bool deterministic, str? backend, SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)
_SAVED = "Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] wanted"
_OPTION_COUNT = 11  # the arguments of _TAIL from `mask` on


def _unpack(tensors: tuple[Any, ...]) -> tuple[Inputs, Options]:
    """(q, k, v, *_TAIL) -> (Inputs, Options)."""
    *leading, mask_tensors, score_tensors = tensors[:-_OPTION_COUNT]
    inputs = Inputs(*leading, mask=tuple(mask_tensors), score=tuple(score_tensors))
    return inputs, Options(*tensors[-_OPTION_COUNT:])


def _pack(inputs: Inputs, options: Options) -> tuple[Any, ...]:
    """The inverse of `_unpack`."""
    return (
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.seqused_q,
        inputs.seqused_k,
        inputs.bias,
        inputs.alibi_slopes,
        inputs.sinks,
        inputs.seed,
        list(inputs.mask),
        list(inputs.score),
        options.mask,
        options.score_mod,
        options.scale,
        options.softcap,
        options.dropout_p,
        options.alignment,
        options.out_dtype,
        options.deterministic,
        options.backend,
        options.max_seqlen_q,
        options.max_seqlen_k,
    )


@torch.library.custom_op(
    "flashtile::forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = _unpack(arguments)
    problem = describe(inputs, options)
    if not problem.varlen:
        check.mask(inputs, problem)
    chosen = plan.choose(problem, options.backend)
    return plan.kernel(chosen).forward(inputs, problem, chosen.config)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = _unpack(arguments)
    q = inputs.q
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], inputs.v.shape[-1]), dtype=options.out_dtype)
    return out, q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=lse_dtype)


@torch.library.custom_op(
    "flashtile::backward",
    mutates_args=(),
    schema=f"({_SAVED}, Tensor q, Tensor k, Tensor v, {_TAIL}) -> Tensor[]",
)
def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> list[Tensor]:
    inputs, options = _unpack(arguments)
    problem = describe(inputs, options, backward=True, wanted=_wanted(wanted))
    chosen = plan.choose(problem, options.backend)
    kernel = plan.kernel(chosen)
    gradients = kernel.backward(inputs, problem, chosen.config, out, lse, grad_out, grad_lse)
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(_flat(gradients), _sources(inputs), strict=True)
        if gradient is not None and tensor is not None
    ]


@_backward.register_fake
def _(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> list[Tensor]:
    inputs, _ = _unpack(arguments)
    asked = [True, True, True, *wanted]
    return [
        tensor.new_empty(tensor.shape)
        for tensor, want in zip(_sources(inputs), asked, strict=True)
        if want and tensor is not None
    ]


def _wanted(flags: list[bool]) -> Wanted:
    return Wanted(flags[0], flags[1], flags[2], tuple(flags[3:]))


def _sources(inputs: Inputs) -> list[Tensor | None]:
    """What may have a gradient, in the order of the backward operator's results."""
    return [inputs.q, inputs.k, inputs.v, inputs.bias, inputs.alibi_slopes, inputs.sinks, *inputs.score]


def _flat(gradients: backends.Gradients) -> list[Tensor | None]:
    named = [gradients.q, gradients.k, gradients.v, gradients.bias, gradients.alibi_slopes, gradients.sinks]
    return [*named, *gradients.score]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call, options = _unpack(inputs)
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.counts = (len(call.mask), len(call.score))
    leading = _pack(call, options)[: -_OPTION_COUNT - 2]
    ctx.save_for_backward(*output, *leading, *call.mask, *call.score)
    ctx.wanted = [tensor is not None and tensor.requires_grad for tensor in _sources(call)[3:]]


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    masks, scores = ctx.counts
    out, lse, *leading = ctx.saved_tensors
    leading, extra = leading[: len(leading) - masks - scores], leading[len(leading) - masks - scores :]
    call = Inputs(*leading, mask=tuple(extra[:masks]), score=tuple(extra[masks:]))
    arguments = _pack(call, ctx.options)
    found = iter(_backward(grad_out, grad_lse, out, lse, ctx.wanted, *arguments))
    grads = [next(found) if want else None for want in (True, True, True, *ctx.wanted)]
    q, k, v, bias, slopes, sinks, *score = grads
    packing = (None,) * 4
    return (q, k, v, *packing, bias, slopes, sinks, None, [None] * masks, score, *(None,) * _OPTION_COUNT)


_forward.register_autograd(_gradient, setup_context=_setup)


def attention(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call, differentiable."""
    return _forward(*_pack(inputs, options))
