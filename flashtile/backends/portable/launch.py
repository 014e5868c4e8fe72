"""Launches: what a forward and a backward pass run, on which grid, into which memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashtile.backends import Gradients
from flashtile.backends.portable.backward import delta_kernel, key_kernel, query_kernel
from flashtile.backends.portable.forward import forward_kernel
from flashtile.backends.portable.meta import by_copy_engine, meta_of
from flashtile.kernels import bias, visits
from flashtile.kernels.arguments import (
    beside,
    empty_stats,
    functions_of,
    modified,
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
from flashtile.kernels.storage import kept
from flashtile.kernels.tape import Tape, perform, prepared
from flashtile.kernels.words import Packing, Rules
from flashtile.problem import Inputs, Problem
from flashtile.scores import sink_gradient, slope_gradient, zero_grads
from flashtile.tuning.portable import PortableConfig, Tiles, smaller

KERNELS = (forward_kernel, delta_kernel, query_kernel, key_kernel, bias_kernel)

_fitting: dict[Any, Tiles] = {}  # what was found to fit, by all that a kernel is compiled for


def forget_fitting() -> None:
    """For another device, which may hold more or less."""
    _fitting.clear()


def on_device(kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launches on the device of the first tensor; returns the compiled kernel."""
    with prepared(arguments[0].pointer.device), kept():
        return kernel[(programs,)](*arguments, **options, **tiles.options())


class Machine(NamedTuple):
    """Where launches go: to the device that holds the tensors, or to a compiler or an emulator that takes its place.

    copy_engine: whether it has NVIDIA's tensor memory accelerator; None: as the tensors' device.
    tape: what writes launches down.
    """

    launch: Callable[[Any, int, Tiles, tuple[Any, ...], dict[str, Any]], Any] = on_device
    copy_engine: bool | None = None
    tape: Tape | None = None


@dataclass(frozen=True)
class Call:
    """What all launches of one pass share."""

    machine: Machine
    inputs: Inputs
    problem: Problem
    listed: bool
    packing: Packing
    rules: Rules
    functions: dict[str, Any]
    eight: str = ""

    @classmethod
    def of(
        cls,
        machine: Machine,
        inputs: Inputs,
        problem: Problem,
        totals: Sequence[Tensor | None] | None = None,
        eight: str = "",
    ) -> "Call":
        """`totals`: where gradients of captured tensors go; None: this is a forward pass. `eight`: see `Meta`."""
        functions, arguments = functions_of(inputs, problem, totals)
        return cls(
            machine,
            inputs,
            problem,
            visits.listed(inputs, problem),
            packing_of(inputs),
            rules_of(inputs, problem, *arguments),
            functions,
            eight,
        )

    def launch(self, kernel: Any, tiles: Tiles, tensors: Sequence[Any], gives: str | None = None, **more: Any) -> None:
        """One program a tile and head: of queries, or of keys for a kernel that `gives` dK, dV or both."""
        problem, inputs = self.problem, self.inputs
        keys = gives is not None
        heads = problem.heads_kv if keys else problem.heads
        total = (inputs.k if keys else inputs.q).shape[-3]
        tma = not problem.scaled and by_copy_engine(tensors[:4], self.machine.copy_engine)
        meta = partial(
            meta_of, problem, listed=self.listed, keys=keys, tma=tma, gives=gives or "both", eight=self.eight
        )

        def attempt(tiles: Tiles) -> None:
            count = programs_of(problem, total, tiles.tile_kv if keys else tiles.tile_q)
            self.run(
                kernel,
                count * heads * (1 if problem.varlen else problem.batch),
                tiles,
                *tensors,
                self.packing,
                size_of(problem, heads, count),
                self.rules,
                visits.of(inputs, problem, tiles.tile_q, tiles.tile_kv, keys) if self.listed else None,
                **self.functions,
                **more,
                META=meta(tiles),
                enable_fp_fusion=self.fused(),
            )

        self.fit(kernel, tiles, attempt, meta(tiles))

    def run(self, kernel: Any, programs: int, tiles: Tiles, *arguments: Any, **options: Any) -> None:
        """Nothing to do is no launch."""
        if programs == 0:
            return
        compiled = self.machine.launch(kernel, programs, tiles, arguments, options)
        if self.machine.tape is not None:
            named = [options[parameter.name] for parameter in kernel.params[len(arguments) :]]
            self.machine.tape.record(compiled, programs, (*arguments, *named))

    def fit(self, kernel: Any, tiles: Tiles, attempt: Callable[[Tiles], None], *compiled_for: Any) -> None:
        """Launches with these tiles, or the largest smaller ones that fit into the device's shared memory."""
        key = (kernel, tiles, self.problem.device, self.problem.arch, *self.functions.values(), *compiled_for)
        for candidate in smaller(_fitting.get(key, tiles)):
            try:
                attempt(candidate)
            except triton.OutOfResources:
                continue
            _fitting[key] = candidate
            return
        raise NotImplementedError(
            f"portable: no tile of headdim {self.problem.headdim} and {self.problem.headdim_v} fits into the shared "
            "memory of this device with these functions and biases. Use backend='pytorch'."
        )

    def fused(self) -> bool:
        """Whether multiply-adds may round once. Modified float32 scores must come out the same in all kernels: where
        they are large, the backward pass would otherwise meet other weights than the forward pass summed up."""
        return not (modified(self.problem) and self.problem.dtype is torch.float32)


def stats(inputs: Inputs, problem: Problem, fill: float) -> Tensor:
    """Memory for one number a query, (batch, heads, seqlen_q), packed (heads, total); `fill` where no kernel writes."""
    dense = (problem.batch, problem.heads, problem.seqlen_q)
    shape = (problem.heads, len(inputs.q)) if problem.varlen else dense
    return empty_stats(shape, fill, inputs.q.device, written=not problem.varlen)


def forward(
    inputs: Inputs,
    problem: Problem,
    config: PortableConfig,
    machine: Machine = Machine(),
    memory: dict[Any, Any] | None = None,
    eight: str = "",
) -> tuple[Tensor, Tensor]:
    """(out, lse); `eight`: see `Meta`."""
    q, k, v = inputs.q, inputs.k, inputs.v
    out = outputs_of(inputs, problem)
    lse = stats(inputs, problem, -torch.inf)

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine._replace(tape=tape), inputs, problem, eight=eight)
        tensors = (rows_of(q), rows_of(k), values_of(inputs), rows_of(out), stats_of(lse))
        scales = tuple(map(numbers_of, inputs.scaled[:3])) or None
        call.launch(forward_kernel, config.forward, tensors, sinks=inputs.sinks, scales=scales)

    lists = visits.tensors_of(inputs, problem, *config.forward[:2], False)
    perform(launches, (q, k, v, out, lse, *lists, *beside(inputs)), memory)
    return out, lse.contiguous()


def backward(
    inputs: Inputs,
    problem: Problem,
    config: PortableConfig,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    machine: Machine = Machine(),
    memory: dict[Any, Any] | None = None,
) -> Gradients:
    """The gradients that `problem.wanted` names, and those of q, k and v."""
    grads = zero_grads(inputs, problem)
    # Added up in any order: in float64, where the other sums are as good as float32.
    exact = torch.float64 if problem.dtype is torch.float32 else torch.float32
    totals = [None if total is None else total.to(exact) for total in grads.score]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    lse, delta = padded(lse, -torch.inf), stats(inputs, problem, 0.0)
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = unwritten(q, problem), unwritten(k, problem), unwritten(v, problem)
    slope = stats(inputs, problem, 0.0) if grads.alibi_slopes is not None else lse

    def launches(tape: Tape | None) -> None:
        call = Call.of(machine._replace(tape=tape), inputs, problem, totals)
        _delta(call, config, out, grad_out, grad_lse, delta)
        saved = _saved(inputs, grad_out, lse, delta)
        call.launch(query_kernel, config.query, (*saved, rows_of(dq), stats_of(slope)))
        for gives, tiles in config.passes_over_keys().items():
            call.launch(key_kernel, tiles, (*saved, rows_of(dk), rows_of(dv)), gives)

    lists = [*visits.tensors_of(inputs, problem, *config.query[:2], False)]
    for tiles in config.passes_over_keys().values():
        lists += visits.tensors_of(inputs, problem, *tiles[:2], True)
    written = (delta, dq, dk, dv, slope if slope is not lse else None, *totals)
    # What was saved may come back with other strides: hooks copy it.
    given = (q, k, v, out, lse, grad_out, grad_lse, *beside(inputs))
    perform(launches, (*given, *written, *lists), memory, len(given))
    if grads.bias is not None and problem.batch:
        call = Call.of(machine, inputs, problem, totals)
        _bias_gradient(call, config.bias or config.query, _saved(inputs, grad_out, lse, delta), grads.bias)
    if inputs.alibi_slopes is not None and grads.alibi_slopes is not None:
        grads.alibi_slopes += slope_gradient(slope, inputs.alibi_slopes, inputs.cu_seqlens_q)
    if inputs.sinks is not None and grads.sinks is not None:
        grads.sinks -= sink_gradient(inputs.sinks, lse, delta)
    return Gradients(dq, dk, dv, grads.bias, grads.alibi_slopes, grads.sinks, totals)


def _saved(inputs: Inputs, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Any, ...]:
    """What all backward kernels read."""
    tensors = [rows_of(tensor) for tensor in (inputs.q, inputs.k, inputs.v, grad_out)]
    return (*tensors, stats_of(lse), stats_of(delta))


def _delta(
    call: Call, config: PortableConfig, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor
) -> None:
    """rowsum(dO * O) - dlse."""
    problem, tiles = call.problem, config.query
    count = programs_of(problem, call.inputs.q.shape[-3], tiles.tile_q)
    call.run(
        delta_kernel,
        count * problem.heads * (1 if problem.varlen else problem.batch),
        tiles,
        rows_of(out),
        rows_of(grad_out),
        None if grad_lse is None else stats_of(padded(grad_lse, 0.0)),
        stats_of(delta),
        call.packing,
        size_of(problem, problem.heads, count),
        META=meta_of(problem, tiles, call.listed, False, False),
        enable_fp_fusion=True,
    )


def _bias_gradient(call: Call, tiles: Tiles, saved: tuple[Any, ...], total: Tensor) -> None:
    """Adds the gradient of the bias to `total`. A thread holds half a dozen tiles' numbers at once, so it gets 16 of
    each at most."""
    problem = call.problem
    tiles = tiles._replace(warps=max(tiles.warps, tiles.tile_q * tiles.tile_kv // 512))

    def attempt(tiles: Tiles) -> None:
        sums = bias.Sums.of(problem, total, tiles.tile_q, tiles.tile_kv)
        meta = meta_of(problem, tiles, call.listed, False, False)
        named = {"packing": call.packing, "rules": call.rules, **call.functions, **sums.given, "META": meta}
        call.run(bias_kernel, sums.programs, tiles, *saved, **named, enable_fp_fusion=call.fused())
        sums.join()

    call.fit(bias_kernel, tiles, attempt)
