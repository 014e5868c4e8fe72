"""Launches: descriptors over the caller's tensors, and the grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper.forward import ROWS, forward_kernel
from flashtile.problem import Inputs, Problem
from flashtile.region import region
from flashtile.tuning.hopper import HopperConfig

REGISTERS = {2: 168, 3: 128}
"""Registers a thread that a kernel is compiled for, by consumers; they trade among the warps once it runs."""


@dataclass(frozen=True)
class Meta:
    """What a kernel is compiled for, beside types: see `HopperConfig` and `Problem`.

    left, right: whether the window ends on that side. dynamic: tiles go to whoever is done first.
    """

    tile_q: int
    tile_kv: int
    consumers: int
    stages: int
    block_d: int
    block_dv: int
    group: int
    left: bool
    right: bool
    top_left: bool
    dynamic: bool
    q_in_registers: bool


def meta_of(problem: Problem, config: HopperConfig) -> Meta:
    left, right, top_left, _ = region(problem.mask)
    return Meta(
        tile_q=config.tile_q,
        tile_kv=config.tile_kv,
        consumers=config.consumers,
        stages=config.stages,
        block_d=block(problem.headdim),
        block_dv=block(problem.headdim_v),
        group=problem.group,
        left=left is not None,
        right=right is not None,
        top_left=top_left,
        dynamic=right is not None,
        q_in_registers=config.q_in_registers,
    )


def block(headdim: int) -> int:
    """Columns of a tile: a power of two; the copy engine fills what the tensor lacks with zeros."""
    return max(64, 1 << (headdim - 1).bit_length())


def layout(shape: Sequence[int], dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(shape), gl.bfloat16 if dtype is torch.bfloat16 else gl.float16)


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Tiles of `rows` of one head of a (batch, seqlen, heads, headdim) tensor."""
    shape = [1, rows, 1, columns]
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), shape, layout(shape, tensor.dtype))


def arguments(
    inputs: Inputs, problem: Problem, config: HopperConfig, tiles: int, out: Tensor, lse: Tensor, counter: Tensor
) -> tuple[Any, ...]:
    """All that the kernel gets, in order; `tiles`: query tiles of all heads."""
    meta = meta_of(problem, config)
    left, right, _, _ = region(problem.mask)
    rows = ROWS.value
    return (
        descriptor(inputs.q, rows, meta.block_d),
        descriptor(inputs.k, meta.tile_kv, meta.block_d),
        descriptor(inputs.v, meta.tile_kv, meta.block_dv),
        descriptor(out, rows, meta.block_dv),
        lse,
        counter,
        problem.seqlen_q,
        problem.seqlen_kv,
        problem.heads,
        min(config.section, problem.batch * problem.heads),
        tiles,
        left or 0,
        right or 0,
        problem.scale * math.log2(math.e),
        meta,
    )


def on_device(kernel: Any, programs: int, given: Sequence[Any], options: dict[str, Any]) -> None:
    """Launches on the device of the tensors."""
    with torch.cuda.device(given[0].base.device):
        kernel[(programs,)](*given, **options)


class Machine(NamedTuple):
    """Where launches go, a device or an emulator in its place; processors: how many programs run at once there."""

    launch: Callable[[Any, int, Sequence[Any], dict[str, Any]], None] = on_device
    processors: int | None = None

    def programs(self, total: int, device: torch.device) -> int:
        there = self.processors or torch.cuda.get_device_properties(device).multi_processor_count
        return min(total, there)


def forward(
    inputs: Inputs, problem: Problem, config: HopperConfig, machine: Machine = Machine()
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q = inputs.q
    out = torch.empty((*q.shape[:-1], problem.headdim_v), dtype=problem.out_dtype, device=q.device)
    lse = torch.empty((problem.batch, problem.heads, problem.seqlen_q), dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    tiles = -(-problem.seqlen_q // config.tile_q) * problem.batch * problem.heads
    given = arguments(inputs, problem, config, tiles, out, lse, counter)
    options = {"num_warps": 4, "maxnreg": REGISTERS[config.consumers]}
    machine.launch(forward_kernel, machine.programs(tiles, q.device), given, options)
    return out, lse
