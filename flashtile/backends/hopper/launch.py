"""Launches: arguments and the grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.backends import AGAIN, Gradients
from flashtile.backends.hopper.around import after_kernel, before_kernel
from flashtile.backends.hopper.backward import backward_kernel
from flashtile.backends.hopper.descriptors import descriptor, piece_descriptor, value_descriptor
from flashtile.backends.hopper.forward import forward_kernel
from flashtile.backends.hopper.meta import Meta, block, meta_of
from flashtile.backends.hopper.queries import query_kernel
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.sums import PIECE_COLUMNS
from flashtile.kernels import bias, visits
from flashtile.kernels.again import Again, tensors_of
from flashtile.kernels.arguments import (
    functions_of,
    is_padded,
    memory_for,
    numbers_of,
    outputs_of,
    packing_of,
    padded,
    programs_of,
    rows_of,
    rules_of,
    size_of,
    stats_of,
    unwritten,
    values_of,
)
from flashtile.kernels.bias import bias_kernel
from flashtile.kernels.bits import bits_kernel
from flashtile.kernels.storage import kept
from flashtile.kernels.tape import Tape, perform, prepared
from flashtile.problem import Inputs, Problem, described
from flashtile.queues import counter
from flashtile.region import region
from flashtile.scores import sink_gradient, slope_gradient, zero_grads
from flashtile.tuning.hopper import CACHED, BackwardConfig, BiasConfig, Config, HopperConfig, bias_config

KERNELS = (forward_kernel, before_kernel, backward_kernel, query_kernel, after_kernel, bias_kernel, bits_kernel)

REGISTERS = {2: 168, 3: 128}
"""Registers a thread that a kernel is compiled for, by consumers; they trade among the warps once it runs."""


def on_device(kernel: Any, programs: int, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """Launches on the current device; returns the compiled kernel."""
    with kept():
        return kernel[(programs,)](*arguments, **options)


class Machine(NamedTuple):
    """Where launches go, a device or an emulator in its place; processors: how many programs run at once there."""

    launch: Callable[[Any, int, Sequence[Any], dict[str, Any]], Any] = on_device
    processors: int | None = None

    def programs(self, total: int, device: torch.device) -> int:
        """Of a kernel whose programs take one tile after the other."""
        return min(total, self.processors or _processors(device))

    def room(self) -> int:
        """Programs that run at once on the current device."""
        return self.processors or _processors(torch.device("cuda", torch.cuda.current_device()))


DEVICE = Machine()
"""Where launches go if nobody says otherwise: to the device that holds the tensors."""


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def entries(problem: Problem) -> int:
    """Of the batch, as programs are counted: packed sequences are one."""
    return 1 if problem.varlen else problem.batch


def heads_in_cache(problem: Problem, rows: int) -> int:
    """Heads of keys whose tiles the backward kernel hands out together: the queries, gradients and sums of dQ of so
    many fit into the L2 cache."""
    row = (problem.headdim + problem.headdim_v) * problem.dtype.itemsize + problem.headdim * torch.float32.itemsize
    return max(1, min(CACHED // (problem.group * rows * row), problem.heads_kv * entries(problem)))


@dataclass(frozen=True)
class Call:
    """What all launches of one pass share."""

    machine: Machine
    tape: Tape | None
    inputs: Inputs
    problem: Problem
    config: Any
    meta: Meta
    shared: dict[str, Any]
    functions: dict[str, Any]

    @classmethod
    def of(
        cls,
        machine: Machine | None,
        inputs: Inputs,
        problem: Problem,
        config: Any,
        tape: Tape | None = None,
        totals: Sequence[Tensor | None] | None = None,
    ) -> "Call":
        """`totals`: where gradients of captured tensors go; None: this is a forward pass."""
        functions, arguments = functions_of(inputs, problem, totals)
        meta = meta_of(problem, config, visits.listed(inputs, problem))
        shared = {"packing": packing_of(inputs), "rules": rules_of(inputs, problem, *arguments)}
        return cls(machine or DEVICE, tape, inputs, problem, config, meta, shared, functions)

    def tiles(self, keys: bool) -> tuple[int, dict[str, Any]]:
        """(how many tiles of queries or keys there are, of all heads; what tells a kernel where they lie)."""
        problem, config = self.problem, self.config
        rows, tile, heads = self.inputs.q.shape[-3], config.tile_q, problem.heads
        if keys:
            rows, tile, heads = self.inputs.k.shape[-3], config.tile_kv, problem.heads_kv
        count = programs_of(problem, rows, tile)
        return count * heads * entries(problem), {**self.shared, "size": size_of(problem, heads, count)}

    def section(self) -> int:
        """Heads whose tiles are handed out together."""
        return int(min(self.config.section, self.problem.heads * entries(self.problem)))

    def lists(self, keys: bool) -> dict[str, Any]:
        """Which tiles a tile meets, where the mask is no window."""
        if self.meta.masked != "lists":
            return {"visits": None}
        tiles = self.config.tile_q, self.config.tile_kv
        maker = _maker(self.machine, self.inputs, self.problem, self.config, keys)
        return {"visits": visits.of(self.inputs, self.problem, *tiles, keys, maker)}

    def launch(self, kernel: Any, programs: int, given: dict[str, Any], **options: Any) -> None:
        """Nothing to do is no launch."""
        if programs == 0:
            return
        given = {**given, "META": self.meta}
        arguments = [given[parameter.name] for parameter in kernel.params]
        with prepared(self.inputs.q.device):
            compiled = self.machine.launch(kernel, programs, arguments, {"enable_fp_fusion": True, **options})
        if self.tape is not None:
            self.tape.record(compiled, programs, arguments)

    def warps(self) -> dict[str, Any]:
        """What the compiler is told of specialised warps: those of one group."""
        return {"num_warps": 4, "maxnreg": REGISTERS[self.config.consumers]}


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
    number = counter(q.device)

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine, inputs, problem, config, tape)
        total, where = call.tiles(keys=False)
        meta, rows = call.meta, ROWS.value
        given = {
            "q_desc": descriptor(q, rows, meta.block_d),
            "k_desc": descriptor(k, meta.tile_kv, meta.block_d),
            "v_desc": value_descriptor(v, meta),
            "o_desc": descriptor(out, rows, meta.block_dv // 2 if meta.halves else meta.block_dv),
            "sources": (rows_of(q), rows_of(k), values_of(inputs)) if meta.careful else None,
            "scales": tuple(map(numbers_of, inputs.scaled[:3])) if meta.eight else None,
            "out": rows_of(out) if problem.varlen else None,
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

    lists = _lists(machine, inputs, problem, config, False)
    tape = perform(launches, (*tensors_of(inputs), out, lse, number, *lists), memory)
    if tape is not None and memory is not None and _settled(problem):
        # Between packed sequences nobody writes.
        fills = (0.0, -torch.inf) if problem.varlen else ()
        again = memory.setdefault(AGAIN, Again(inputs, (out, lse), counts=True, fills=fills))
        again.note(tape, inputs)
    return out, lse


def _settled(problem: Problem) -> bool:
    """Whether all is said of a pass once its tensors' layouts are known. Lists of tiles belong to what a mask holds."""
    return not region(problem.mask).rest


def _maker(machine: Machine | None, inputs: Inputs, problem: Problem, config: Config, keys: bool) -> visits.Maker:
    """Of a mask's bits; what it launches stands on no tape."""

    def launch(kernel: Any, programs: int, given: dict[str, Any]) -> None:
        call = Call.of(machine, inputs, problem, config)
        _, where = call.tiles(keys)
        call.launch(kernel, programs, {**where, **call.functions, **given, "KEYS": keys})

    return visits.Maker(launch, machine or DEVICE)


def _lists(
    machine: Machine | None, inputs: Inputs, problem: Problem, config: Config, keys: bool
) -> tuple[Tensor | None, ...]:
    """The tensors of the lists of tiles, where the mask is no window."""
    if not visits.listed(inputs, problem):
        return ()
    maker = _maker(machine, inputs, problem, config, keys)
    return visits.tensors_of(inputs, problem, config.tile_q, config.tile_kv, keys, maker)


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
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_out.dtype is not q.dtype:
        grad_out = grad_out.to(q.dtype)
    if not described(grad_out):
        # A copy even of what lies dense, but begins at no multiple of 16 bytes.
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
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

    lists = _lists(machine, inputs, problem, config, True)
    if config.queries is not None:
        lists += _lists(machine, inputs, problem, config.queries, False)
    # What was saved may come back with other strides: hooks copy it.
    given = (*tensors_of(inputs), out, lse, grad_out, *(() if grad_lse is None else (grad_lse,)))
    written = (dq, dk, dv, delta, beside_it, *(() if slope is None else (slope,)), *totals)
    if pairs is not None and taped:
        written += (pairs.partial,)
    tape = perform(launches, (*given, *written, *lists), memory, len(given))
    if tape is not None and memory is not None and _settled(problem) and grad_lse is None and not any(problem.wanted):
        made = written[:4] if sums is None else written
        fills = (0.0,) * 4 if problem.varlen else ()
        again = memory.setdefault(AGAIN, Again(inputs, made, sums is None, fills))
        again.note(tape, inputs, out, lse, grad_out)
    if inputs.sinks is not None and grads.sinks is not None:
        grads.sinks -= sink_gradient(inputs.sinks, lse, delta)
    if slope is not None and grads.alibi_slopes is not None:
        grads.alibi_slopes += slope_gradient(slope, grads.alibi_slopes, inputs.cu_seqlens_q)
    if pairs is not None:
        if not taped:
            call = Call.of(machine, inputs, problem, config, totals=totals)
            _bias_gradient(call, grad_out, lse, delta, pairs)
        pairs.join()
    return Gradients(dq, dk, dv, grads.bias, grads.alibi_slopes, grads.sinks, totals)


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
        "q_desc": descriptor(inputs.q, rows, meta.block_d),
        "k_desc": descriptor(inputs.k, meta.tile_kv, meta.block_d),
        "v_desc": descriptor(inputs.v, meta.tile_kv, meta.block_dv),
        "do_desc": descriptor(grad_out, rows, meta.block_dv),
        "dq_desc": descriptor(dq, rows, meta.block_d),
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
    given = {
        "q_desc": descriptor(inputs.q, meta.tile_q, meta.block_d),
        "k_desc": descriptor(inputs.k, meta.tile_kv, meta.block_d),
        "v_desc": descriptor(inputs.v, meta.tile_kv, meta.block_dv),
        "do_desc": descriptor(grad_out, meta.tile_q, meta.block_dv),
        "sums_desc": None if sums is None else piece_descriptor(sums),
        "dk_desc": descriptor(dk, rows, meta.block_d),
        "dv_desc": descriptor(dv, rows, meta.block_dv),
        "lse": numbers_of(lse),
        "delta": numbers_of(delta),
        "section": heads_in_cache(call.problem, inputs.q.shape[-3]),
        "dk": rows_of(dk) if meta.packed else None,
        "dv": rows_of(dv) if meta.packed else None,
        **where,
        **call.lists(keys=True),
        **call.functions,
    }
    call.launch(backward_kernel, programs, given, **call.warps())
