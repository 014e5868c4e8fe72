"""Calls over a KV cache: from the arguments of `attention_kvcache` to a backend, eagerly or as an operator.

`flashtile::attention_kvcache` is a custom operator that writes into the caches; whoever compiles or exports sees it.
Plain eager calls go straight to the same body; on a GPU those that were made before, with other addresses, are neither
checked nor planned again.
"""

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import autograd, backends, check, masks, plan, recall
from flashtile.plan import Plan
from flashtile.problem import (
    CacheTensors,
    Inputs,
    Options,
    ahead,
    capacity,
    columns,
    describe_cached,
    shares_memory,
)
from flashtile.request import autocast


class CacheArguments(NamedTuple):
    """What `attention_kvcache` takes beside q and the caches, as the user gave it."""

    cache_seqlens: Any
    k: Tensor | None = None
    v: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    rotary_interleaved: bool = True
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scale: float | None = None
    num_splits: int | None = None
    batch_invariant: bool = False
    debug: bool = False
    return_lse: bool = False
    backend: str | None = None


class Call(NamedTuple):
    """The call in the engine's words. `debug`: contents of lengths and pages are looked at, whatever that costs."""

    inputs: Inputs
    cache: CacheTensors
    options: Options
    interleaved: bool
    splits: int | None
    debug: bool

    def plan(self) -> Plan:
        """What runs."""
        problem = describe_cached(self.inputs, self.cache, self.options, self.interleaved, self.splits)
        if problem.cached is not None:
            check.apart(problem.cached.latent, problem.cached.rotary)
        return plan.choose(problem, self.options.backend)


def build(q: Tensor, k_cache: Tensor, v_cache: Tensor, given: CacheArguments) -> Call:
    """Checks everything but the contents of tensors, then says it in the engine's words."""
    q = autocast(q) if isinstance(q, Tensor) else q
    k, v = (autocast(new) if isinstance(new, Tensor) else new for new in (given.k, given.v))
    _check(q, k_cache, v_cache, given._replace(k=k, v=v))
    seqlens = given.cache_seqlens
    if not isinstance(seqlens, Tensor):
        seqlens = torch.full((q.shape[0],), seqlens, dtype=torch.int32, device=q.device)
    options = Options(
        mask=_mask(given).token,
        scale=q.shape[-1] ** -0.5 if given.scale is None else float(given.scale),
        softcap=float(given.softcap or 0.0),
        out_dtype=q.dtype,
        batch_invariant=given.batch_invariant,
        backend=given.backend,
    )
    inputs = Inputs(q, k_cache, v_cache, alibi_slopes=given.alibi_slopes, sinks=given.sinks)
    cache = _tensors(given._replace(cache_seqlens=seqlens, k=k, v=v))
    return Call(inputs, cache, options, given.rotary_interleaved, given.num_splits, given.debug)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, given: CacheArguments) -> None:
    check.cache(q, k_cache, v_cache, given.block_table)
    check.new_rows(q, given.k, given.v, k_cache, v_cache)
    appended = 0 if given.k is None else given.k.shape[1]
    page = 1 if given.block_table is None else k_cache.shape[1]
    places = (given.cache_batch_idx, given.cache_leftpad, given.block_table)
    check.places(q, k_cache, *places)
    for name in ("rotary_interleaved", "causal", "batch_invariant", "debug", "return_lse"):
        check.flag(name, getattr(given, name))
    check.window(given.window)
    beyond = ahead(q, appended, given.causal or any(side is not None for side in given.window or ()))
    check.rotary(
        given.rotary_cos, given.rotary_sin, q, appended, capacity(k_cache, given.block_table) - page + 1, beyond
    )
    check.seqlens(q, given.cache_seqlens, appended, capacity(k_cache, given.block_table, given.rotary_cos, beyond))
    check.scales(given.k_scale, given.v_scale, k_cache, given.block_table)
    check.softcap(given.softcap)
    check.alibi_slopes(given.alibi_slopes, q, q.shape[0])
    check.sinks(given.sinks, q)
    check.scale(given.scale)
    check.num_splits(given.num_splits, given.batch_invariant)
    check.backend(given.backend, backends.ORDER)
    named = {"q": q, "k": given.k, "v": given.v, "alibi_slopes": given.alibi_slopes, "sinks": given.sinks}
    check.inference({"k_cache": k_cache, "v_cache": v_cache, **named})


def _mask(given: CacheArguments) -> masks.Mask:
    """Causal and window, at the bottom right."""
    if given.window is None:
        return masks.causal() if given.causal else masks.full()
    window = masks.window(*given.window)
    return masks.causal() & window if given.causal else window


class _Known(NamedTuple):
    """What runs a call, and what earlier ones that differ in addresses alone have left behind."""

    plan: Plan
    memory: backends.Memory


_known: dict[Any, _Known] = {}


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, given: CacheArguments) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call, whose new rows are in the caches afterwards."""
    cache = _tensors(given)
    tensors = (q, k_cache, v_cache, *cache, given.alibi_slopes, given.sinks)
    key = _key(tensors, given)
    known = _known.get(key)
    if key is not None and known is not None:
        again = known.memory.get(backends.AGAIN)
        if again is not None and (made := again(tensors)) is not None:
            return made[0], made[1]
        inputs = Inputs(q, k_cache, v_cache, alibi_slopes=given.alibi_slopes, sinks=given.sinks)
        return _run(inputs, cache, known, False)
    call = build(q, k_cache, v_cache, given)
    if not _plainly_eager(call):
        out, lse = _operator(*_pack(call))
        return out, lse
    known = _Known(call.plan(), {})
    if key is not None:
        recall.keep(_known, key, known)
    return _run(call.inputs, call.cache, known, call.debug)


def _tensors(given: CacheArguments) -> CacheTensors:
    """The first fields of CacheArguments, which are those of CacheTensors in the same order."""
    fields: Any = given[: len(CacheTensors._fields)]
    return CacheTensors(*fields)


_values = attrgetter(
    "rotary_interleaved",
    "causal",
    "window",
    "softcap",
    "scale",
    "num_splits",
    "batch_invariant",
    "return_lse",
    "backend",
)


def _key(tensors: tuple[Any, ...], given: CacheArguments) -> Any:
    """All that decides what the call comes to, beside its tensors (see `recall`); None: it is not kept."""
    q, k_cache, v_cache, *_ = tensors
    if autograd.watched() or type(q) not in autograd.PLAIN or not recall.worth_it(q):
        return None
    values = _values(given)
    kinds = tuple(map(type, values))
    simple = recall.SIMPLE.issuperset(kinds) and recall.SIMPLE.issuperset(map(type, given.window or ()))
    if not simple or given.debug is not False:
        return None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type):
        return None
    layouts = recall.layouts(tensors)
    if layouts is None:
        return None
    return layouts, values, kinds, torch.is_grad_enabled(), shares_memory(k_cache, v_cache)


def _plainly_eager(call: Call) -> bool:
    tensors = (*call.inputs[:11], *call.cache)
    plain = all(tensor is None or type(tensor) in autograd.PLAIN for tensor in tensors)
    return plain and not call.inputs.q.is_meta and not autograd.watched()


def _run(inputs: Inputs, cache: CacheTensors, known: _Known, debug: bool) -> tuple[Tensor, Tensor]:
    chosen = known.plan
    if debug or inputs.q.device.type == "cpu":
        check.cache_values(inputs, cache, chosen.problem)
    with torch.no_grad(), autograd.own_dtypes(chosen.problem.device):
        return plan.decoder(chosen).decode(inputs, cache, chosen.problem, chosen.config, known.memory)


_SCHEMA = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? alibi_slopes, Tensor? sinks, Tensor cache_seqlens, "
    "Tensor? k, Tensor? v, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? k_scale, Tensor? v_scale, str mask, float scale, float softcap, bool batch_invariant, "
    "str? backend, bool rotary_interleaved, SymInt? num_splits, bool debug) -> (Tensor, Tensor)"
)


def _pack(call: Call) -> tuple[Any, ...]:
    inputs, options = call.inputs, call.options
    return (
        *(inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.sinks),
        *call.cache,
        *(options.mask, options.scale, options.softcap, options.batch_invariant, options.backend),
        *(call.interleaved, call.splits, call.debug),
    )


def _unpack(arguments: tuple[Any, ...]) -> Call:
    q, k, v, slopes, sinks, *rest = arguments
    count = len(CacheTensors._fields)
    mask, scale, softcap, batch_invariant, backend, *last = rest[count:]
    options = Options(
        mask=mask,
        scale=scale,
        softcap=softcap,
        out_dtype=q.dtype,
        batch_invariant=batch_invariant,
        backend=backend,
    )
    return Call(Inputs(q, k, v, alibi_slopes=slopes, sinks=sinks), CacheTensors(*rest[:count]), options, *last)


@torch.library.custom_op("flashtile::attention_kvcache", mutates_args=("k_cache", "v_cache"), schema=_SCHEMA)
def _operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _unpack(arguments)
    return _run(call.inputs, call.cache, _Known(call.plan(), {}), call.debug)


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, v = arguments[0], arguments[2]
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], columns(v))), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)
