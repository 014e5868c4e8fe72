"""Runs a warp: straight-line blocks, predicated instructions, branches that lanes take differently."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.formats import Array
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask
from tools.ptx_emulation.parse import Instruction

if TYPE_CHECKING:
    from tools.ptx_emulation.program import Block


class Side(NamedTuple):
    """One side of a divergent branch: where it starts, where it meets the other one, and its lanes.

    The side that runs last (`last`) also knows with which lanes the warp goes on after the meeting point.
    """

    start: int
    meeting: int
    lanes: Array
    last: bool
    after: Mask


def run_warp(warp: Warp, budget: int) -> int:
    """Runs about so many instructions, fewer if the warp must wait; returns how many."""
    program = warp.launch.program
    code, blocks, registers = program.code, program.blocks, warp.registers
    launch = warp.launch
    count = 0
    warp.yielded = False
    while count < budget:
        pc = warp.pc
        if warp.mask is None and not warp.stack:
            block = blocks[pc]
            if block is not None:
                if warp.in_flight:
                    _check_block(warp, block)
                block.run(registers)
                warp.pc = block.end
                count += block.length
                continue
        elif warp.stack and pc == warp.stack[-1].meeting:
            _meet(warp)
            if warp.done:
                break
            continue
        if pc >= len(code):
            _return(warp, warp.mask)
            if warp.done:
                break
            continue
        instruction = code[pc]
        count += 1
        lanes = _guarded(warp, instruction)
        if instruction.kind == "branch":
            _branch(warp, instruction, lanes)
            if warp.done:
                break
            continue
        warp.pc = pc + 1
        if lanes is not None and not lanes.any():
            continue
        if warp.in_flight and not instruction.op.startswith("wgmma"):
            _check(warp, instruction)
        if instruction.kind == "arithmetic":
            _compute(warp, instruction, lanes)
            continue
        if instruction.run is not None:
            instruction.run(warp, lanes)
        if warp.blocked or warp.yielded or (launch.eager and launch.completed):
            break
    return count


def _guarded(warp: Warp, instruction: Instruction) -> Mask:
    """Lanes that execute an instruction: None if all 32 do."""
    if instruction.guard is None:
        return warp.mask
    lanes = warp.registers[instruction.guard]
    if instruction.negated:
        lanes = ~lanes
    if warp.mask is not None:
        lanes = lanes & warp.mask
    return None if lanes.all() else lanes


def _compute(warp: Warp, instruction: Instruction, lanes: Mask) -> None:
    """An arithmetic instruction by itself, with the old numbers in lanes that do not take part."""
    compute, registers = warp.launch.program.single(instruction), warp.registers
    if lanes is None:
        compute(registers)
        return
    old = [registers[index] for index in instruction.writes]
    compute(registers)
    for index, value in zip(instruction.writes, old, strict=True):
        registers[index] = np.where(lanes, registers[index], value)


def _check_block(warp: Warp, block: "Block") -> None:
    """Looks at single instructions only if the block uses a register of a product under way."""
    if (
        warp.in_flight.isdisjoint(block.reads)
        and warp.in_flight.isdisjoint(block.writes)
        and warp.in_flight_a.isdisjoint(block.writes)
    ):
        return
    for instruction in warp.launch.program.code[warp.pc : block.end]:
        _check(warp, instruction)


def _check(warp: Warp, instruction: Instruction) -> None:
    """Warns of registers that belong to a matrix product under way."""
    warn = warp.launch.report.warn
    if not warp.in_flight.isdisjoint(instruction.reads):
        warn("inflight-read", f"reads the accumulator of a wgmma in flight: {instruction.where()}")
    if not warp.in_flight.isdisjoint(instruction.writes):
        warn("inflight-write", f"writes the accumulator of a wgmma in flight: {instruction.where()}")
    if not warp.in_flight_a.isdisjoint(instruction.writes):
        warn("inflight-write-A", f"writes an A register of a wgmma in flight: {instruction.where()}")


def _all_of(mask: Mask) -> Array:
    return np.ones(32, bool) if mask is None else mask


def _branch(warp: Warp, instruction: Instruction, lanes: Mask) -> None:
    """Lanes: those that take it."""
    if instruction.branch == "bra":
        _jump(warp, instruction, lanes)
    elif instruction.branch == "brx":
        _indexed_jump(warp, instruction)
    elif lanes is not None and not lanes.any():
        warp.pc += 1
    elif lanes is None or (warp.mask is not None and lanes.sum() == warp.mask.sum()):
        _return(warp, warp.mask)
    else:
        warp.exited = lanes if warp.exited is None else warp.exited | lanes
        warp.mask = _all_of(warp.mask) & ~lanes
        warp.pc += 1


def _jump(warp: Warp, instruction: Instruction, lanes: Mask) -> None:
    """bra: where only some lanes take it, they go first."""
    program = warp.launch.program
    target = program.labels.get(instruction.target)
    if target is None:
        raise EmuError(f"no label {instruction.target}")
    running = _all_of(warp.mask)
    taking = running if lanes is None else lanes
    if instruction.guard is None or taking.sum() == running.sum():
        warp.pc = target
    elif not taking.any():
        warp.pc += 1
    else:
        meeting = program.meeting_points[warp.pc]
        warp.launch.report.count("divergent")
        warp.stack.append(Side(warp.pc + 1, meeting, running & ~taking, True, warp.mask))
        warp.stack.append(Side(target, meeting, taking, False, None))
        warp.pc, warp.mask = target, taking


def _indexed_jump(warp: Warp, instruction: Instruction) -> None:
    """brx: all lanes must go the same way."""
    program = warp.launch.program
    indices = warp.registers[instruction.reads[0]]
    if warp.mask is not None:
        indices = indices[warp.mask]
    if (indices != indices[0]).any():
        raise Unsupported(f"divergent brx.idx ({instruction.where()})")
    index, targets = int(indices[0]), program.branch_targets[instruction.target]
    if index >= len(targets):
        raise EmuError(f"brx.idx {index} of {len(targets)} ({instruction.where()})")
    warp.pc = program.labels[targets[index]]


def _meet(warp: Warp) -> None:
    """A side has reached the meeting point: the other side runs, or all go on together."""
    side = warp.stack.pop()
    if not side.last:
        other = warp.stack[-1]
        lanes = other.lanes if warp.exited is None else other.lanes & ~warp.exited
        if lanes.any():
            warp.pc, warp.mask = other.start, lanes
        else:
            _meet(warp)
        return
    warp.pc, warp.mask = side.meeting, side.after
    if warp.exited is None:
        return
    lanes = _all_of(side.after) & ~warp.exited
    warp.mask = None if lanes.all() else lanes
    if not lanes.any():
        if warp.stack:
            _meet(warp)
        else:
            _end(warp)


def _return(warp: Warp, lanes: Mask) -> None:
    """These lanes, all that are running, return."""
    if warp.stack:
        lanes = _all_of(lanes)
        warp.exited = lanes if warp.exited is None else warp.exited | lanes
        _meet(warp)
    else:
        _end(warp)


def _end(warp: Warp) -> None:
    """What the warp did not wait for is reported, and its stores are performed."""
    warp.done = True
    warp.launch.version += 1
    report = warp.launch.report
    if warp.wgmma_groups or warp.wgmma_open:
        report.warn("not-waited", f"warp {warp.index} exits with wgmma groups in flight")
    stores = [store for group in (*warp.bulk_groups, warp.bulk_open) for store in group]
    if not all(store.done for store in stores):
        report.warn("not-waited", f"warp {warp.index} exits with bulk stores not waited for (performed at exit)")
        for store in stores:
            store.run()
