"""cp.async: copies of up to 16 bytes a lane, from global to shared memory."""

from collections.abc import Callable

import numpy as np

from tools.ptx_emulation import bulk_copies
from tools.ptx_emulation.access import Access, Effect, Reader
from tools.ptx_emulation.barriers import arrive
from tools.ptx_emulation.formats import BOOL, U32, U64, Array
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask, active, resolve, shared_offsets
from tools.ptx_emulation.parse import Register


def _copy(access: Access) -> Effect:
    """cp, in all its forms."""
    if "bulk" in access.parts or access.parts[1] == "reduce":
        return bulk_copies.copy(access)
    if "commit_group" in access.parts:
        return lambda warp, mask: _commit(warp)
    if "wait_group" in access.parts or "wait_all" in access.parts:
        return _wait(access)
    if "mbarrier" in access.parts:
        return _arrive_when_done(access)
    return _copy_lanes(access)


def _commit(warp: Warp) -> None:
    warp.cp_groups.append(warp.cp_open)
    warp.cp_open = []


def _wait(access: Access) -> Effect:
    """wait_group and wait_all."""
    left = access.number(access.operands[0]) if access.operands else None

    def run(warp: Warp, mask: Mask) -> None:
        if left is None:
            _commit(warp)
        while len(warp.cp_groups) > (left or 0):
            for perform in warp.cp_groups.pop(0):
                perform()

    return run


def _arrive_when_done(access: Access) -> Effect:
    """The copies are performed here, and the lanes arrive at once."""
    if "noinc" not in access.parts:
        raise access.unsupported()
    addresses, instruction = access.addresses(access.operands[0]), access.instruction

    def run(warp: Warp, mask: Mask) -> None:
        for group in (*warp.cp_groups, warp.cp_open):
            for perform in group:
                perform()
        warp.cp_groups, warp.cp_open = [[] for _ in warp.cp_groups], []
        barriers = addresses(warp)
        for lane in active(mask):
            arrive(warp, int(barriers[lane]), 1, instruction)

    return run


def _source_sizes(access: Access, size: int) -> Reader | None:
    """Bytes that each lane copies, if fewer than its size may be: zeros follow them."""
    if len(access.operands) < 4:
        return None
    operand = access.operands[3]
    kept = access.program.register_types[operand.index] if isinstance(operand, Register) else None
    if kept is BOOL:
        ignored = access.reader(operand, BOOL)
        return lambda warp: np.where(ignored(warp), 0, size)
    # A 64-bit register is a cache policy.
    return None if kept is U64 else access.reader(operand, U32)


def _copy_lanes(access: Access) -> Effect:
    """The copies themselves: late ones leave NaN where they will write."""
    instruction = access.instruction
    targets, sources = access.addresses(access.operands[0]), access.addresses(access.operands[1])
    size = access.number(access.operands[2])
    read_sizes = _source_sizes(access, size)

    def run(warp: Warp, mask: Mask) -> None:
        source = sources(warp)
        sizes = read_sizes(warp) if read_sizes else None
        offsets = shared_offsets(warp, targets(warp), size, mask, instruction)
        jobs: list[tuple[int, Array | None]] = []
        for lane in active(mask):
            copied = size if sizes is None else int(sizes[lane])
            data = None
            if copied:
                views, start = resolve(warp, int(source[lane]), copied, "global", instruction)
                data = views[1][start : start + copied]
            jobs.append((int(offsets[lane]), data))
        shared = warp.cta.shared

        def perform() -> None:
            for offset, data in jobs:
                copied = 0
                if data is not None:
                    copied = len(data)
                    shared[offset : offset + copied] = data
                shared[offset + copied : offset + size] = 0
            warp.launch.version += 1

        if warp.launch.late("cp"):
            for offset, _ in jobs:
                shared[offset : offset + size] = 0xFF
            warp.cp_open.append(perform)
        else:
            perform()
        warp.launch.report.count("cp.async")

    return run


EFFECTS: dict[str, Callable[[Access], Effect]] = {"cp": _copy}
