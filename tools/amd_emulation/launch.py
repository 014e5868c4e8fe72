"""A launch: the arguments in memory, workgroups one after the other, waves from barrier to barrier."""

import ctypes
import itertools
import mmap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from tools.amd_emulation import emulator, guards, table
from tools.amd_emulation.arguments import DeviceBuffer, packed
from tools.amd_emulation.code_object import CodeObject, Descriptor, Image
from tools.amd_emulation.errors import EmuError, Unsupported
from tools.amd_emulation.lanes import Dpp
from tools.amd_emulation.memory_instructions import decode_buffer
from tools.amd_emulation.report import Report
from tools.amd_emulation.wave import PROGRAM_COUNTER, Wave

POISON = 0xFFC0DEAD
"""What vector registers hold that nothing was written to: NaN."""
LDS_BYTES = {"gfx950": 160 * 1024}
LDS_BANKS = {"gfx950": 64}
INVERSE_TWO_PI = 248
"""An inline constant in whose place the emulator puts something else."""


def launch(
    code: bytes,
    arguments: Sequence[Any],
    grid: Sequence[int],
    *,
    shared: int,
    num_warps: int,
    preload: bool = True,
    reverse_waves: bool = False,
    count_conflicts: bool = False,
    most: int = 200_000_000,
) -> Report:
    """Runs the kernel of a code object (`kernel.asm["hsaco"]`).

    arguments: as the kernel takes them, without constants; numpy arrays are memory, changed in place, bfloat16 and
        8-bit floats as their bits; None is a null pointer.
    shared: `kernel.metadata.shared`, which the code object does not say.
    preload: start as a GPU does that puts arguments into registers, or, False, as one that does not.
    reverse_waves: the last wave first; results that differ tell of a missing barrier.
    count_conflicts: of LDS banks, into the report.
    most: instructions, until a loop counts as endless.
    """
    start = time.perf_counter()
    run = _Run(CodeObject(code), arguments, shared, num_warps, preload, count_conflicts)
    run.most, run.reverse_waves = most, reverse_waves
    with run.emulator._MXCSRContext() if run.descriptor.flushes else nullcontext():
        for z, y, x in itertools.product(*(range(size) for size in (*grid, 1, 1)[2::-1])):
            run.workgroup((x, y, z))
    run.end(arguments)
    run.report.seconds = time.perf_counter() - start
    return run.report


class _Instruction(NamedTuple):
    """call: runs it on a wave; native: whether in numpy, so that the counter is not moved yet."""

    call: Any
    native: bool
    barrier: bool
    decoded: Any
    name: str
    size: int
    checks: tuple[guards.Check, ...]


class _Waiting(NamedTuple):
    """A wave between two barriers, and the places of what it works on, as the emulator's functions take them."""

    wave: Wave
    pointers: list[Any]
    state: Any
    scratch: np.ndarray


class _Run:
    most = 0
    reverse_waves = False

    def __init__(
        self, code: CodeObject, arguments: Sequence[Any], shared: int, warps: int, preload: bool, conflicts: bool
    ) -> None:
        self.emulator, self.code = emulator.load(), code
        self.arch = emulator.architecture(code.gfx)
        name, metadata = next(iter(code.kernels.items()))
        self.report = Report(code.gfx, name)
        self.descriptor, address = code.descriptor(name)
        self.lanes, self.threads = metadata[".wavefront_size"], warps * metadata[".wavefront_size"]
        self.lds_size = self.descriptor.shared + shared
        if self.lds_size > LDS_BYTES.get(code.gfx, 64 * 1024):
            raise EmuError(f"{self.lds_size} bytes of LDS: {code.gfx} has fewer")
        if self.threads > metadata[".max_flat_workgroup_size"]:
            raise EmuError(f"{self.threads} threads: the kernel was compiled for fewer")
        self.image = Image(code)
        self.buffers = {
            id(array): DeviceBuffer(array) for array in arguments if isinstance(array, np.ndarray)
        }  # arrays that are given twice are one buffer
        given = [self.buffers.get(id(value), value) for value in arguments]
        self.words = packed(metadata, max(self.descriptor.arguments, 8), given)
        self.arguments = DeviceBuffer(self.words)
        entry = self.image.base + address + self.descriptor.entry
        self.user, self.entry = self._user_registers(entry, preload)
        # All of the address space: the emulator reads and writes back words at the addresses of lanes that are off.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.lds = np.frombuffer(mmap.mmap(-1, (1 << 32) + (1 << 20), flags=flags), np.uint8)
        self.program: dict[int, _Instruction] = {}
        self.hits: Counter[int] = Counter()
        self.banks = LDS_BANKS.get(code.gfx, 32) if conflicts else 0

    def _user_registers(self, entry: int, preload: bool) -> tuple[list[int], int]:
        """(scalar registers that the kernel finds filled, where it begins)."""
        descriptor: Descriptor = self.descriptor
        if descriptor.properties & ~(1 << 3) & 0x7F:
            raise Unsupported(f"kernels that want more than a pointer to their arguments ({descriptor.properties:#x})")
        user: list[int] = []
        if descriptor.properties & 8:
            user = [self.arguments.address & 0xFFFFFFFF, self.arguments.address >> 32]
        offset, count = descriptor.preloaded
        if preload and count:
            words = np.concatenate([self.words, np.zeros(-len(self.words) % 4, np.uint8)]).view(np.uint32)
            user += [int(word) for word in words[offset : offset + count]]
            entry += 256  # behind the code that would load them
        return user + [0] * (descriptor.user_registers - len(user)), entry

    def workgroup(self, place: tuple[int, int, int]) -> None:
        """All waves of one, each to the next barrier, until none is left."""
        self.lds[: self.lds_size] = 0xFF
        waves = dict(enumerate(self._wave(index, place) for index in range(self.threads // self.lanes)))
        self.report.waves += len(waves)
        while waves:
            stops = {}
            for index in sorted(waves, reverse=self.reverse_waves):
                try:
                    stops[index] = self._to_barrier(waves[index])
                except EmuError as error:
                    at = f"{waves[index].wave.counter - self.image.base:#x}, wave {index} of workgroup {place}"
                    raise type(error)(f"at {at}: {error}") from error
            if len(set(stops.values()) - {None}) > 1:
                raise EmuError(f"waves of workgroup {place} wait at different barriers: {stops}")
            waves = {index: waves[index] for index, stop in stops.items() if stop is not None}

    def _wave(self, index: int, place: tuple[int, int, int]) -> _Waiting:
        descriptor = self.descriptor
        state = self.emulator._init_wave(
            self.entry, index * self.lanes, self.threads, self.threads, 1, 1, self.arguments.address,
            descriptor.resources2, descriptor.scratch, self.arch, *place, self.user, self.lanes,
        )  # fmt: skip
        ranges = [buffer.range for buffer in (*self.buffers.values(), self.arguments)]
        ranges.append((self.image.base, self.image.base + self.image.size))
        wave = Wave(state, self.lds, self.lds_size, self.arch, ranges, self.code.gfx == "gfx942")
        wave.vectors[1:] = POISON
        if self.arch == "cdna":
            wave.accumulators[:] = POISON
        state._write_sgpr(INVERSE_TWO_PI, 0x3E22F983)
        scratch = np.full(descriptor.scratch * self.lanes + 64, 0xFF, np.uint8)
        places = (
            *(state.sgpr_buf._buf.va_addr, state.vgpr_buf._buf.va_addr, 0, self.lds.ctypes.data),
            *(scratch.ctypes.data, state.accvgpr_buf._buf.va_addr),
        )
        return _Waiting(wave, [ctypes.c_uint64(address) for address in places], state, scratch)

    def _to_barrier(self, waiting: _Waiting) -> int | None:
        """Runs a wave; the address of the barrier it waits at, None at its end."""
        wave, words, end = waiting.wave, waiting.state._sgpr_mv, self.emulator.ENDPGM_PC
        while (counter := words[PROGRAM_COUNTER] | words[PROGRAM_COUNTER + 1] << 32) != end:
            found = self.program.get(counter) or self._fetch(counter)
            self.hits[counter] += 1
            self.report.instructions += 1
            for check in found.checks:
                check(wave, found.decoded)
            if found.native:
                found.call(wave, found.decoded)
                wave.counter = counter + found.size
            else:
                found.call(wave, waiting.pointers)
            if found.barrier:
                return counter - self.image.base
            if self.report.instructions > self.most:
                raise EmuError(f"more than {self.most} instructions: a loop without an end?")
        return None

    def _fetch(self, counter: int) -> _Instruction:
        start = time.perf_counter()
        found = self.program[counter] = self._decode(counter)
        self.report.build_seconds += time.perf_counter() - start
        return found

    def _decode(self, counter: int) -> _Instruction:
        if counter not in self.image:
            raise EmuError("the program left its code")
        emulator_, text = self.emulator, bytes((ctypes.c_char * 16).from_address(counter).raw)
        decoded = decode_buffer(text, self.arch) or emulator_.decode_inst(text, self.arch)
        name = getattr(decoded, "name", None) or emulator_._op_name(decoded)
        size, call = decoded.size(), table.find(name, self.arch)
        if call is not None:
            return _Instruction(call, True, False, decoded, name, size, ())
        kind = type(decoded).__name__
        guards.refuse(decoded, kind, name, self.arch)
        checks = self._checks(name)
        if "DPP16" in kind:
            call = Dpp(emulator_, decoded, self.arch, self.lanes).run
            return _Instruction(call, False, False, decoded, name, size, checks)
        try:
            (program, runner), decoded = emulator_._decode_at(counter, self.arch)
        except Exception as error:  # of whatever kind, it is an instruction that the emulator does not know
            raise Unsupported(f"{name}: {error}") from error
        places, function = program.arg.globals, runner.fxn

        def run(wave: Wave, pointers: list[Any]) -> None:
            function(*[pointers[place] for place in places])

        return _Instruction(run, False, self._is_barrier(decoded), decoded, name, size, checks)

    def _is_barrier(self, decoded: Any) -> bool:
        known = self.emulator
        if isinstance(decoded, (known.ir3.SOPP, known.ir4.SOPP, known.irc.SOPP)):
            return decoded.op in known._BARRIER_OPS
        return isinstance(decoded, known.ir4.SOP1) and decoded.op in known._BARRIER_SOP1_OPS

    def _checks(self, name: str) -> tuple[guards.Check, ...]:
        for of in (guards.global_check, guards.saturation_check):
            if (check := of(name)) is not None:
                return (check,)
        if (shared := guards.shared_addresses(name)) is None:
            return ()
        size, addresses_of = shared

        def check_shared(wave: Wave, instruction: Any) -> None:
            for addresses in addresses_of(wave, instruction):
                if not addresses.size:
                    continue
                wave.check_shared(int(addresses.max()), size)
                if self.banks:
                    old = self.report.conflicts.get(name, (0, 0, 0))
                    new = (1, guards.cycles(addresses, size, self.banks), -(-len(addresses) * size // (4 * self.banks)))
                    self.report.conflicts[name] = tuple(map(sum, zip(old, new, strict=True)))  # type: ignore[assignment]

        return (check_shared,)

    def end(self, arguments: Sequence[Any]) -> None:
        """What the kernel wrote goes back to the arrays."""
        for counter, times in self.hits.items():
            self.report.counts[self.program[counter].name] += times
        for buffer in (*self.buffers.values(), self.arguments):
            buffer.check()
        if (self.arguments.bytes != self.words).any():
            raise EmuError("the kernel wrote to its arguments")
        for array in arguments:
            if isinstance(array, np.ndarray):
                array[...] = self.buffers[id(array)].bytes.view(array.dtype).reshape(array.shape)
