"""Matrix instructions, in numpy (AMD's CDNA3, CDNA4, RDNA3 and RDNA4 instruction set documents: where elements lie).

Sums are made in float64 and rounded once; the hardware rounds in between, so its last bits may differ.
"""

import re
from typing import Any

import numpy as np

from tools.amd_emulation.errors import EmuError, Unsupported
from tools.amd_emulation.formats import PER_REGISTER, f32, unpack
from tools.amd_emulation.wave import Wave, bits

MFMA = r"V_MFMA_(F32|I32)_(16X16|32X32)X(\d+)_(F16|BF16|F32|I8|F8F6F4|(?:BF8|FP8)_(?:BF8|FP8))"
WMMA = r"V_WMMA_F32_16X16X16_(F16|BF16|(?:BF8|FP8)_(?:BF8|FP8))"


def mfma(wave: Wave, instruction: Any) -> None:
    """CDNA: lane l has row l % M of A and B and a part of their columns, and column l % M of the result."""
    word, name = instruction._raw, instruction.op.name
    result, shape, columns, kinds = re.fullmatch(MFMA, name).groups()  # type: ignore[union-attr]
    side, depth = int(shape[:2]), int(columns)
    first, second = bits(word, 10, 8), bits(word, 63, 61)
    if kinds == "F8F6F4" and max(first, second) <= 1:
        kinds = "_".join(("FP8", "BF8")[of] for of in (first, second))
    elif first or second or bits(word, 14, 11):
        raise Unsupported(f"{name} with operands in other formats, or broadcast")
    kind_a, kind_b = _kinds(kinds)
    operands_in, result_in = bits(word, 60, 59), bits(word, 15, 15)
    a = _mfma_operand(wave, bits(word, 40, 32), kind_a, operands_in & 1, side, depth)
    b = _mfma_operand(wave, bits(word, 49, 41), kind_b, operands_in >> 1, side, depth)
    count = side * side // 64
    lane, place = np.arange(64)[None, :], np.arange(count)[:, None]
    row = 4 * (lane // 16) + place if side == 16 else 8 * (place // 4) + 4 * (lane // 32) + place % 4
    column = np.broadcast_to(lane % side, row.shape)
    held = np.array(wave.operand(bits(word, 58, 50), result_in, count))
    start = np.empty((side, side), np.int64 if result == "I32" else np.float64)
    start[row, column] = held.view(np.int32) if result == "I32" else f32(held)
    total = ((a @ b.T + start) & 0xFFFFFFFF).astype(np.uint32) if result == "I32" else _product(a, b, start)
    wave.write(bits(word, 7, 0), total[row, column], result_in)


def _kinds(names: str) -> tuple[str, str]:
    kinds = [{"FP8": "fp8", "BF8": "bf8"}.get(name, name.lower()) for name in names.split("_")]
    return kinds[0], kinds[-1]


def _mfma_operand(wave: Wave, number: int, kind: str, accumulators: int, side: int, depth: int) -> np.ndarray:
    """(side, depth): lanes of a group hold all rows, groups follow each other along the depth."""
    groups = 64 // side
    each = depth // groups
    words = np.array(wave.operand(number, accumulators, each // PER_REGISTER[kind]))
    return unpack(words, kind, wave.fnuz).reshape(each, groups, side).transpose(2, 1, 0).reshape(side, depth)


def _product(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (a @ b.T + start).astype(np.float32).view(np.uint32)


def wmma(wave: Wave, instruction: Any) -> None:
    """RDNA: lane l has row l % 16 of A and B; RDNA3 wants each row twice, RDNA4 splits it over two lanes."""
    word, name = instruction._raw, instruction.op.name
    found = re.fullmatch(WMMA, name)
    if found is None or bits(word, 63, 61) or bits(word, 10, 8):
        raise Unsupported(f"{name}, or its negated operands")
    doubled = wave.arch == "rdna3"
    a, b = (
        _wmma_operand(wave, number, kind, doubled, name)
        for number, kind in zip((bits(word, 40, 32), bits(word, 49, 41)), _kinds(found[1]), strict=True)
    )
    lane, place = np.arange(32)[None, :], np.arange(8)[:, None]
    row = 2 * place + lane // 16 if doubled else 8 * (lane // 16) + place
    column = np.broadcast_to(lane % 16, row.shape)
    start = np.empty((16, 16))
    start[row, column] = f32(np.array(wave.operand(bits(word, 58, 50), count=8)))
    wave.write(bits(word, 7, 0), _product(a, b, start)[row, column])


def _wmma_operand(wave: Wave, number: int, kind: str, doubled: bool, name: str) -> np.ndarray:
    """(16, 16)."""
    words = np.array(wave.operand(number, count=(16 if doubled else 8) // PER_REGISTER[kind]))
    if not doubled:
        return unpack(words, kind, False).reshape(8, 2, 16).transpose(2, 1, 0).reshape(16, 16)
    if (words[:, :16] != words[:, 16:]).any():
        raise EmuError(f"{name}: lanes 16 to 31 of an operand are no copy of lanes 0 to 15, as RDNA3 wants")
    return unpack(words, kind, False)[:, :16].T
