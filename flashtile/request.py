"""From the arguments of a public function to (Inputs, Options): checks, defaults, masks joined, modifiers traced.

This runs under `torch.compile` too: plain code, no caches, no tensor read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import backends, check, masks, sharding, trace
from flashtile.masks import Mask
from flashtile.problem import Inputs, Options
from flashtile.scaled import Scaled


class Arguments(NamedTuple):
    """The options that the public functions share, as the user gave them: plain values first, then what may hold
    tensors."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    alignment: str = "bottom_right"
    out_dtype: torch.dtype | None = None
    return_lse: bool = False
    deterministic: bool | None = None
    batch_invariant: bool = False
    backend: str | None = None
    sharding: str = ""
    mask: Mask | Tensor | Callable[..., Any] | None = None
    block_mask: Any = None
    score_mod: Callable[..., Any] | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: int | Tensor | None = None


class Packing(NamedTuple):
    """Where the packed sequences lie, as the user gave it."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    max_seqlen_q: int | Tensor | None
    max_seqlen_k: int | Tensor | None


def described(**given: Any) -> Packing | None:
    """What `explain` was told of packed sequences; None: the call is dense."""
    check.packing_complete(given)
    return Packing(**given) if given["cu_seqlens_q"] is not None else None


def build(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None = None) -> tuple[Inputs, Options]:
    """Checks everything, then says it in the engine's words; q, k and v: tensors, or `Scaled` ones."""
    if not arguments.sharding or torch.compiler.is_compiling():
        return _build(q, k, v, arguments, packing)
    try:
        return _build(q, k, v, arguments, packing)
    except (TypeError, ValueError, NotImplementedError) as error:
        # The other processes wait for this one: they are told.
        sharding.of(arguments.sharding).failed(error)
        raise


def _build(q: Any, k: Any, v: Any, arguments: Arguments, packing: Packing | None = None) -> tuple[Inputs, Options]:
    q, k, v, eight = _opened(q, k, v, packing is not None)
    _check(_whole(q, arguments), _whole(k, arguments), arguments, packing, bool(eight.tensors))
    mask = _mask(arguments)
    score = None if arguments.score_mod is None else trace.lift(arguments.score_mod, "score")
    inputs = Inputs(
        q,
        k,
        v,
        cu_seqlens_q=packing.cu_seqlens_q if packing else None,
        cu_seqlens_k=packing.cu_seqlens_k if packing else None,
        seqused_q=packing.seqused_q if packing else None,
        seqused_k=packing.seqused_k if packing else None,
        bias=arguments.bias,
        alibi_slopes=arguments.alibi_slopes,
        sinks=arguments.sinks,
        seed=seed_of(arguments, q),
        mask=mask.tensors,
        score=() if score is None else score.tensors,
        scaled=eight.tensors,
    )
    options = Options(
        mask=mask.token,
        score_mod="" if score is None else score.key,
        scale=q.shape[-1] ** -0.5 if arguments.scale is None else float(arguments.scale),
        softcap=float(arguments.softcap or 0.0),
        dropout_p=float(arguments.dropout_p),
        alignment=arguments.alignment,
        out_dtype=arguments.out_dtype or eight.dtype or q.dtype,
        deterministic=_deterministic(arguments.deterministic) or arguments.batch_invariant,
        batch_invariant=arguments.batch_invariant,
        backend=arguments.backend,
        max_seqlen_q=packing.max_seqlen_q if packing and not isinstance(packing.max_seqlen_q, Tensor) else None,
        max_seqlen_k=packing.max_seqlen_k if packing and not isinstance(packing.max_seqlen_k, Tensor) else None,
        sharding=arguments.sharding,
        scaled=eight.by,
    )
    return inputs, options


class Eight(NamedTuple):
    """What 8-bit tensors have beside themselves: `Inputs.scaled`, `Options.scaled`, and the output's default dtype."""

    tensors: tuple[Tensor, ...] = ()
    by: str = ""
    dtype: torch.dtype | None = None


SIXTEEN = Eight()
"""Of tensors of more bits: nothing."""


def eight_of(q: Any, k: Any, v: Any) -> Eight:
    """Of three `Scaled`."""
    if type(q) is not Scaled or type(k) is not Scaled or type(v) is not Scaled:
        return SIXTEEN
    sources = (q.source, k.source, v.source)
    kept = sources if torch.is_grad_enabled() and None not in sources else ()
    return Eight((q.scale, k.scale, v.scale, *kept), "block" if q.granularity == "block" else "head", q.dtype)


def _opened(q: Any, k: Any, v: Any, varlen: bool) -> tuple[Tensor, Tensor, Tensor, Eight]:
    """Checked tensors, under autocast in its dtype unless they have 8 bits."""
    if any(isinstance(value, Scaled) for value in (q, k, v)):
        check.scaled(q, k, v, varlen)
        return q.data, k.data, v.data, eight_of(q, k, v)
    check.tensors(q, k, v)
    q, k, v = autocast(q), autocast(k), autocast(v)
    check.qkv(q, k, v, varlen=varlen)
    return q, k, v, SIXTEEN


def _whole(tensor: Tensor, arguments: Arguments) -> Tensor:
    """Where q or k is a share of a longer sequence: what stands for all of it in checks, which read no number."""
    return sharding.standing_for_all(tensor, arguments.sharding) if arguments.sharding else tensor


def _check(q: Tensor, k: Tensor, arguments: Arguments, packing: Packing | None, eight: bool) -> None:
    varlen = packing is not None
    if packing is not None:
        lengths = {
            "cu_seqlens_q": packing.cu_seqlens_q,
            "cu_seqlens_k": packing.cu_seqlens_k,
            "seqused_q": packing.seqused_q,
            "seqused_k": packing.seqused_k,
        }
        check.packing(q, lengths, {"max_seqlen_q": packing.max_seqlen_q, "max_seqlen_k": packing.max_seqlen_k})
    batch = packing.cu_seqlens_q.shape[0] - 1 if packing is not None else q.shape[0]
    check.flag("causal", arguments.causal)
    check.flag("return_lse", arguments.return_lse)
    check.deterministic(arguments.deterministic)
    check.flag("batch_invariant", arguments.batch_invariant)
    check.alignment(arguments.alignment)
    check.window(arguments.window)
    check.mask_argument(arguments.mask)
    check.block_mask(arguments.block_mask, q, k, varlen)
    check.score_mod(arguments.score_mod)
    check.bias(arguments.bias, q, k, varlen)
    check.alibi_slopes(arguments.alibi_slopes, q, batch)
    check.softcap(arguments.softcap)
    check.sinks(arguments.sinks, q)
    check.scale(arguments.scale)
    check.dropout(arguments.dropout_p, arguments.seed, q)
    if eight:
        check.scaled_out_dtype(arguments.out_dtype)
    else:
        check.out_dtype(arguments.out_dtype, q)
    check.backend(arguments.backend, backends.ORDER)


def autocast(tensor: Tensor) -> Tensor:
    """Under autocast the dot products run in its dtype, as PyTorch's own attention does; float64 stays."""
    device = tensor.device.type
    # Meta tensors have no autocast; asking torch.amp whether a device has is beyond older compilers.
    if tensor.dtype is torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _mask(arguments: Arguments) -> Mask:
    """Everything that hides keys, joined with `&`."""
    alignment: Any = arguments.alignment
    parts = []
    if arguments.causal:
        parts.append(masks.causal(alignment))
    if arguments.window is not None:
        parts.append(masks.window(*arguments.window, alignment))
    if arguments.mask is not None:
        parts.append(mask_value(arguments.mask))
    if arguments.block_mask is not None:
        parts.append(masks.from_block_mask(arguments.block_mask))
    if not parts:
        return masks.full()
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part
    return joined


def mask_value(mask: Mask | Tensor | Callable[..., Any]) -> Mask:
    """The argument `mask` as a Mask."""
    if isinstance(mask, Mask):
        return mask
    return masks.dense(mask) if isinstance(mask, Tensor) else masks.custom(mask)


def seed_of(arguments: Arguments, q: Tensor) -> Tensor | None:
    """Dropout's seed; drawn from PyTorch's generator, so that checkpointing replays it and manual_seed fixes it."""
    if arguments.dropout_p == 0:
        return None
    if arguments.seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=q.device)
    if isinstance(arguments.seed, Tensor):
        return arguments.seed.reshape(())
    return torch.full((), arguments.seed, dtype=torch.int64, device=q.device)


def _deterministic(value: bool | None) -> bool:
    """None follows PyTorch's global switch."""
    return torch.are_deterministic_algorithms_enabled() if value is None else value
