"""The operators `flashtile::forward` and `flashtile::backward`: all that torch.compile, export and autograd see.

Both are opaque custom operators with fake kernels; shapes may be symbolic. Masks and score modifiers travel as tokens
(see `masks.Mask.token`, `trace.Lifted.key`) beside the tensors they refer to.

Plain eager calls go through `_Eager`, an autograd function over the same two bodies: a custom operator spends about
half a millisecond of cold Python on its generic machinery, more than a short attention itself.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
    inputs = Inputs(*[*leading, tuple(mask_tensors), tuple(score_tensors)])
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


def planned(inputs: Inputs, options: Options) -> plan.Plan:
    """What the forward pass will run."""
    problem = describe(inputs, options)
    if not problem.varlen:
        check.mask(inputs, problem)
    return plan.choose(problem, options.backend)


def _own_dtypes(device: str) -> AbstractContextManager[Any]:
    """Autocast has had its say on q, k and v; it must not reach the sums of the kernels."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _run_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    chosen = planned(inputs, options)
    with _own_dtypes(chosen.problem.device):
        return plan.kernel(chosen).forward(inputs, chosen.problem, chosen.config)


def _run_backward(
    inputs: Inputs,
    options: Options,
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `_sources`, each in its tensor's dtype; None where not wanted."""
    problem = describe(inputs, options, backward=True, wanted=_wanted(wanted))
    chosen = plan.choose(problem, options.backend)
    with _own_dtypes(problem.device):
        gradients = plan.kernel(chosen).backward(inputs, problem, chosen.config, *saved, *grads)
    return [
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(_flat(gradients), _sources(inputs), strict=True)
    ]


@torch.library.custom_op(
    "flashtile::forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(*_unpack(arguments))


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
    found = _run_backward(*_unpack(arguments), (out, lse), (grad_out, grad_lse), wanted)
    return [gradient for gradient in found if gradient is not None]


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


def _wanted(flags: Sequence[bool]) -> Wanted:
    return Wanted(flags[0], flags[1], flags[2], tuple(flags[3:]))


def _sources(inputs: Inputs) -> list[Tensor | None]:
    """What may have a gradient, in the order of the backward operator's results."""
    return [inputs.q, inputs.k, inputs.v, inputs.bias, inputs.alibi_slopes, inputs.sinks, *inputs.score]


def _flat(gradients: backends.Gradients) -> list[Tensor | None]:
    named = [gradients.q, gradients.k, gradients.v, gradients.bias, gradients.alibi_slopes, gradients.sinks]
    return [*named, *gradients.score]


def _asked(inputs: Inputs) -> list[bool]:
    """Which gradients beyond those of q, k and v are wanted."""
    return [tensor is not None and tensor.requires_grad for tensor in _sources(inputs)[3:]]


def wanted_of(inputs: Inputs) -> Wanted:
    """The gradients that the tensors of a call ask for."""
    return _wanted(_asked(inputs))


def _save(ctx: Any, inputs: Inputs, options: Options, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options, ctx.counts = options, (len(inputs.mask), len(inputs.score))
    tensors = _pack(inputs, options)[: -_OPTION_COUNT - 2]
    ctx.save_for_backward(*output, *tensors, *inputs.mask, *inputs.score)


def _saved(ctx: Any) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """What `_save` kept: (inputs, (out, lse))."""
    masks, scores = ctx.counts
    out, lse, *tensors = ctx.saved_tensors
    first = len(tensors) - masks - scores
    mask, score = tensors[first : first + masks], tensors[first + masks :]
    return Inputs(*[*tensors[:first], tuple(mask), tuple(score)]), (out, lse)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call, options = _unpack(inputs)
    ctx.wanted = _asked(call)
    _save(ctx, call, options, output)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    call, output = _saved(ctx)
    found = iter(_backward(grad_out, grad_lse, *output, ctx.wanted, *_pack(call, ctx.options)))
    grads = [next(found) if want else None for want in (True, True, True, *ctx.wanted)]
    q, k, v, bias, slopes, sinks, *score = grads
    masks = [None] * len(call.mask)
    return (q, k, v, *(None,) * 4, bias, slopes, sinks, None, masks, score, *(None,) * _OPTION_COUNT)


_forward.register_autograd(_gradient, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same call without the operator; `sources` are the tensors of `_sources`, in order."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, options: Options, wanted: list[bool], *sources: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = _run_forward(inputs, options)
        ctx.wanted = wanted
        _save(ctx, inputs, options, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        inputs, output = _saved(ctx)
        with torch.no_grad():
            found = _run_backward(inputs, ctx.options, output, (grad_out, grad_lse), ctx.wanted)
        return (None, None, None, *_last(found))


def _last(gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients that have none of their own: to ask for one is an error, where a constant would drop it silently."""
    if not torch.is_grad_enabled():
        return gradients
    leaves = [None if gradient is None else gradient.detach().requires_grad_() for gradient in gradients]
    refuse: Any = torch._C._functions.DelayedError(b"flashtile: attention has no second derivative", len(leaves))
    return tuple(refuse(*leaves))


def _plainly_eager(inputs: Inputs) -> bool:
    """No compiler, dispatch mode, functorch transform or tensor subclass is watching, and there are numbers to see."""
    if inputs.q.is_meta or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    tensors = (*_pack(inputs, Options())[: -_OPTION_COUNT - 2], *inputs.mask, *inputs.score)
    return all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def attention(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call, differentiable."""
    if not _plainly_eager(inputs):
        return _forward(*_pack(inputs, options))
    sources = _sources(inputs)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in sources):
        return _Eager.apply(inputs, options, _asked(inputs), *sources)
    return _run_forward(inputs, options)


def rehearse(inputs: Inputs, options: Options) -> None:
    """Runs the call, and its backward pass if anything wants a gradient, and throws the results away."""
    with torch.no_grad():
        output = _run_forward(inputs, options)
        if any(tensor is not None and tensor.requires_grad for tensor in _sources(inputs)):
            _run_backward(inputs, options, output, (torch.zeros_like(output[0]), None), _asked(inputs))
