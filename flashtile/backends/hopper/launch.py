"""Launches: descriptors over the caller's tensors, and the grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import Gradients
from flashtile.backends.hopper.backward import backward_kernel
from flashtile.backends.hopper.forward import ROWS, forward_kernel
from flashtile.problem import Inputs, Problem, described
from flashtile.region import region
from flashtile.tuning.hopper import BackwardConfig, HopperConfig

REGISTERS = {2: 168, 3: 128}
"""Registers a thread that a kernel is compiled for, by consumers; they trade among the warps once it runs."""


@dataclass(frozen=True)
class Meta:
    """What a kernel is compiled for, beside types: see the configs of `tuning.hopper`, and `Problem`.

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


def meta_of(problem: Problem, config: HopperConfig | BackwardConfig) -> Meta:
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
        dynamic=right is not None and not problem.backward,
        q_in_registers=isinstance(config, HopperConfig) and config.q_in_registers,
    )


def limits_of(problem: Problem) -> tuple[int, int]:
    """The window's numbers, 0 where it has none."""
    left, right, _, _ = region(problem.mask)
    return left or 0, right or 0


def block(headdim: int) -> int:
    """Columns of a tile: a power of two; the copy engine fills what the tensor lacks with zeros."""
    return max(64, 1 << (headdim - 1).bit_length())


_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def options(config: HopperConfig | BackwardConfig) -> dict[str, Any]:
    """What the compiler is told."""
    return {"num_warps": 4, "maxnreg": REGISTERS[config.consumers], "enable_fp_fusion": True}


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Tiles of `rows` of one head of a (batch, seqlen, heads, headdim) tensor."""
    shape = [1, rows, 1, columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, _TYPES[tensor.dtype])
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), shape, layout)


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
    meta, rows = meta_of(problem, config), ROWS.value
    tiles = -(-problem.seqlen_q // config.tile_q) * problem.batch * problem.heads
    given = (
        descriptor(q, rows, meta.block_d),
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
        *limits_of(problem),
        problem.scale * math.log2(math.e),
        meta,
    )
    machine.launch(forward_kernel, machine.programs(tiles, q.device), given, options(config))
    return out, lse


def backward(
    inputs: Inputs,
    problem: Problem,
    config: BackwardConfig,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    machine: Machine = Machine(),
) -> Gradients:
    """The gradients of q, k and v."""
    q, k, v = inputs.q, inputs.k, inputs.v
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if not described(grad_out):
        grad_out = grad_out.contiguous()
    # delta = rowsum(dO * O) - dlse, as (batch, heads, seqlen_q).
    delta = (out.float() * grad_out).sum(-1).transpose(1, 2)
    delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=q.device) for tensor in (k, v))
    meta, rows = meta_of(problem, config), ROWS.value
    given = (
        descriptor(q, meta.tile_q, meta.block_d),
        descriptor(k, meta.tile_kv, meta.block_d),
        descriptor(v, meta.tile_kv, meta.block_dv),
        descriptor(grad_out, meta.tile_q, meta.block_dv),
        descriptor(dq, rows, rows),
        descriptor(dk, rows, meta.block_d),
        descriptor(dv, rows, meta.block_dv),
        lse.contiguous(),
        delta,
        problem.seqlen_q,
        problem.seqlen_kv,
        problem.heads_kv,
        *limits_of(problem),
        problem.scale,
        meta,
    )
    programs = -(-problem.seqlen_kv // meta.tile_kv) * problem.batch * problem.heads_kv
    machine.launch(backward_kernel, programs, given, options(config))
    return Gradients((dq * problem.scale).to(q.dtype), dk, dv)
