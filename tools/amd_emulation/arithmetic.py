"""Arithmetic that the emulator gets wrong, or does not know."""

import re
from typing import Any

import numpy as np

from tools.amd_emulation.errors import Unsupported
from tools.amd_emulation.formats import f32, to_bf16, to_eight, unpack
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


def from_eight(wave: Wave, instruction: Any) -> None:
    """v_cvt_scalef32_pk: two 8-bit floats of half a register, times the power of two in the second operand's exponent,
    to two of float32, float16 or bfloat16."""
    word, name = instruction._raw, instruction.op.name
    _refuse_modifiers(instruction, bits(word, 14, 12))
    wanted, kind = name.split("_")[4:6]
    pairs = wave.operand(bits(word, 40, 32)) >> np.uint32(16 * bits(word, 11, 11))
    values = unpack(pairs, kind.lower(), wave.fnuz)[:2] * _power(wave, bits(word, 49, 41))
    if wanted == "F32":
        wave.write(bits(word, 7, 0), values.astype(np.float32).view(np.uint32))
        return
    halves = to_bf16(values) if wanted == "BF16" else values.astype(np.float16).view(np.uint16)
    low, high = halves.astype(np.uint32)
    wave.write(bits(word, 7, 0), (low | high << np.uint32(16))[None])


def to_pair_of_eight(wave: Wave, instruction: Any) -> None:
    """v_cvt_pk and v_cvt_scalef32_pk: two of float32, the latter divided by the power of two in the third operand's
    exponent, to 8-bit floats in half a register, whose other half stays."""
    word, name = instruction._raw, instruction.op.name
    _refuse_modifiers(instruction, bits(word, 13, 11))
    values = f32(np.concatenate([wave.operand(bits(word, 40, 32)), wave.operand(bits(word, 49, 41))]))
    if "SCALEF32" in name:
        values = values / _power(wave, bits(word, 58, 50))
    kind, target = re.findall("FP8|BF8", name)[0].lower(), bits(word, 7, 0)
    low, high = to_eight(values, kind, wave.fnuz, wave.saturates).astype(np.uint32)
    place = np.uint32(16 * bits(word, 14, 14))
    kept = wave.vectors[target] & ~np.uint32(0xFFFF << int(place))
    wave.write(target, (kept | (low | high << np.uint32(8)) << place)[None])


def _refuse_modifiers(instruction: Any, selected: int) -> None:
    """Of a conversion: signs, clamps and, if any is set, selections of halves that are not emulated; literals."""
    word = instruction._raw
    if bits(word, 63, 59) or bits(word, 15, 15) or bits(word, 10, 8) or selected:
        raise Unsupported(f"{instruction.op.name} with modifiers")
    if LITERAL in (bits(word, 40, 32), bits(word, 49, 41), bits(word, 58, 50)):
        raise Unsupported(f"{instruction.op.name} of a literal")


def _power(wave: Wave, number: int) -> np.ndarray:
    """2 to the exponent of a float32 operand, a lane."""
    exponents = wave.operand(number)[0] >> np.uint32(23) & np.uint32(0xFF)
    return 2.0 ** (exponents.astype(np.int64) - 127)
