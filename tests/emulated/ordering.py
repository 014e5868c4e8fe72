"""Which accesses to shared memory come before which, by what orders them in PTX alone: barriers and mbarriers.

Every warp knows how far it has seen each other one (a vector clock). It tells what it knows when it comes to a barrier
or arrives at an mbarrier, and learns what others told when a barrier lets it go on, or a wait for an mbarrier ends.
That one lane arrives for what others did is the emulator's own complaint (`arrival-for-others`).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tools.ptx_emulation import barriers, memory_instructions
from tools.ptx_emulation.formats import Array
from tools.ptx_emulation.machine import Cta, Mbarrier, Warp
from tools.ptx_emulation.memory import SHARED_BASE, Mask
from tools.ptx_emulation.parse import Instruction

Pair = tuple[str, str]


class _Block:
    """What is known of a block: (warps, warps) clocks, and of each four bytes who wrote and read them last, and when.

    told: what was told at a barrier or an mbarrier until now, by its number or address; ended: when its last phase did.
    """

    def __init__(self, cta: Cta) -> None:
        warps, words = len(cta.warps), len(cta.shared) // 4
        self.clocks = np.eye(warps, dtype=np.int64)
        self.told: dict[int, Array] = {}
        self.ended: dict[int, Array] = {}
        self.writer, self.written, self.wrote = (np.zeros(words, np.int64) for _ in range(3))
        self.read, self.readers = (np.zeros((words, warps), np.int64) for _ in range(2))

    def tells(self, warp: Warp, where: int) -> None:
        """All until now, and nothing of what the warp does from now on."""
        told = self.told.setdefault(where, np.zeros(len(self.clocks), np.int64))
        np.maximum(told, self.clocks[warp.index], out=told)
        self.clocks[warp.index, warp.index] += 1

    def learns(self, warp: Warp, told: Array) -> None:
        np.maximum(self.clocks[warp.index], told, out=self.clocks[warp.index])


class Ordering:
    """Watches what warps do. pairs: functions of two warps' accesses to the same place, the earlier first, one
    of them a store; races: those of them that nothing orders. Loads and stores of matrices are not watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function_at: Callable[[Instruction], str]) -> None:
        self.pairs: Counter[Pair] = Counter()
        self.races: Counter[Pair] = Counter()
        self._function_at = function_at
        self._numbers: dict[str, int] = {}
        # Blocks are held, or another could come to have the place of one.
        self._blocks: dict[Cta, _Block] = {}
        for name in ("load", "store"):
            monkeypatch.setattr(memory_instructions, name, self._watched(getattr(memory_instructions, name), name))
        monkeypatch.setattr(barriers, "arrive", self._arriving(barriers.arrive))
        monkeypatch.setattr(barriers, "_complete_phase", self._ending(barriers._complete_phase))
        monkeypatch.setattr(barriers, "_arrive_at_barrier", self._meeting(barriers._arrive_at_barrier))
        for name in ("try_wait", "test_wait"):
            monkeypatch.setitem(barriers._MBARRIER_FORMS, name, self._waiting(barriers._MBARRIER_FORMS[name]))

    def _block(self, warp: Warp) -> _Block:
        if warp.cta not in self._blocks:
            if self._blocks and next(iter(self._blocks)).launch is not warp.launch:
                self._blocks.clear()
            self._blocks[warp.cta] = _Block(warp.cta)
        return self._blocks[warp.cta]

    def _arriving(self, arrive: Any) -> Any:
        def arriving(warp: Warp, address: int, count: int, instruction: Instruction) -> None:
            # Before: the phase may end with it.
            self._block(warp).tells(warp, address)
            arrive(warp, address, count, instruction)

        return arriving

    def _ending(self, complete: Any) -> Any:
        def ending(warp: Warp, address: int, barrier: Mbarrier) -> None:
            phase, block = barrier.phase, self._block(warp)
            complete(warp, address, barrier)
            if barrier.phase > phase and address in block.told:
                block.ended[address] = block.told[address].copy()

        return ending

    def _waiting(self, form: Any) -> Any:
        def waiting(access: Any) -> Any:
            wait, addresses = form(access), access.addresses(access.operands[1])

            def run(warp: Warp, mask: Mask) -> None:
                wait(warp, mask)
                block, address = self._block(warp), int(addresses(warp)[0 if mask is None else int(np.argmax(mask))])
                # Of an mbarrier that the copy engine completes alone no warp has told anything.
                if not warp.spinning and address in block.ended:
                    block.learns(warp, block.ended[address])

            return run

        return waiting

    def _meeting(self, come: Any) -> Any:
        def meeting(warp: Warp, number: int, needed: int, waits: bool, instruction: Instruction) -> None:
            block, before = self._block(warp), warp.cta.barriers.get(number)
            waiting = [*(before.waiting if before else []), *([warp] if waits else [])]
            block.tells(warp, number)
            come(warp, number, needed, waits, instruction)
            if warp.cta.barriers[number].arrived == 0:
                told = block.told.pop(number)
                for each in waiting:
                    block.learns(each, told)

        return meeting

    def _watched(self, access: Any, name: str) -> Any:
        def watched(warp: Warp, addresses: Array, size: int, *rest: Any) -> Any:
            # (count, mask, space, instruction), or (mask, space, instruction, values).
            count, mask, space, instruction = rest if name == "load" else (len(rest[3]), *rest[:3])
            if space != "shared":
                return access(warp, addresses, size, *rest)
            used = (addresses if mask is None else addresses[mask]).astype(np.int64) - SHARED_BASE
            words = np.unique((used[:, None] + np.arange(0, size * count, min(size, 4))) // 4)
            before = warp.cta.views[4][words]
            result = access(warp, addresses, size, *rest)
            block, function = self._block(warp), self._function_at(instruction)
            if name == "load":
                self._loads(block, warp.index, words, function)
            else:
                self._stores(block, warp.index, words, function, warp.cta.views[4][words] != before)
            return result

        return watched

    def _loads(self, block: _Block, index: int, words: Array, function: str) -> None:
        known, number = block.clocks[index], self._number(function)
        self._after_writes(block, index, words, number)
        block.read[words, index], block.readers[words, index] = known[index], number

    def _stores(self, block: _Block, index: int, words: Array, function: str, changed: Array) -> None:
        known, number = block.clocks[index], self._number(function)
        # Several warps may hold the same rows, and all write them.
        self._after_writes(block, index, words[changed], number)
        read = block.read[words]
        read[:, index] = 0
        self._met(block.readers[words][read > 0], number, (read > known)[read > 0])
        block.read[words] = 0
        block.writer[words], block.written[words], block.wrote[words] = index, known[index], number

    def _after_writes(self, block: _Block, index: int, words: Array, number: int) -> None:
        writer, written = block.writer[words], block.written[words]
        others = (written > 0) & (writer != index)
        self._met(block.wrote[words][others], number, (written > block.clocks[index][writer])[others])

    def _number(self, function: str) -> int:
        return self._numbers.setdefault(function, len(self._numbers))

    def _met(self, earlier: Array, later: int, unordered: Array) -> None:
        names = list(self._numbers)
        for found, which in ((self.pairs, earlier), (self.races, earlier[unordered])):
            for number, count in zip(*np.unique(which, return_counts=True), strict=True):
                found[names[number], names[later]] += int(count)
