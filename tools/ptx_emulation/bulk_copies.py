"""Bulk copies: TMA loads, stores and reductions of boxes of a tensor, and copies of plain runs of bytes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.ptx_emulation.access import Access, Effect, items
from tools.ptx_emulation.barriers import complete_bytes
from tools.ptx_emulation.errors import EmuError
from tools.ptx_emulation.formats import I32, PTX_TYPES, U16, U32, U64, UNSIGNED, Array, bf2f, f2bf
from tools.ptx_emulation.machine import Operation, Warp
from tools.ptx_emulation.memory import SHARED_BASE, Mask, active, check_fenced, resolve
from tools.ptx_emulation.parse import Instruction, Memory, Operand
from tools.ptx_emulation.tensor_maps import REDUCTIONS, TensorMap


def copy(access: Access) -> Effect:
    """cp.async.bulk and cp.reduce.async.bulk."""
    if "commit_group" in access.parts:
        return _commit
    if "wait_group" in access.parts:
        return _wait(access.number(access.operands[0]))
    if "prefetch" in access.parts:
        return lambda warp, mask: None
    spaces = [part for part in access.parts if part.split("::")[0] in ("shared", "global")]
    to_shared = spaces[0].startswith("shared")
    reduction = access.one_of(tuple(REDUCTIONS)) if access.parts[1] == "reduce" else None
    if "tensor" in access.parts:
        return _tensor_load(access) if to_shared else _tensor_store(access, reduction)
    if to_shared and not spaces[1].startswith("global"):
        raise access.unsupported()
    return _plain_load(access) if to_shared else _plain_store(access, reduction)


def _commit(warp: Warp, mask: Mask) -> None:
    warp.bulk_groups.append(warp.bulk_open)
    warp.bulk_open = []


def _wait(left: int) -> Effect:
    def run(warp: Warp, mask: Mask) -> None:
        while len(warp.bulk_groups) > left:
            for operation in warp.bulk_groups.pop(0):
                operation.run()

    return run


def _issue_load(warp: Warp, barrier: int, operation: Operation, memory: Array, place: Any) -> None:
    """Loads land when their mbarrier is waited for, or at once; until then the target, memory[place], reads as NaN."""
    if not warp.launch.late("tma"):
        operation.run()
        return
    memory[place] = np.iinfo(memory.dtype).max
    warp.cta.pending.setdefault(barrier, []).append(operation)
    if warp.launch.random:
        warp.launch.under_way.append(operation)


def _issue_store(warp: Warp, operation: Operation) -> None:
    """Stores are performed when their group is waited for, when the warp ends, or at once."""
    warp.bulk_open.append(operation)
    if warp.launch.late("store"):
        warp.launch.under_way.append(operation)
    else:
        operation.run()


class _Tensor:
    """The operands that tensor copies share."""

    def __init__(self, access: Access, place: Operand, shared: Operand) -> None:
        if any(part.startswith(("im2col", "tile::")) for part in access.parts) or "multicast::cluster" in access.parts:
            raise access.unsupported()
        if not isinstance(place, Memory) or not place.more:
            raise access.unsupported()
        self.instruction = access.instruction
        self._shared = access.addresses(shared)
        self._maps = access.addresses(Memory(place.base, place.offset))
        self._coordinates = [access.reader(item, I32) for item in items(place.more[0])]
        rank = next(int(part[0]) for part in access.parts if re.match(r"\dd$", part))
        if rank != len(self._coordinates):
            raise EmuError(f"{rank} dimensions, {len(self._coordinates)} coordinates ({self.instruction.where()})")

    def boxes(self, warp: Warp, mask: Mask) -> list[tuple[int, TensorMap, list[int], Array]]:
        """For each active lane (lane, map, corner, chunks of shared memory)."""
        where = self.instruction.where
        addresses, maps = self._shared(warp), self._maps(warp)
        coordinates = [read(warp) for read in reversed(self._coordinates)]
        boxes = []
        for lane in active(mask):
            tensor = warp.launch.tensor_maps.get(int(maps[lane]))
            if tensor is None:
                raise EmuError(f"no TensorMap at address {int(maps[lane]):#x} ({where()})")
            if len(tensor.block) != len(coordinates):
                raise EmuError(f"TensorMap of rank {len(tensor.block)} used by {where()}")
            offset, limit = int(addresses[lane]) - SHARED_BASE, warp.cta.shared_bytes
            if offset < 0 or offset + tensor.box_bytes > limit:
                reach = f"offset {offset} + {tensor.box_bytes} > {limit}"
                raise EmuError(f"TMA box outside shared memory: {reach} ({where()})")
            if offset % 128:
                raise EmuError(f"TMA shared address not 128-byte aligned: {int(addresses[lane]):#x} ({where()})")
            boxes.append((lane, tensor, [int(each[lane]) for each in coordinates], tensor.chunks(offset)))
        return boxes


def _tensor_load(access: Access) -> Effect:
    """A box from global to shared memory."""
    target, place, mbarrier = access.operands[:3]
    tensors = _Tensor(access, place, target)
    barriers, instruction = access.addresses(mbarrier), access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        for lane, tensor, corner, chunks in tensors.boxes(warp, mask):
            barrier = int(barriers(warp)[lane])
            if barrier not in warp.cta.mbarriers:
                where = instruction.where()
                raise EmuError(f"TMA load signals an uninitialised mbarrier {barrier:#x} ({where})")
            operation = _box_load(warp, tensor, corner, chunks, barrier, instruction)
            _issue_load(warp, barrier, operation, warp.cta.chunks, chunks)
            warp.launch.report.count("tma.load")

    return run


def _box_load(
    warp: Warp, tensor: TensorMap, corner: Sequence[int], chunks: Array, barrier: int, instruction: Instruction
) -> Operation:
    """What a load does when it lands."""
    cta = warp.cta

    def perform() -> None:
        cta.chunks[chunks] = tensor.read_box(corner).reshape(-1).view(U64).reshape(-1, 2)
        cta.unfenced[chunks] = 0
        complete_bytes(warp, barrier, tensor.box_bytes, instruction)
        warp.launch.version += 1

    return Operation(perform)


def _tensor_store(access: Access, reduction: str | None) -> Effect:
    """A box from shared to global memory."""
    place, source = access.operands[:2]
    tensors = _Tensor(access, place, source)
    instruction = access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        for _, tensor, corner, chunks in tensors.boxes(warp, mask):
            _issue_store(warp, _box_store(warp, tensor, corner, chunks, reduction, instruction))
            warp.launch.report.count("tma.reduce" if reduction else "tma.store")

    return run


def _box_store(
    warp: Warp, tensor: TensorMap, corner: Sequence[int], chunks: Array, reduction: str | None, instruction: Instruction
) -> Operation:
    """What a store does when it is performed."""
    cta = warp.cta

    def perform() -> None:
        check_fenced(cta, chunks, instruction, "TMA store")
        data = np.ascontiguousarray(cta.chunks[chunks]).reshape(-1)
        box = data.view(UNSIGNED[tensor.element_bytes]).reshape(tensor.block)
        tensor.write_box(corner, box, reduction)
        warp.launch.version += 1

    return Operation(perform)


class _Run:
    """The operands that copies of plain bytes share."""

    def __init__(self, access: Access, shared: Operand, outside: Operand, size: Operand) -> None:
        self._shared, self._outside = access.addresses(shared), access.addresses(outside)
        self._sizes = access.reader(size, U32)
        self.instruction = access.instruction

    def pieces(self, warp: Warp, mask: Mask) -> list[tuple[int, slice, Array]]:
        """For each active lane (lane, place in shared memory, bytes of global memory)."""
        shared, outside, sizes = self._shared(warp), self._outside(warp), self._sizes(warp)
        pieces = []
        for lane in active(mask):
            size, start, address = int(sizes[lane]), int(shared[lane]), int(outside[lane])
            if size % 16 or start % 16 or address % 16:
                raise EmuError(f"bulk copy not 16-byte aligned ({self.instruction.where()})")
            offset = start - SHARED_BASE
            if offset < 0 or offset + size > warp.cta.shared_bytes:
                raise EmuError(f"bulk copy outside shared memory ({self.instruction.where()})")
            views, first = resolve(warp, address, size, "global", self.instruction)
            pieces.append((lane, slice(offset, offset + size), views[1][first : first + size]))
        return pieces


def _plain_load(access: Access) -> Effect:
    """Bytes from global to shared memory."""
    target, source, size, mbarrier = access.operands[:4]
    runs = _Run(access, target, source, size)
    barriers = access.addresses(mbarrier)

    def run(warp: Warp, mask: Mask) -> None:
        for lane, place, data in runs.pieces(warp, mask):
            barrier = int(barriers(warp)[lane])
            operation = _bytes_load(warp, place, data, barrier, access.instruction)
            _issue_load(warp, barrier, operation, warp.cta.shared, place)
            warp.launch.report.count("bulk")

    return run


def _bytes_load(warp: Warp, place: slice, data: Array, barrier: int, instruction: Instruction) -> Operation:
    """What a load does when it lands."""

    def perform() -> None:
        warp.cta.shared[place] = data
        complete_bytes(warp, barrier, len(data), instruction)
        warp.launch.version += 1

    return Operation(perform)


def _plain_store(access: Access, reduction: str | None) -> Effect:
    """Bytes from shared to global memory."""
    target, source, size = access.operands[:3]
    runs = _Run(access, source, target, size)
    kind = access.parts[-1]

    def run(warp: Warp, mask: Mask) -> None:
        for _, place, data in runs.pieces(warp, mask):
            _issue_store(warp, _bytes_store(warp, place, data, reduction, kind, access.instruction))
            warp.launch.report.count("bulk")

    return run


def _bytes_store(
    warp: Warp, place: slice, data: Array, reduction: str | None, kind: str, instruction: Instruction
) -> Operation:
    """What a store does when it is performed."""
    cta = warp.cta

    def perform() -> None:
        check_fenced(cta, np.arange(place.start >> 4, place.stop >> 4), instruction, "bulk store")
        source = cta.shared[place]
        if reduction is None:
            data[:] = source
        elif kind == "bf16":
            old, new = bf2f(data.view(U16)), bf2f(source.view(U16))
            data.view(U16)[:] = f2bf(REDUCTIONS[reduction](old, new))
        else:
            dtype = PTX_TYPES[kind]
            data.view(dtype)[:] = REDUCTIONS[reduction](data.view(dtype), source.view(dtype))
        warp.launch.version += 1

    return Operation(perform)
