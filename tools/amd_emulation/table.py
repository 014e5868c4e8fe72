"""Which instructions run in numpy, instead of in the emulator."""

import re
from collections.abc import Callable
from typing import Any

from tools.amd_emulation.arithmetic import from_eight, multiply_24, nothing, set_mode, to_pair_of_eight
from tools.amd_emulation.lanes import ds_permute, permlane16, permlane_swap
from tools.amd_emulation.matrix import MFMA, mfma, wmma
from tools.amd_emulation.memory_instructions import (
    GLOBAL_ATOMICS,
    buffer_access,
    global_atomic,
    global_load_to_shared,
    read_half,
    read_transposed,
)
from tools.amd_emulation.wave import Wave

Function = Callable[[Wave, Any], None]

_ALL: tuple[tuple[str, Function], ...] = (
    (r"(GLOBAL|BUFFER)_(INV|WB|WBINV|WBL2|GL0_INV|GL1_INV)", nothing),
    (r"BUFFER_(?!.*FORMAT).*", buffer_access),
    (r"GLOBAL_LOAD_LDS_.*", global_load_to_shared),
    ("|".join(GLOBAL_ATOMICS), global_atomic),
    (r"V_NOP(_E32|_E64)?", nothing),
    (r"S_SETREG_IMM32_B32", set_mode),
    (r"V_(MUL|MUL_HI|MAD)_(U32_U24|I32_I24)(_E32|_E64)?", multiply_24),
    (r"DS_(PERMUTE|BPERMUTE|SWIZZLE)_B32", ds_permute),
    (r"DS_(READ|LOAD)_[UI](8|16)_D16(_HI)?", read_half),
)
_CDNA: tuple[tuple[str, Function], ...] = (
    (MFMA, mfma),
    (r"V_PERMLANE(16|32)_SWAP_B32(_E32)?", permlane_swap),
    (r"DS_READ_B64_TR_B(16|8)", read_transposed),
    (r"V_CVT_SCALEF32_PK_(F32|F16|BF16)_(FP8|BF8)", from_eight),
    # The emulator's knows neither fnuz nor saturation.
    (r"V_CVT_(SCALEF32_)?PK_(FP8|BF8)_F32(_E64)?", to_pair_of_eight),
)
_RDNA: tuple[tuple[str, Function], ...] = (
    (r"V_PERMLANEX?16_B32", permlane16),
    # The emulator's takes seconds to build, and reads registers where an operand is an inline constant.
    (r"V_S?WMMA.*", wmma),
)


def find(name: str, arch: str) -> Function | None:
    """The function of an instruction; None: the emulator has it."""
    rows = _ALL + (_CDNA if arch == "cdna" else _RDNA)
    return next((function for pattern, function in rows if re.fullmatch(pattern, name)), None)
