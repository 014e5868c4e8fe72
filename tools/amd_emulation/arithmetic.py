"""Arithmetic that the emulator gets wrong."""

from typing import Any

import numpy as np

from tools.amd_emulation.errors import Unsupported
from tools.amd_emulation.wave import LITERAL, VECTORS, Wave, bits

_OTHER_FORMS = (249, 250, 233, 234)
"""Source operands that mean DPP or SDWA."""


def nothing(wave: Wave, instruction: Any) -> None:
    """What only caches and clocks would notice."""


def set_mode(wave: Wave, instruction: Any) -> None:
    """s_setreg of the one bit of the mode that Triton sets: conversions to fewer bits saturate (FP16_OVFL)."""
    word = instruction._raw
    register, first, width = bits(word, 5, 0), bits(word, 10, 6), bits(word, 15, 11) + 1
    if (register, first, width) != (1, 23, 1):
        raise Unsupported(f"s_setreg of bits {first} to {first + width - 1} of hardware register {register}")
    wave.saturates = bool(bits(word, 63, 32) & 1)


def multiply_24(wave: Wave, instruction: Any) -> None:
    """v_mul and v_mad of 24-bit integers: the emulator multiplies all 32 bits."""
    word, name = instruction._raw, instruction.op.name
    if word >> 26 & 0x3F == (0x34 if wave.arch == "cdna" else 0x35):  # VOP3
        if bits(word, 63, 61) or bits(word, 10, 8) or bits(word, 15, 15):
            raise Unsupported(f"{name} with modifiers")
        numbers = [bits(word, 40, 32), bits(word, 49, 41), bits(word, 58, 50)]
        target, literal = bits(word, 7, 0), bits(word, 95, 64)
    else:
        numbers = [bits(word, 8, 0), VECTORS + bits(word, 16, 9)]
        target, literal = bits(word, 24, 17), bits(word, 63, 32)
    if any(number in _OTHER_FORMS for number in numbers[:2]):
        raise Unsupported(f"{name} as DPP or SDWA")
    words = [
        np.full(wave.lanes, literal, np.uint32) if number == LITERAL else np.array(wave.operand(number)[0])
        for number in numbers
    ]
    if "_I32" in name:
        first, second = ((each << np.uint32(8)).view(np.int32).astype(np.int64) >> 8 for each in words[:2])
    else:
        first, second = ((each & 0xFFFFFF).astype(np.int64) for each in words[:2])
    total = first * second
    if "_HI_" in name:
        total = total >> 32
    if "MAD" in name:
        total = total + words[2].astype(np.int64)
    wave.write(target, (total & 0xFFFFFFFF).astype(np.uint32)[None])
