"""Instructions by which the lanes of a warp agree, and those that mean nothing to the emulation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx_emulation.access import Access, Effect
from tools.ptx_emulation.errors import EmuError
from tools.ptx_emulation.formats import BOOL, F32, LANES, U32, Array
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask, active
from tools.ptx_emulation.parse import Pair

# Counted, and nothing else: memory is sequentially consistent here, and prefetches change no number.
_IGNORED = (
    *("membar", "prefetch", "prefetchu", "discard", "applypriority"),
    *("griddepcontrol", "nanosleep", "pmevent", "brkpt"),
)


def count_only(access: Access) -> Effect:
    """An instruction without an effect."""
    name = ".".join(part for part in access.parts[:3] if part not in ("sync", "sc"))
    return lambda warp, mask: warp.launch.report.count(name)


def _elect(access: Access) -> Effect:
    """The first active lane, and a predicate that is true there."""
    target = access.operands[0]
    if not isinstance(target, Pair):
        raise EmuError(f"elect needs two destinations ({access.instruction.where()})")
    write_lane, write_elected = access.writer(target.first, U32), access.writer(target.second, BOOL)

    def run(warp: Warp, mask: Mask) -> None:
        lane = 0 if mask is None else int(np.argmax(mask))
        write_lane(warp, np.full(32, lane, U32), mask)
        write_elected(warp, np.equal(LANES, lane), mask)

    return run


def _vote(access: Access) -> Effect:
    """vote: all lanes get the result."""
    target, predicate = access.operands[:2]
    read = access.reader(predicate, BOOL)
    mode = access.one_of(("ballot", "any", "all", "uni"))
    write = access.writer(target, U32 if mode == "ballot" else BOOL)

    def run(warp: Warp, mask: Mask) -> None:
        lanes = np.ones(32, bool) if mask is None else mask
        votes = read(warp) & lanes
        result: Array
        if mode == "ballot":
            result = np.full(32, _bits(votes), U32)
        elif mode == "any":
            result = np.full(32, votes.any())
        elif mode == "all":
            result = np.full(32, (votes == lanes).all())
        else:
            result = np.full(32, votes.any() == (votes == lanes).all())
        write(warp, result, mask)

    return run


def _bits(lanes: Mask) -> int:
    return sum(1 << lane for lane in active(lanes))


def _active_mask(access: Access) -> Effect:
    """activemask."""
    write = access.writer(access.operands[0], U32)
    return lambda warp, mask: write(warp, np.full(32, _bits(mask), U32), mask)


def _reduce(access: Access) -> Effect:
    """redux."""
    dtype = access.type()
    read, write = access.reader(access.operands[1], dtype), access.writer(access.operands[0], dtype)
    functions: dict[str, Any] = {
        "add": np.add,
        "min": np.fmin if dtype is F32 else np.minimum,
        "max": np.fmax if dtype is F32 else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    function = functions[access.one_of(tuple(functions))]

    def run(warp: Warp, mask: Mask) -> None:
        values = read(warp) if mask is None else read(warp)[mask]
        write(warp, np.full(32, function.reduce(values), dtype), mask)

    return run


def _refuse(access: Access) -> Effect:
    raise access.unsupported()


def _set_max_registers(access: Access) -> Effect:
    """setmaxnreg: noted in the report."""
    wanted = access.number(access.operands[0])
    direction = "inc" if "inc" in access.parts else "dec"

    def run(warp: Warp, mask: Mask) -> None:
        asked = (direction, wanted, warp.index)
        if asked not in warp.launch.report.setmaxnreg:
            warp.launch.report.setmaxnreg.append(asked)

    return run


EFFECTS: dict[str, Callable[[Access], Effect]] = {
    **dict.fromkeys(_IGNORED, count_only),
    "elect": _elect,
    "vote": _vote,
    "activemask": _active_mask,
    "redux": _reduce,
    "match": _refuse,
    "setmaxnreg": _set_max_registers,
}
