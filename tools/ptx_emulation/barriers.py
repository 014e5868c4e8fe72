"""Barriers of a block, mbarriers in shared memory, and proxy fences."""

from collections.abc import Callable

import numpy as np

from tools.ptx_emulation.access import Access, Effect
from tools.ptx_emulation.errors import EmuError
from tools.ptx_emulation.formats import BOOL, U32, U64
from tools.ptx_emulation.machine import NO_LANES, Barrier, Cta, Mbarrier, Warp
from tools.ptx_emulation.memory import SHARED_BASE, Mask, active, need_all_lanes, shared_offsets
from tools.ptx_emulation.parse import Discard, Instruction
from tools.ptx_emulation.warp_instructions import count_only


def _mbarrier_at(warp: Warp, address: int, instruction: Instruction) -> Mbarrier:
    barrier = warp.cta.mbarriers.get(address)
    if barrier is None:
        raise EmuError(f"uninitialised mbarrier at shared+{address - SHARED_BASE} ({instruction.where()})")
    return barrier


def _complete_phase(warp: Warp, address: int, barrier: Mbarrier) -> None:
    """A phase ends when all have arrived and all bytes have come."""
    if barrier.pending == 0 and barrier.outstanding == 0:
        barrier.phase += 1
        barrier.pending = barrier.count
        warp.launch.completed.append((warp.cta, address))


def complete_bytes(warp: Warp, address: int, size: int, instruction: Instruction) -> None:
    """An asynchronous copy has brought these bytes."""
    barrier = _mbarrier_at(warp, address, instruction)
    barrier.outstanding -= size
    _complete_phase(warp, address, barrier)


def arrive(warp: Warp, address: int, count: int, instruction: Instruction) -> None:
    """Raises an error on more arrivals than the barrier counts."""
    barrier = _mbarrier_at(warp, address, instruction)
    if count > barrier.pending:
        place = f"mbarrier shared+{address - SHARED_BASE}"
        raise EmuError(f"{place}: more arrivals than its count ({barrier}) ({instruction.where()})")
    barrier.pending -= count
    _complete_phase(warp, address, barrier)


def _initialise(access: Access) -> Effect:
    """mbarrier.init."""
    addresses, counts = access.addresses(access.operands[0]), access.reader(access.operands[1], U32)
    instruction = access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        shared_offsets(warp, addresses(warp), 8, mask, instruction)
        for lane in active(mask):
            warp.cta.mbarriers[int(addresses(warp)[lane])] = Mbarrier(int(counts(warp)[lane]))
        warp.launch.version += 1

    return run


def _invalidate(access: Access) -> Effect:
    """mbarrier.inval."""
    addresses, instruction = access.addresses(access.operands[0]), access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        for lane in active(mask):
            address = int(addresses(warp)[lane])
            if warp.cta.pending.get(address):
                raise EmuError(f"mbarrier.inval with asynchronous copies in flight ({instruction.where()})")
            warp.cta.mbarriers.pop(address, None)

    return run


def _arrive_or_expect(access: Access) -> Effect:
    """arrive, arrive.expect_tx and expect_tx."""
    operands, instruction = list(access.operands), access.instruction
    arrives = access.parts[1] == "arrive"
    expects = "expect_tx" in access.parts
    state = operands.pop(0) if arrives else Discard()
    write_state = access.writer(state, U64)
    addresses = access.addresses(operands[0])
    counts = access.reader(operands[1], U32) if len(operands) > 1 else None

    def run(warp: Warp, mask: Mask) -> None:
        if arrives:
            _check_together(warp, mask, instruction)
        for lane in active(mask):
            address = int(addresses(warp)[lane])
            count = 1 if counts is None else int(counts(warp)[lane])
            if expects:
                _mbarrier_at(warp, address, instruction).outstanding += count
            if arrives:
                arrive(warp, address, 1 if expects else count, instruction)
        # Waits by state are refused, so that nobody reads it.
        write_state(warp, np.zeros(32, U64), mask)
        warp.launch.version += 1

    return run


def _check_together(warp: Warp, mask: Mask, instruction: Instruction) -> None:
    """Warns where a lane arrives for others: it releases what it did itself, and what it has seen of them."""
    others = NO_LANES if mask is None else warp.apart & ~mask
    if others.any():
        message = (
            f"lanes {active(others)} of warp {warp.index} touched shared memory, and others arrive at an mbarrier, "
            f"with no barrier between: {instruction.where()}"
        )
        warp.launch.report.warn("arrival-for-others", message)


def _wait_for_phase(access: Access) -> Effect:
    """try_wait and test_wait by parity: a warp whose wait fails gives up its turn."""
    if "parity" not in access.parts:
        raise access.unsupported()
    instruction = access.instruction
    write = access.writer(access.operands[0], BOOL)
    addresses, parities = access.addresses(access.operands[1]), access.reader(access.operands[2], U32)

    def run(warp: Warp, mask: Mask) -> None:
        lane = 0 if mask is None else int(np.argmax(mask))
        address, parity = int(addresses(warp)[lane]), int(parities(warp)[lane]) & 1
        offset = address - SHARED_BASE
        barrier = warp.cta.mbarriers.get(address)
        if barrier is None:
            raise EmuError(f"wait on an uninitialised mbarrier at shared {offset} ({instruction.where()})")
        if barrier.phase & 1 == parity and warp.spinning:
            _land(warp.cta, address)
        complete = barrier.phase & 1 != parity
        write(warp, np.full(32, complete), mask)
        warp.spinning = not complete
        if not complete:
            warp.yielded = True
            warp.awaited, warp.waiting_at = address, instruction
            warp.waits_for = f"mbarrier shared+{offset} parity {parity}: {barrier}"

    return run


def _land(cta: Cta, address: int) -> None:
    """Loads that come as late as possible come now: nothing else can happen before them."""
    for operation in cta.pending.pop(address, ()):
        operation.run()


_MBARRIER_FORMS = {
    "init": _initialise,
    "inval": _invalidate,
    "arrive": _arrive_or_expect,
    "expect_tx": _arrive_or_expect,
    "try_wait": _wait_for_phase,
    "test_wait": _wait_for_phase,
}


def _mbarrier(access: Access) -> Effect:
    form = _MBARRIER_FORMS.get(access.parts[1])
    if form is None:
        raise access.unsupported()
    return form(access)


def _barrier(access: Access) -> Effect:
    """bar and barrier. A warp's lanes run together, so that bar.warp.sync changes no more than what they know."""
    if "warp" in access.parts:
        return _meet
    if "cluster" in access.parts or "red" in access.parts:
        raise access.unsupported()
    instruction, waits = access.instruction, "arrive" not in access.parts
    numbers = access.reader(access.operands[0], U32)
    counts = access.reader(access.operands[1], U32) if len(access.operands) > 1 else None

    def run(warp: Warp, mask: Mask) -> None:
        need_all_lanes(mask, instruction)
        number = int(numbers(warp)[0])
        needed = int(counts(warp)[0]) if counts else warp.cta.threads
        if waits:
            _meet(warp, mask)
        _arrive_at_barrier(warp, number, needed, waits, instruction)

    return run


def _meet(warp: Warp, mask: Mask) -> None:
    """All lanes of a warp at a barrier: what each did to memory comes before what any does next."""
    warp.apart = NO_LANES if mask is None else warp.apart & ~mask


def _arrive_at_barrier(warp: Warp, number: int, needed: int, waits: bool, instruction: Instruction) -> None:
    """The last one to arrive lets all that wait go on, and the barrier starts anew."""
    where = instruction.where()
    if number > 15 or needed % 32:
        raise EmuError(f"bad barrier {number}, {needed} ({where})")
    barrier = warp.cta.barriers.setdefault(number, Barrier(needed))
    if barrier.arrived == 0:
        barrier.needed = needed
    elif barrier.needed != needed:
        raise EmuError(f"barrier {number} used with counts {barrier.needed} and {needed} ({where})")
    barrier.arrived += 32
    warp.launch.version += 1
    if waits:
        barrier.waiting.append(warp)
        warp.blocked = f"barrier {number} ({barrier.arrived} of {needed} threads arrived)"
        warp.waiting_at = instruction
    if barrier.arrived > needed:
        raise EmuError(f"barrier {number}: {barrier.arrived} arrivals for {needed} ({where})")
    if barrier.arrived == needed:
        for other in barrier.waiting:
            other.blocked = None
        barrier.arrived, barrier.waiting = 0, []


def _fence(access: Access) -> Effect:
    """Of the fences, only the one between the generic and the asynchronous proxy has an effect."""
    if "proxy" not in access.parts:
        return count_only(access)
    if not any(part.startswith("async") for part in access.parts):
        return lambda warp, mask: None

    def run(warp: Warp, mask: Mask) -> None:
        unfenced = warp.cta.unfenced
        unfenced[unfenced == warp.index + 1] = 0
        warp.launch.report.count("fence.proxy.async")

    return run


EFFECTS: dict[str, Callable[[Access], Effect]] = {
    "bar": _barrier,
    "barrier": _barrier,
    "mbarrier": _mbarrier,
    "fence": _fence,
}
