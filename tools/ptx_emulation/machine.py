"""The state of an emulated GPU: blocks, warps, their barriers, and what is under way."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptx_emulation.formats import BOOL, I16, LANES, U8, U16, U32, U64, UNSIGNED, Array
from tools.ptx_emulation.memory import Views

if TYPE_CHECKING:
    from tools.ptx_emulation.launch import Launch
    from tools.ptx_emulation.parse import Instruction
    from tools.ptx_emulation.wgmma import Accumulator, Issued

NO_LANES, ALL_LANES = np.zeros(32, BOOL), np.ones(32, BOOL)
# What registers and shared memory hold before they are written: all ones, NaN in every float format.
_UNWRITTEN: dict[Any, Array] = {
    BOOL: np.zeros(32, bool),
    U8: np.full(32, 0xFF, U8),
    U16: np.full(32, 0xFFFF, U16),
    U32: np.full(32, 0xFFFFFFFF, U32),
    U64: np.full(32, 0xFFFFFFFFFFFFFFFF, U64),
}
POISON = _UNWRITTEN[U32]

Place = tuple[int, int, int]


class Operation:
    """An asynchronous copy: performed once, whenever `run` is called first."""

    __slots__ = ("_perform", "done")

    def __init__(self, perform: Callable[[], None]) -> None:
        self._perform, self.done = perform, False

    def run(self) -> None:
        if not self.done:
            self.done = True
            self._perform()


class Mbarrier:
    """A barrier in shared memory.

    Attributes:
        count: arrivals of a phase; pending: those still to come.
        outstanding: bytes that were expected and have not come.
        phase: how many phases have completed.
    """

    __slots__ = ("count", "outstanding", "pending", "phase")

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.outstanding = self.phase = 0

    def __str__(self) -> str:
        return (
            f"phase {self.phase}, {self.pending} of {self.count} arrivals pending, {self.outstanding} bytes outstanding"
        )


class Barrier:
    """One of the sixteen barriers of a block: threads that arrived, threads that must, warps that wait."""

    __slots__ = ("arrived", "needed", "waiting")

    def __init__(self, needed: int) -> None:
        self.arrived, self.needed = 0, needed
        self.waiting: list[Warp] = []


class Warp:
    """A warp.

    Attributes:
        registers: arrays of 32 lanes, which are replaced and never changed.
        pc, mask: where it is and with which lanes; None: all of them.
        stack: of divergent branches, see control.py; exited: lanes that have returned.
        blocked: the barrier it waits at, in words, or None; yielded: its turn is over.
        spinning: its last wait for an mbarrier failed; waits_for, in words; awaited: the mbarrier's address.
        waiting_at: the instruction that waits.
        cp_*, bulk_*, wgmma_*: operations that were issued, in committed groups and in the open one.
        accumulators: of matrix products under way, by their registers.
        in_flight, in_flight_a: registers that they will write, and that they read as A.
        apart: lanes that have read or written shared memory since all lanes met at a barrier.
    """

    __slots__ = (
        *("registers", "pc", "index", "cta", "launch", "mask", "stack", "exited", "done"),
        *("blocked", "yielded", "spinning", "waits_for", "awaited", "waiting_at"),
        *("cp_groups", "cp_open", "bulk_groups", "bulk_open", "wgmma_groups", "wgmma_open"),
        *("accumulators", "in_flight", "in_flight_a", "apart"),
    )

    def __init__(self, cta: "Cta", index: int, registers: list[Array]) -> None:
        self.cta, self.launch, self.index, self.registers = cta, cta.launch, index, registers
        self.pc = 0
        self.mask: Array | None = None
        self.exited: Array | None = None
        self.stack: list[Any] = []
        self.done = self.yielded = self.spinning = False
        self.blocked: str | None = None
        self.waits_for = ""
        self.awaited: int | None = None
        self.waiting_at: Instruction | None = None
        self.cp_groups: list[list[Callable[[], None]]] = []
        self.cp_open: list[Callable[[], None]] = []
        self.bulk_groups: list[list[Operation]] = []
        self.bulk_open: list[Operation] = []
        self.wgmma_groups: list[list[Issued]] = []
        self.wgmma_open: list[Issued] = []
        self.accumulators: dict[tuple[int, ...], Accumulator] = {}
        self.in_flight: frozenset[int] = frozenset()
        self.in_flight_a: frozenset[int] = frozenset()
        self.apart: Array = NO_LANES

    def touches_shared(self, mask: Array | None) -> None:
        """Lanes read or write shared memory."""
        self.apart = ALL_LANES if mask is None else self.apart | mask


class Cta:
    """A block of threads and its shared memory.

    Attributes:
        place: its coordinates in the grid.
        shared: bytes of shared memory, rounded up; views and chunks: the same as wider numbers and 16-byte pairs.
        unfenced: for each chunk the warp (+ 1) whose generic store no proxy fence has followed, or 0.
        mbarriers: by address; pending: TMA loads that each one waits for.
        barriers: by number.
    """

    def __init__(self, launch: "Launch", place: Place, grid: Place, threads: int, dynamic_shared: int) -> None:
        self.launch, self.place, self.threads = launch, place, threads
        self.shared_bytes = launch.program.dynamic_shared_start + dynamic_shared
        self.shared = np.full((self.shared_bytes + 1039) // 16 * 16, 0xFF, U8)
        self.views: Views = {size: self.shared.view(UNSIGNED[size]) for size in (1, 2, 4, 8)}
        self.chunks: Array = self.shared.view(U64).reshape(-1, 2)
        self.unfenced: Array = np.zeros(len(self.shared) // 16, I16)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.pending: dict[int, list[Operation]] = {}
        self.barriers: dict[int, Barrier] = {}
        types, special = launch.program.register_types, launch.program.special_registers
        registers = [_UNWRITTEN[dtype] for dtype in types]
        for name, value in _of_the_block(self, grid, dynamic_shared).items():
            registers[special[name]] = np.full(32, value, types[special[name]])
        self.warps = []
        for index in range(threads // 32):
            own = list(registers)
            for name, lanes in _of_the_warp(index).items():
                own[special[name]] = lanes
            self.warps.append(Warp(self, index, own))

    @property
    def done(self) -> bool:
        return all(warp.done for warp in self.warps)


_BLOCK_REGISTERS = (
    *("%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z"),
    *("%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"),
    *("%nwarpid", "%smid", "%nsmid", "%clock", "%clock64", "%globaltimer", "%globaltimer_lo"),
    *("%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", "%cluster_ctarank", "%cluster_nctarank"),
    *("%clusterid.x", "%nclusterid.x", "%dynamic_smem_size", "%total_smem_size", "%gridid"),
)
_WARP_REGISTERS = (
    *("%tid.x", "%laneid", "%warpid"),
    *("%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_ge", "%lanemask_gt"),
)
_64_BITS = ("%clock64", "%globaltimer", "%gridid")

SPECIAL_REGISTERS: dict[str, Any] = {
    name: U64 if name in _64_BITS else U32 for name in _BLOCK_REGISTERS + _WARP_REGISTERS
}


def _of_the_block(cta: Cta, grid: Place, dynamic_shared: int) -> dict[str, int]:
    """Special registers that are the same in all threads of a block; what is not named here is zero."""
    values = {
        "%ntid.x": cta.threads,
        "%ntid.y": 1,
        "%ntid.z": 1,
        "%nwarpid": cta.threads // 32,
        **{f"%ctaid.{axis}": i for axis, i in zip("xyz", cta.place, strict=True)},
        **{f"%nctaid.{axis}": count for axis, count in zip("xyz", grid, strict=True)},
        "%nsmid": 132,
        "%cluster_nctarank": 1,
        "%clusterid.x": cta.place[0],
        "%nclusterid.x": grid[0],
        "%dynamic_smem_size": dynamic_shared,
        "%total_smem_size": cta.shared_bytes,
        "%gridid": 1,
    }
    return {name: values.get(name, 0) for name in _BLOCK_REGISTERS}


def _of_the_warp(index: int) -> dict[str, Array]:
    """Special registers that differ between warps or lanes."""
    lanes = LANES.astype(U32)
    own = U32(1) << lanes
    below = own - U32(1)
    return {
        "%tid.x": lanes + U32(32 * index),
        "%laneid": lanes,
        "%warpid": np.full(32, index, U32),
        "%lanemask_eq": own,
        "%lanemask_lt": below,
        "%lanemask_le": below | own,
        "%lanemask_ge": ~below,
        "%lanemask_gt": ~(below | own),
    }
