"""One launch: what all its blocks share, and the order in which warps get their turns."""

import random
from collections.abc import Iterable, Mapping

from tools.ptx_emulation.control import run_warp
from tools.ptx_emulation.errors import EmuError
from tools.ptx_emulation.machine import Cta, Operation, Place, Warp
from tools.ptx_emulation.memory import SHARED_BASE, Buffer
from tools.ptx_emulation.program import Program
from tools.ptx_emulation.report import Report
from tools.ptx_emulation.tensor_maps import TensorMap
from tools.ptx_emulation.wgmma import perform

_KINDS = ("wgmma", "tma", "store", "cp")
# Mixed: loads land at once, everything that reads shared memory happens as late as possible.
_MODES = {
    "late": dict.fromkeys(_KINDS, "late"),
    "early": dict.fromkeys(_KINDS, "early"),
    "random": dict.fromkeys(_KINDS, "late"),
    "mixed": {"wgmma": "late", "tma": "early", "store": "late", "cp": "early"},
}
# Rounds without any progress that are a deadlock.
_IDLE_ROUNDS = 3


class Launch:
    """A kernel with its arguments.

    Attributes:
        random: asynchronous operations happen at random moments.
        eager: whoever waits for an mbarrier runs as soon as it completes.
        version: changes whenever a waiting warp may have something new to see.
        under_way: operations that may happen at any moment.
        completed: (block, address) of mbarriers that have completed and whose waiters have not run.
        buffers: arrays by number; tensor_maps: by address; parameters: their bytes.
    """

    def __init__(
        self, program: Program, async_mode: str | Mapping[str, str], order: str, seed: int, report: Report
    ) -> None:
        if isinstance(async_mode, str) and async_mode not in _MODES:
            raise ValueError(f"async_mode: got {async_mode!r}, need one of {', '.join(_MODES)} or a dict")
        chosen = _MODES[async_mode] if isinstance(async_mode, str) else async_mode
        self._late = {kind: chosen.get(kind, "late") != "early" for kind in _KINDS}
        self.random = async_mode == "random"
        self.order, self.eager = order, order == "eager"
        self.program, self.report = program, report
        self.version = 0
        self.under_way: list[Operation] = []
        self.completed: list[tuple[Cta, int]] = []
        self.buffers: dict[int, Buffer] = {}
        self.tensor_maps: dict[int, TensorMap] = {}
        self.parameters: Buffer
        self._chance = random.Random(seed)

    def late(self, kind: str) -> bool:
        """Whether operations of a kind ("wgmma", "tma", "store", "cp") are put off until they are waited for."""
        return self._late[kind]

    def run(
        self,
        places: Iterable[Place],
        grid: Place,
        threads: int,
        dynamic_shared: int,
        interleave: int,
        turn: int,
        max_instructions: int,
    ) -> None:
        """Runs all blocks, `interleave` at a time; a turn is so many instructions of a warp.

        Raises:
            EmuError: the kernel does what is not allowed, waits for ever, or executes too many instructions.
        """
        to_start = list(reversed(list(places)))
        running: list[Cta] = []
        idle_rounds = 0
        while to_start or running:
            while to_start and len(running) < interleave:
                running.append(Cta(self, to_start.pop(), grid, threads, dynamic_shared))
            version = self.version
            stuck = self._round(running, turn)
            if self.report.instructions > max_instructions:
                message = f"more than {max_instructions} warp-instructions: endless loop?"
                raise EmuError(f"{message}\n{self._state(running)}")
            idle_rounds = idle_rounds + 1 if stuck and self.version == version else 0
            if idle_rounds > _IDLE_ROUNDS:
                raise EmuError(f"deadlock\n{self._state(running)}")
            for cta in running:
                if cta.done:
                    self._end(cta)
            running = [cta for cta in running if not cta.done]

    def _round(self, running: list[Cta], turn: int) -> bool:
        """A turn for each warp; returns whether all of them wait."""
        warps = [warp for cta in running for warp in cta.warps if not warp.done]
        if self.order == "random":
            self._chance.shuffle(warps)
        elif self.order == "reverse":
            warps.reverse()
        stuck = True
        following = 0
        while following < len(warps):
            if self.completed and self.eager:
                warps[following:following] = self._awoken(warps[following])
            self.completed.clear()
            warp = warps[following]
            following += 1
            if warp.blocked or warp.done:
                continue
            budget = self._chance.choice((20, 100, turn, 4 * turn)) if self.order == "random" else turn
            self.report.instructions += run_warp(warp, budget)
            if not (warp.spinning or warp.blocked):
                stuck = False
            if self.random:
                self._happen(warp)
        return stuck

    def _awoken(self, current: Warp) -> list[Warp]:
        """Warps whose mbarrier has completed: they run before the next one, which may be who completed it."""
        awoken: list[Warp] = []
        for cta, address in self.completed:
            waiting = [warp for warp in cta.warps if warp.spinning and warp.awaited == address and not warp.done]
            awoken[:0] = [warp for warp in waiting if warp is not current]
        return awoken

    def _happen(self, warp: Warp) -> None:
        """Some of what is under way happens now: products of a warp in their order, copies in any."""
        for issued in [issued for group in (*warp.wgmma_groups, warp.wgmma_open) for issued in group]:
            if not issued.done:
                if self._chance.random() < 0.3:
                    break
                perform(warp, issued)
        for operation in self.under_way:
            if self._chance.random() < 0.2:
                operation.run()
        self.under_way = [operation for operation in self.under_way if not operation.done]

    def _end(self, cta: Cta) -> None:
        """A block has ended: what it left behind is reported, and copies of all blocks are performed."""
        self.report.ctas += 1
        left = {address: sum(not each.done for each in operations) for address, operations in cta.pending.items()}
        loads = [f"{address - SHARED_BASE} ({count} loads)" for address, count in left.items() if count]
        if loads:
            self.report.warn("not-waited", f"TMA loads never waited for, mbarriers at shared+{', '.join(loads)}")
        for number, barrier in cta.barriers.items():
            if barrier.arrived:
                reached = f"{barrier.arrived} of {barrier.needed} threads"
                self.report.warn("barrier-left", f"barrier {number} left with {reached} at exit")
        for operation in self.under_way:
            operation.run()
        self.under_way = []

    def _state(self, running: list[Cta]) -> str:
        """Where every warp and every mbarrier stands."""
        lines = []
        for cta in running:
            lines += [f"  cta {cta.place} warp {warp.index}: {self._doing(warp)}" for warp in cta.warps]
            for address, barrier in sorted(cta.mbarriers.items(), key=lambda item: item[0]):
                pending = cta.pending.get(address)
                loads = f", {len(pending)} TMA loads pending" if pending else ""
                lines.append(f"    mbarrier shared+{address - SHARED_BASE}: {barrier}{loads}")
        return "\n".join(lines)

    def _doing(self, warp: Warp) -> str:
        """For the message about a deadlock."""
        if warp.done:
            return "finished"
        where = warp.waiting_at.where() if warp.waiting_at else ""
        if warp.blocked:
            return f"waits at {warp.blocked}; {where}"
        if warp.spinning:
            return f"waits on {warp.waits_for}; {where}"
        code = self.program.code
        return f"running at {code[warp.pc].where() if warp.pc < len(code) else 'end'}"
