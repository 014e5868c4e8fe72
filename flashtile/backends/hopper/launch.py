"""Launches: arguments and the grid."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashtile.backends import AGAIN, Gradients
from flashtile.backends.hopper.around import after_kernel, before_kernel
from flashtile.backends.hopper.backward import backward_kernel
from flashtile.backends.hopper.calls import Call, Machine, entries, grid_of_keys, heads_in_cache, lists_of
from flashtile.backends.hopper.descriptors import descriptor, piece_descriptor, value_descriptor
from flashtile.backends.hopper.forward import forward_kernel
from flashtile.backends.hopper.meta import block
from flashtile.backends.hopper.queries import query_kernel
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.sums import PIECE_COLUMNS
from flashtile.backends.hopper.turning import room_for, turn, turn_kernel
from flashtile.kernels import bias
from flashtile.kernels.again import Again, tensors_of
from flashtile.kernels.arguments import (
    is_padded,
    memory_for,
    numbers_of,
    outputs_of,
    padded,
    programs_of,
    rows_of,
    stats_of,
    unwritten,
    values_of,
)
from flashtile.kernels.bias import bias_kernel
from flashtile.kernels.bits import bits_kernel
from flashtile.kernels.tape import Tape, perform
from flashtile.problem import Inputs, Problem, described
from flashtile.queues import counter
from flashtile.region import region
from flashtile.scores import Grads, sink_gradient, slope_gradient, zero_grads
from flashtile.tuning.hopper import BackwardConfig, BiasConfig, HopperConfig, bias_config

KERNELS = (
    forward_kernel,
    turn_kernel,
    before_kernel,
    backward_kernel,
    query_kernel,
    after_kernel,
    bias_kernel,
    bits_kernel,
)


def forward(
    inputs: Inputs,
    problem: Problem,
    config: HopperConfig,
    machine: Machine | None = None,
    memory: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    out = outputs_of(inputs, problem)
    lse = _stats(inputs, problem, -torch.inf)
    turned = room_for(v, problem)
    made = (out, lse) if turned is None else (out, lse, turned)
    number = counter(q.device)

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine, inputs, problem, config, tape)
        if turned is not None:
            turn(call, turned)
        total, where = call.tiles(keys=False)
        meta, rows = call.meta, ROWS.value
        columns = meta.block_dv // 2 if meta.halves else meta.block_dv
        given = {
            "q_desc": descriptor(q, rows, meta.strip),
            "k_desc": descriptor(k, meta.tile_kv, meta.strip),
            "v_desc": value_descriptor(v if turned is None else turned, meta),
            "o_desc": None if meta.wide else descriptor(out, rows, columns),
            "sources": (rows_of(q), rows_of(k), values_of(inputs)) if meta.careful else None,
            "scales": tuple(map(numbers_of, inputs.scaled[:3])) if meta.eight else None,
            "out": rows_of(out) if problem.varlen or meta.wide else None,
            "lse": numbers_of(lse),
            "counter": number,
            "section": call.section(),
            "total": total,
            **where,
            **call.lists(keys=False),
            "sinks": inputs.sinks,
            **call.functions,
        }
        call.launch(forward_kernel, call.machine.programs(total, q.device), given, **call.warps())

    lists = lists_of(machine, inputs, problem, config, False)
    tape = perform(launches, (*tensors_of(inputs), *made, number, *lists), memory)
    _leave(memory, tape, problem, made, True, (0.0, -torch.inf), inputs)
    return out, lse


def _leave(
    memory: dict[Any, Any] | None,
    tape: Tape | None,
    problem: Problem,
    made: Sequence[Tensor],
    counts: bool,
    fills: Sequence[float],
    inputs: Inputs,
    *more: Tensor,
) -> None:
    """What does such a pass again whole, for `autograd` to find: see `Again`. fills: where nobody writes, which is
    between packed sequences."""
    # All must be said of a pass once its tensors' layouts are known; lists of tiles belong to what a mask holds.
    if tape is None or memory is None or region(problem.mask).rest:
        return
    again = memory.setdefault(AGAIN, Again(inputs, made, counts, fills if problem.varlen else ()))
    again.note(tape, inputs, *more)


def _stats(inputs: Inputs, problem: Problem, fill: float) -> Tensor:
    """Memory for one number a query, (batch, heads, seqlen_q), packed (heads, total); `fill` where no kernel writes."""
    q = inputs.q
    if problem.varlen:
        return torch.full((problem.heads, len(q)), fill, dtype=torch.float32, device=q.device)
    return memory_for((problem.batch, problem.heads, problem.seqlen_q), torch.float32, q.device)


def _sums(inputs: Inputs, problem: Problem, config: BackwardConfig) -> Tensor:
    """Memory for the sums of dQ, (heads of all batch entries, query tiles, rows, columns): see `sums`."""
    tiles = programs_of(problem, inputs.q.shape[-3], config.tile_q)
    numbers = config.tile_q * block(problem.headdim)
    shape = problem.heads * entries(problem), tiles, numbers // PIECE_COLUMNS.value, PIECE_COLUMNS.value
    return memory_for(shape, torch.float32, inputs.q.device)


def backward(
    inputs: Inputs,
    problem: Problem,
    config: BackwardConfig,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    machine: Machine | None = None,
    memory: dict[Any, Any] | None = None,
) -> Gradients:
    """The gradients of q, k and v, of sinks, and of what functions captured."""
    q, k, v = inputs.q, inputs.k, inputs.v
    grads = zero_grads(inputs, problem)
    totals = [None if total is None else total.float() for total in grads.score]
    grad_out = _incoming(grad_out, out, q.dtype)
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = unwritten(q, problem), unwritten(k, problem), unwritten(v, problem)
    delta = _stats(inputs, problem, 0.0) if problem.varlen else torch.empty_like(lse)
    # Where dQ is summed, or the number of the next tile of its own kernel.
    sums = _sums(inputs, problem, config) if config.queries is None else None
    beside_it = counter(q.device) if sums is None else sums
    slope = None if grads.alibi_slopes is None else _stats(inputs, problem, 0.0)
    pairs = None if grads.bias is None or not problem.batch else _bias_sums(problem, grads.bias)
    # Its kernel reads rows of statistics whole; where they are not padded, it gets copies, which no tape knows.
    taped = is_padded(lse) and is_padded(delta)

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine, inputs, problem, config, tape, totals)
        _before(call, out, grad_out, grad_lse, delta, sums)
        _through(call, grad_out, lse, delta, sums, dk, dv)
        if pairs is not None and taped:
            _bias_gradient(call, grad_out, lse, delta, pairs)
        if sums is None:
            of_queries = Call.of(machine, inputs, problem, config.queries, tape, totals)
            _queries(of_queries, grad_out, lse, delta, dq, slope, beside_it)
            return
        programs, where = call.tiles(keys=False)
        given = {"sums": sums, "dq": rows_of(dq), "scale": problem.scale, **_plain(where)}
        call.launch(after_kernel, programs, given)

    lists = lists_of(machine, inputs, problem, config, True)
    if config.queries is not None:
        lists += lists_of(machine, inputs, problem, config.queries, False)
    # What was saved may come back with other strides: hooks copy it.
    given = (*tensors_of(inputs), out, lse, grad_out, *(() if grad_lse is None else (grad_lse,)))
    others = (slope, *totals)
    written = (dq, dk, dv, delta, beside_it, *[each for each in others if each is not None])
    if pairs is not None and taped:
        written += (pairs.partial,)
    tape = perform(launches, (*given, *written, *lists), memory, len(given))
    if grad_lse is None and not problem.wanted.more:
        made = written[:4] if sums is None else written[:5]
        _leave(memory, tape, problem, made, sums is None, (0.0,) * 4, inputs, out, lse, grad_out)
    _add_small(inputs, grads, lse, delta, slope)
    if pairs is not None:
        if not taped:
            call = Call.of(machine, inputs, problem, config, totals=totals)
            _bias_gradient(call, grad_out, lse, delta, pairs)
        pairs.join()
    return Gradients(dq, dk, dv, grads.bias, grads.alibi_slopes, grads.sinks, totals)


def _incoming(grad_out: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """dO as descriptors take it."""
    if grad_out is None:
        return torch.zeros_like(out, dtype=dtype)
    if grad_out.dtype is not dtype:
        grad_out = grad_out.to(dtype)
    # A copy even of what lies dense, but begins at no multiple of 16 bytes.
    return grad_out if described(grad_out) else grad_out.clone(memory_format=torch.contiguous_format)


def _add_small(inputs: Inputs, grads: Grads, lse: Tensor, delta: Tensor, slope: Tensor | None) -> None:
    """Adds the gradients that have a number a head, from numbers for each query."""
    if inputs.sinks is not None and grads.sinks is not None:
        grads.sinks -= sink_gradient(inputs.sinks, lse, delta)
    if slope is not None and grads.alibi_slopes is not None:
        grads.alibi_slopes += slope_gradient(slope, grads.alibi_slopes, inputs.cu_seqlens_q)


def _bias_config(problem: Problem) -> BiasConfig:
    return bias_config(max(problem.headdim, problem.headdim_v))


def _bias_sums(problem: Problem, total: Tensor) -> bias.Sums:
    """Where the gradient of the bias is added up."""
    tile = _bias_config(problem).tile
    return bias.Sums.of(problem, total, tile, tile)


def _bias_gradient(call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, sums: bias.Sums) -> None:
    """Adds the gradient of the bias up."""
    inputs, config = call.inputs, _bias_config(call.problem)
    call = replace(call, meta=replace(call.meta, tile_q=config.tile, tile_kv=config.tile))
    given = {
        **{name: rows_of(getattr(inputs, name)) for name in "qkv"},
        "grad_out": rows_of(grad_out),
        "lse": stats_of(padded(lse, -torch.inf)),
        "delta": stats_of(padded(delta, 0.0)),
        **call.shared,
        **call.functions,
        **sums.given,
    }
    call.launch(bias_kernel, sums.programs, given, **config.options())


def _queries(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, slope: Tensor | None, number: Tensor
) -> None:
    """dQ, by its own kernel, and what each query adds to the gradient of its slope."""
    inputs, meta, rows = call.inputs, call.meta, ROWS.value
    total, where = call.tiles(keys=False)
    given = {
        "q_desc": descriptor(inputs.q, rows, meta.strip),
        "k_desc": descriptor(inputs.k, meta.tile_kv, meta.strip),
        "v_desc": descriptor(inputs.v, meta.tile_kv, meta.block_dv),
        "do_desc": descriptor(grad_out, rows, meta.block_dv),
        "dq_desc": descriptor(dq, rows, meta.strip),
        "lse": numbers_of(lse),
        "delta": numbers_of(delta),
        "dq": rows_of(dq) if meta.packed else None,
        "slope": None if slope is None else numbers_of(slope),
        "counter": number,
        "section": call.section(),
        "total": total,
        **where,
        **call.lists(keys=False),
        **call.functions,
    }
    call.launch(query_kernel, call.machine.programs(total, inputs.q.device), given, **call.warps())


def _plain(where: dict[str, Any]) -> dict[str, Any]:
    """What kernels need that ask nothing of scores."""
    return {name: where[name] for name in ("packing", "size")}


def _before(
    call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor, sums: Tensor | None
) -> None:
    """rowsum(dO * O) - dlse, and zeros for the sums of dQ."""
    programs, where = call.tiles(keys=False)
    given = {
        "out": rows_of(out),
        "grad_out": rows_of(grad_out),
        "grad_lse": None if grad_lse is None else numbers_of(grad_lse),
        "delta": numbers_of(delta),
        "sums": sums,
        **_plain(where),
    }
    call.launch(before_kernel, programs, given)


def _through(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, sums: Tensor | None, dk: Tensor, dv: Tensor
) -> None:
    """dK, dV and, where there are any, the sums of dQ."""
    inputs, meta, rows = call.inputs, call.meta, ROWS.value
    programs, where = call.tiles(keys=True)
    pairs = call.problem.heads_kv * entries(call.problem)
    section = heads_in_cache(call.problem, inputs.q.shape[-3])
    sections, grid = grid_of_keys(programs // max(pairs, 1), pairs, section, meta.sections)
    given = {
        "q_desc": descriptor(inputs.q, meta.tile_q, meta.strip),
        "k_desc": descriptor(inputs.k, meta.tile_kv, meta.strip),
        "v_desc": descriptor(inputs.v, meta.tile_kv, meta.block_dv),
        "do_desc": descriptor(grad_out, meta.tile_q, meta.block_dv),
        "sums_desc": None if sums is None else piece_descriptor(sums),
        "dk_desc": descriptor(dk, rows, meta.strip),
        "dv_desc": descriptor(dv, rows, meta.block_dv),
        "lse": numbers_of(lse),
        "delta": numbers_of(delta),
        "dk": rows_of(dk) if meta.packed else None,
        "dv": rows_of(dv) if meta.packed else None,
        **where,
        **call.lists(keys=True),
        **call.functions,
    }
    ordered = replace(call, meta=replace(meta, sections=sections))
    ordered.launch(backward_kernel, grid, given, **call.warps())
