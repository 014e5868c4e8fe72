"""Instructions that move values from lane to lane."""

import ctypes
from typing import Any

import numpy as np

from tools.amd_emulation.errors import Unsupported
from tools.amd_emulation.wave import LITERAL, VECTORS, Wave, bits


def permlane_swap(wave: Wave, instruction: Any) -> None:
    """v_permlane16_swap, v_permlane32_swap: odd rows of the one register against even rows of the other."""
    word, size = instruction._raw, 16 if "16" in instruction.op.name else 32
    if bits(word, 8, 0) < VECTORS or not wave.active().all():
        raise Unsupported(f"{instruction.op.name} of scalars, or with lanes off")
    one = wave.vectors[bits(word, 24, 17)].reshape(-1, 2, size)
    other = wave.vectors[bits(word, 8, 0) - VECTORS].reshape(-1, 2, size)
    even = other[:, 0].copy()
    other[:, 0], one[:, 1] = one[:, 1], even


def permlane16(wave: Wave, instruction: Any) -> None:
    """v_permlane16, v_permlanex16: any lane of the own, or of the other row of 16. The emulator reads a literal
    selector as 0."""
    word, name = instruction._raw, instruction.op.name
    selectors = [bits(word, 49, 41), bits(word, 58, 50)]
    if any(number >= VECTORS for number in selectors) or bits(word, 40, 32) < VECTORS:
        raise Unsupported(f"{name} with a vector of selectors, or of a scalar")
    low, high = (bits(word, 95, 64) if number == LITERAL else int(wave.scalars[number]) for number in selectors)
    source, target = wave.vectors[bits(word, 40, 32) - VECTORS].copy(), wave.vectors[bits(word, 7, 0)]
    active, inactive_too, zeros = wave.active(), bits(word, 11, 11), bits(word, 12, 12)
    for lane in wave.active_lanes():
        row = lane // 16 ^ (1 if "X16" in name else 0)
        place = row * 16 + ((low | high << 32) >> 4 * (lane % 16) & 15)
        if inactive_too or active[place]:
            target[lane] = source[place]
        elif zeros:
            target[lane] = 0


def ds_permute(wave: Wave, instruction: Any) -> None:
    """ds_permute, ds_bpermute, ds_swizzle. Lane numbers wrap; the emulator's do not, and reach other registers."""
    word, name = instruction._raw, instruction.op.name
    offset, target = bits(word, 15, 0), wave.vectors[bits(word, 63, 56)]
    active, lanes = wave.active(), np.arange(wave.lanes)
    first = wave.vectors[bits(word, 39, 32)].copy()
    if "SWIZZLE" in name:
        if offset & 0x8000 and offset & 0x7F00:
            raise Unsupported("ds_swizzle that rotates")
        if offset & 0x8000:
            places = lanes & ~3 | (offset >> 2 * (lanes & 3) & 3)
        else:
            places = lanes & 32 | ((lanes & 31 & (offset & 31)) | (offset >> 5 & 31)) ^ (offset >> 10 & 31)
        target[active] = np.where(active[places], first[places], 0)[active]
        return
    places = (first.astype(np.int64) + offset >> 2) % wave.lanes
    source = wave.vectors[bits(word, 47, 40)].copy()
    if "BPERMUTE" in name:
        moved = np.where(active[places], source[places], 0)
    else:
        moved = np.zeros(wave.lanes, np.uint32)
        for lane in wave.active_lanes():
            moved[places[lane]] = source[lane]
    target[active] = moved[active].astype(np.uint32)


def dpp_sources(control: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """(lane that each lane reads, whether there is one) for a control of DPP16."""
    lane = np.arange(lanes)
    row, place, all_there = lane & ~15, lane & 15, np.ones(lanes, bool)
    if control < 0x100:  # quad_perm
        return lane & ~3 | control >> 2 * (lane & 3) & 3, all_there
    count = control & 15
    shifts = {
        0x100: (row + (place + count & 15), place + count <= 15),  # row_shl
        0x110: (row + (place - count & 15), place >= count),  # row_shr
        0x120: (row + (place - count & 15), all_there),  # row_ror
        0x150: (row + count, all_there),  # row_newbcast, row_share
        0x160: (row + (place ^ count), all_there),  # row_xmask
    }
    moves = {
        0x130: (lane + 1 & lanes - 1, lane < lanes - 1),  # wave_shl
        0x134: (lane + 1 & lanes - 1, all_there),  # wave_rol
        0x138: (lane - 1 & lanes - 1, lane > 0),  # wave_shr
        0x13C: (lane - 1 & lanes - 1, all_there),  # wave_ror
        0x140: (row + 15 - place, all_there),  # row_mirror
        0x141: (row + (place & 8) + 7 - (place & 7), all_there),  # row_half_mirror
        0x142: (np.maximum(row - 1, 0), lane >= 16),  # row_bcast15
        0x143: (np.full(lanes, 31), lane >= 32),  # row_bcast31
    }
    if control in moves:
        return moves[control]
    if control & 0x1F0 in shifts and (count or control >= 0x150):
        return shifts[control & 0x1F0]
    raise Unsupported(f"DPP control {control:#x}")


class Dpp:
    """A DPP16 instruction. Its first operand is gathered into a spare register, and the emulator runs it on that
    without moving lanes, on the lanes that the hardware writes: not those that a mask turns off nor, without
    bound_ctrl, those whose source is out of range or off. (The emulator's own reads lanes that it has overwritten
    already, and takes the old result where there is no source.)"""

    def __init__(self, emulator: Any, instruction: Any, arch: str, lanes: int) -> None:
        word = instruction._raw
        self.name, self.size, self.source = instruction.op.name, instruction.size(), bits(word, 39, 32)
        if "64" in self.name.replace("_E64", ""):
            raise Unsupported(f"{self.name}: DPP of 64 bits")
        used = {bits(word, 24, 17) & 0x7F, bits(word, 16, 9) & 0x7F, bits(word, 24, 17), bits(word, 16, 9)}
        self.spare = next(register for register in range(8) if register not in used)
        fields = 0xFF << 32 | 0x1FF << 40 | 1 << 50 | 0xFF << 56
        plain = word & ~fields | self.spare << 32 | 0xE4 << 40 | 0xFF << 56
        self.code = ctypes.create_string_buffer(plain.to_bytes(self.size, "little") + bytes(32))
        self.address = ctypes.addressof(self.code)
        (program, runner), _ = emulator._decode_at(self.address, arch)
        self.function, self.globals = runner.fxn, program.arg.globals
        self.places, self.there = dpp_sources(bits(word, 48, 40), lanes)
        lane = np.arange(lanes)
        rows, banks = bits(word, 63, 60) >> (lane >> 4 & 3) & 1, bits(word, 59, 56) >> (lane >> 2 & 3) & 1
        self.enabled = (rows & banks).astype(bool)
        self.zeros, self.inactive_too = bits(word, 51, 51), arch != "cdna" and bits(word, 50, 50)

    def run(self, wave: Wave, pointers: list[Any]) -> None:
        active, counter = wave.active(), wave.counter
        there = self.there if self.inactive_too else self.there & active[self.places]
        written = active & self.enabled if self.zeros else active & self.enabled & there
        if "CMP" in self.name and not (written == active).all():
            raise Unsupported(f"{self.name} with lanes turned off")
        kept = wave.vectors[self.spare].copy()
        wave.vectors[self.spare] = np.where(there, wave.vectors[self.source][self.places], 0)
        wave.set_active(written)
        wave.counter = self.address
        self.function(*[pointers[place] for place in self.globals])
        wave.vectors[self.spare] = kept
        wave.set_active(active)
        wave.counter = counter + self.size
