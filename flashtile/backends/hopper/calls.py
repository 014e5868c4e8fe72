"""What all launches of one pass share: where they go, their arguments' words, and the grids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.backends.hopper.meta import Meta, meta_of
from flashtile.kernels import visits
from flashtile.kernels.arguments import functions_of, packing_of, programs_of, rules_of, size_of
from flashtile.kernels.storage import kept
from flashtile.kernels.tape import Grid, Tape, grid_of, prepared
from flashtile.problem import Inputs, Problem
from flashtile.tuning.hopper import CACHED, Config

REGISTERS = {2: 168, 3: 128}
"""Registers a thread that a kernel is compiled for, by consumers; they trade among the warps once it runs."""


def on_device(kernel: Any, programs: int | Grid, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """Launches on the current device; returns the compiled kernel."""
    with kept():
        return kernel[grid_of(programs)](*arguments, **options)


class Machine(NamedTuple):
    """Where launches go, a device or an emulator in its place; processors: how many programs run at once there."""

    launch: Callable[[Any, int | Grid, Sequence[Any], dict[str, Any]], Any] = on_device
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


MOST = 65535
"""Programs that a grid has along its second and its third side at most."""


@lru_cache
def grid_of_keys(tiles: int, pairs: int, section: int, sections: bool) -> tuple[bool, Grid]:
    """(whether tiles of several heads are handed out together, the grid) for this many tiles of each pair of a batch
    entry and a head. Its sides spare programs the arithmetic of finding themselves; the first counts fastest.

    `sections`: pairs are to give their first tiles together, then their second and so on, about `section` of them; as
    many as leave no remainder.
    """
    if 0 in (tiles, pairs):
        return sections, (0, 0, 0)
    if (sections and tiles <= MOST) or pairs > MOST:
        sides = [side for side in range(1, pairs + 1) if pairs % side == 0 and pairs // side <= MOST]
        side = min(sides, key=lambda side: abs(math.log(side / section)))
        return True, (side, tiles, pairs // side)
    return False, (tiles, pairs, 1)


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

    def launch(self, kernel: Any, programs: int | Grid, given: dict[str, Any], **options: Any) -> None:
        """Nothing to do is no launch."""
        if 0 in grid_of(programs):
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


def _maker(machine: Machine | None, inputs: Inputs, problem: Problem, config: Config, keys: bool) -> visits.Maker:
    """Of a mask's bits; what it launches stands on no tape."""

    def launch(kernel: Any, programs: int, given: dict[str, Any]) -> None:
        call = Call.of(machine, inputs, problem, config)
        _, where = call.tiles(keys)
        call.launch(kernel, programs, {**where, **call.functions, **given, "KEYS": keys})

    return visits.Maker(launch, machine or DEVICE)


def lists_of(
    machine: Machine | None, inputs: Inputs, problem: Problem, config: Config, keys: bool
) -> tuple[Tensor | None, ...]:
    """The tensors of the lists of tiles, where the mask is no window."""
    if not visits.listed(inputs, problem):
        return ()
    maker = _maker(machine, inputs, problem, config, keys)
    return visits.tensors_of(inputs, problem, config.tile_q, config.tile_kv, keys, maker)
