"""The operators `flashtile::forward` and `flashtile::backward`: all that torch.compile, export and autograd see.

Both are opaque custom operators with fake kernels; shapes may be symbolic. Masks and score modifiers travel as tokens
(see `masks.Mask.token`, `trace.Lifted.key`) beside the tensors they refer to.

Plain eager calls go through `_Eager`, an autograd function over the same two bodies: a custom operator spends about
half a millisecond of cold Python on its generic machinery, more than a short attention itself.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashtile import backends, check, plan, sharding
from flashtile.problem import Inputs, Options, Wanted, describe

# The same tail in both operators: where sequences lie, the modifiers' tensors, the options.
_TAIL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? bias, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, Tensor[] mask_tensors, Tensor[] score_tensors, "
    "Tensor[] scaled, str mask, str score_mod, float scale, float softcap, float dropout_p, str alignment, "
    "ScalarType out_dtype, bool deterministic, bool batch_invariant, str? backend, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, str sharding, str scaled_by"
)
_SAVED = "Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] wanted"
_OPTION_COUNT = 14  # the arguments of _TAIL from `mask` on
_FIRST_LIST = 11  # the fields of Inputs before `mask`, each a tensor or None


def _unpack(tensors: tuple[Any, ...]) -> tuple[Inputs, Options]:
    """(q, k, v, *_TAIL) -> (Inputs, Options)."""
    *leading, masks, scores, scaled = tensors[:-_OPTION_COUNT]
    inputs = Inputs(*[*leading, tuple(masks), tuple(scores), tuple(scaled)])
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
        list(inputs.scaled),
        options.mask,
        options.score_mod,
        options.scale,
        options.softcap,
        options.dropout_p,
        options.alignment,
        options.out_dtype,
        options.deterministic,
        options.batch_invariant,
        options.backend,
        options.max_seqlen_q,
        options.max_seqlen_k,
        options.sharding,
        options.scaled,
    )


@dataclass
class Call:
    """What is known of a call beside its tensors; calls that differ in addresses alone share one (see `recall`).

    differentiable: its output has gradients to give. lists: how many tensors its mask and its score function have.
    """

    options: Options
    wanted: Sequence[bool]
    differentiable: bool = False
    lists: tuple[int, int] = (0, 0)
    plans: dict[bool, plan.Plan] = field(default_factory=dict)
    memories: tuple[backends.Memory, backends.Memory] = field(default_factory=lambda: ({}, {}))

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> "Call":
        differentiable = torch.is_grad_enabled() and _requires_grad(_sources(inputs))
        return cls(options, _asked(inputs), differentiable, (len(inputs.mask), len(inputs.score)))

    def plan(self, inputs: Inputs, backward: bool) -> plan.Plan:
        """What the forward or the backward pass runs."""
        chosen = self.plans.get(backward)
        if chosen is None:
            problem = describe(inputs, self.options, backward, _wanted(self.wanted) if backward else None)
            if not backward and not problem.varlen:
                check.mask(inputs, problem)
            chosen = self.plans[backward] = plan.choose(problem, self.options.backend)
        return chosen


def own_dtypes(device: str) -> AbstractContextManager[Any]:
    """Autocast has had its say on q, k and v; it must not reach the sums of the kernels."""
    if not torch._C._is_any_autocast_enabled():
        return _AS_THEY_ARE
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_THEY_ARE


_AS_THEY_ARE = nullcontext()


def run_forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), not differentiable."""
    again = call.memories[0].get(backends.AGAIN)
    if again is not None and (made := again(inputs)) is not None:
        return made[0], made[1]
    if call.options.sharding:
        return sharding.of(call.options.sharding).forward(inputs, call.options)
    chosen = call.plan(inputs, False)
    with own_dtypes(chosen.problem.device):
        return plan.kernel(chosen).forward(inputs, chosen.problem, chosen.config, call.memories[0])


def run_backward(
    inputs: Inputs, call: Call, saved: tuple[Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `_sources`, each in its tensor's dtype; None where not wanted."""
    again = call.memories[1].get(backends.AGAIN)
    if again is not None and grads[0] is not None and grads[1] is None:
        made = again(inputs, *saved, grads[0])
        if made is not None:
            return [*made[:3], None, None, None, *[None] * len(inputs.score)]
    if call.options.sharding:
        whole = sharding.of(call.options.sharding)
        gradients = whole.backward(inputs, call.options, _wanted(call.wanted), saved, grads)
    else:
        chosen = call.plan(inputs, True)
        with own_dtypes(chosen.problem.device):
            run = plan.kernel(chosen)
            gradients = run.backward(inputs, chosen.problem, chosen.config, *saved, *grads, call.memories[1])
    *alone, of_captured = gradients
    found: list[Tensor | None] = [*alone, *of_captured]
    for place, (gradient, tensor) in enumerate(zip(found, _sources(inputs), strict=True)):
        if gradient is not None and tensor is not None and gradient.dtype is not tensor.dtype:
            found[place] = gradient.to(tensor.dtype)
    return found


@torch.library.custom_op(
    "flashtile::forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = _unpack(arguments)
    return run_forward(inputs, Call.of(inputs, options))


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = _unpack(arguments)
    q = inputs.q
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], inputs.headdim_v), dtype=options.out_dtype)
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
    found = run_backward(inputs, Call(options, wanted), (out, lse), (grad_out, grad_lse))
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


def _sources(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """What may have a gradient, in the order of the backward operator's results, which is that of `Gradients`."""
    q, k, v = inputs[:3] if len(inputs.scaled) <= 3 else inputs.scaled[3:]
    return (q, k, v, inputs.bias, inputs.alibi_slopes, inputs.sinks, *inputs.score)


def _asked(inputs: Inputs) -> list[bool]:
    """Which gradients beyond those of q, k and v are wanted."""
    return [tensor is not None and tensor.requires_grad for tensor in _sources(inputs)[3:]]


def wanted_of(inputs: Inputs) -> Wanted:
    """The gradients that the tensors of a call ask for."""
    return _wanted(_asked(inputs))


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor], options: Options) -> None:
    """Of 8-bit inputs, what they were rounded from."""
    ctx.set_materialize_grads(False)
    inputs = inputs if len(inputs.scaled) <= 3 else inputs.exact()
    # One tensor more in sharded calls: checkpoints compare what is saved, so that none is computed again unsharded.
    mark = (output[1].new_empty(0),) if options.sharding else ()
    ctx.save_for_backward(*output, *inputs[:_FIRST_LIST], *inputs.mask, *inputs.score, *mark)


def _saved(tensors: tuple[Any, ...], masks: int, scores: int) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """What `_save` kept: (inputs, (out, lse))."""
    first, last = 2 + _FIRST_LIST, 2 + _FIRST_LIST + masks
    return Inputs(*(*tensors[2:first], tensors[first:last], tensors[last : last + scores])), tensors[:2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call, options = _unpack(inputs)
    ctx.wanted, ctx.options = _asked(call), options
    ctx.counts = (len(call.mask), len(call.score), len(call.scaled))
    _save(ctx, call, output, options)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    call, output = _saved(ctx.saved_tensors, *ctx.counts[:2])
    found = iter(_backward(grad_out, grad_lse, *output, ctx.wanted, *_pack(call, ctx.options)))
    grads = [next(found) if want else None for want in (True, True, True, *ctx.wanted)]
    q, k, v, bias, slopes, sinks, *score = grads
    masks = [None] * len(call.mask)
    scaled: list[Tensor | None] = [None] * ctx.counts[2]
    if len(scaled) > 3:
        q, k, v, scaled[3:] = None, None, None, [q, k, v]
    return (q, k, v, *(None,) * 4, bias, slopes, sinks, None, masks, score, scaled, *(None,) * _OPTION_COUNT)


_forward.register_autograd(_gradient, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same call without the operator; `sources` are the tensors of `_sources`, in order."""

    @staticmethod
    def forward(ctx: Any, inputs: Inputs, call: Call, *sources: Tensor | None) -> tuple[Tensor, Tensor]:
        output = run_forward(inputs, call)
        ctx.call = call
        _save(ctx, inputs, output, call.options)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        inputs, output = _saved(ctx.saved_tensors, *ctx.call.lists)
        if not torch.is_grad_enabled():
            return (None, None, *run_backward(inputs, ctx.call, output, (grad_out, grad_lse)))
        with torch.no_grad():
            found = run_backward(inputs, ctx.call, output, (grad_out, grad_lse))
        return (None, None, *_last(found))


_apply: Any = super(torch.autograd.Function, _Eager).apply
"""`_Eager.apply`, less what it looks for in each argument: functorch's transforms, which nobody uses here."""


def _last(gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients that have none of their own: to ask for one is an error, where a constant would drop it silently."""
    leaves = [None if gradient is None else gradient.detach().requires_grad_() for gradient in gradients]
    refuse: Any = torch._C._functions.DelayedError(b"flashtile: attention has no second derivative", len(leaves))
    return tuple(refuse(*leaves))


def plainly_eager(inputs: Inputs) -> bool:
    """No compiler, dispatch mode, functorch transform or tensor subclass is watching, and there are numbers to see."""
    if inputs.q.is_meta or watched():
        return False
    tensors = (*inputs[:_FIRST_LIST], *inputs.mask, *inputs.score, *inputs.scaled)
    return all(tensor is None or type(tensor) in PLAIN for tensor in tensors)


PLAIN = (Tensor, torch.nn.Parameter)


def watched() -> bool:
    """Whether a compiler, dispatch mode or functorch transform wants to see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def attention(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call, differentiable, as an operator that whoever watches can see."""
    return _forward(*_pack(inputs, options))


def eager(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """The same for a call that is `plainly_eager`."""
    if not call.differentiable:
        return run_forward(inputs, call)
    if call.options.backend is not None and not call.options.sharding:
        # One that takes no backward pass says so now.
        call.plan(inputs, False)
        call.plan(inputs.exact(), True)
    return _apply(inputs, call, *_sources(inputs))


def _requires_grad(sources: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in sources)


def plans(inputs: Inputs, options: Options) -> plan.Plan:
    """What the forward pass would run, and, if anything requires a gradient, the backward pass."""
    call = Call.of(inputs, options)
    chosen = call.plan(inputs, False)
    return replace(chosen, backward=call.plan(inputs.exact(), True)) if _requires_grad(_sources(inputs)) else chosen


def rehearse(inputs: Inputs, options: Options) -> None:
    """Runs the call as calls of any length run, and its backward pass if anything wants a gradient; keeps no result."""
    call = Call.of(inputs, options)
    with torch.no_grad():
        output = run_forward(inputs, call)
        chosen = call.plan(inputs, False)
        for config in _others(chosen):
            plan.kernel(chosen).forward(inputs, chosen.problem, config, {})
        if _requires_grad(_sources(inputs)):
            inputs, grads = inputs.exact(), (torch.zeros_like(output[0]), None)
            run_backward(inputs, call, output, grads)
            chosen = call.plan(inputs, True)
            for config in _others(chosen):
                plan.kernel(chosen).backward(inputs, chosen.problem, config, *output, *grads, {})


def _others(chosen: plan.Plan) -> list[Any]:
    """What such passes take at other lengths."""
    return [config for config in plan.kernel(chosen).configs(chosen.problem) if config != chosen.config]
