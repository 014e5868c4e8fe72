"""What is looked at before the emulator runs an instruction of its own."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.amd_emulation.errors import Unsupported
from tools.amd_emulation.memory_instructions import global_addresses
from tools.amd_emulation.wave import Wave, bits

Check = Callable[[Wave, Any], None]

_BYTES = {"UBYTE": 1, "SBYTE": 1, "BYTE": 1, "USHORT": 2, "SSHORT": 2, "SHORT": 2}
_BYTES |= {"DWORD": 4, "DWORDX2": 8, "DWORDX3": 12, "DWORDX4": 16}


def access_bytes(name: str) -> int:
    """Bytes of a lane's access, by the instruction's name."""
    for part in reversed(name.split("_")):
        if part in _BYTES:
            return _BYTES[part]
        if re.fullmatch(r"[UIB]\d+", part):
            return int(part[1:]) // 8
    return 4


def global_check(name: str) -> Check | None:
    """Whether accesses of global memory stay in the kernel's buffers; None: it makes none."""
    if not name.startswith(("GLOBAL_LOAD", "GLOBAL_STORE", "FLAT_LOAD", "FLAT_STORE", "GLOBAL_ATOMIC")):
        return None
    size = 4 if "ATOMIC" in name else access_bytes(name)

    def check(wave: Wave, instruction: Any) -> None:
        wave.check_all(global_addresses(wave, instruction)[wave.active()], size)

    return check


def saturation_check(name: str) -> Check | None:
    """The emulator gives infinity where a narrow float overflows, also where the mode says otherwise."""
    if not re.search(r"(?<!B)F16|FP8|BF8", name) or re.match(r"V_CVT_F32_F16|V_FMA_MIX_F32|V_DOT2_F32", name):
        return None

    def check(wave: Wave, instruction: Any) -> None:
        if wave.saturates:
            raise Unsupported(f"{name} while results saturate")

    return check


def shared_addresses(name: str) -> tuple[int, Callable[[Wave, Any], list[np.ndarray]]] | None:
    """(bytes of a lane's access, addresses of all active lanes for each of the accesses) of LDS reads and writes."""
    if not name.startswith(("DS_READ", "DS_WRITE", "DS_LOAD", "DS_STORE")) or "_TR_" in name:
        return None
    plain = re.sub(r"_2ADDR|STRIDE64|ST64|_D16|_HI", "", name)
    size = access_bytes(plain)
    apart = size * (64 if "ST64" in name or "STRIDE64" in name else 1)
    two = re.search(r"(READ2|WRITE2|2ADDR)", name) is not None

    def addresses(wave: Wave, instruction: Any) -> list[np.ndarray]:
        word = instruction._raw
        offsets = [bits(word, 7, 0) * apart, bits(word, 15, 8) * apart] if two else [bits(word, 15, 0)]
        lanes = wave.vectors[bits(word, 39, 32)][wave.active()].astype(np.int64)
        return [lanes + offset for offset in offsets]

    return size, addresses


def cycles(addresses: np.ndarray, size: int, banks: int) -> int:
    """Cycles of an access of LDS, whose banks each give 4 bytes a cycle: as many lanes go together as fill the banks,
    in their order, and take as long as the bank takes that most of their words lie in."""
    words = addresses[:, None] // 4 + np.arange(max(1, size // 4))
    together = max(1, banks // words.shape[1])
    total = 0
    for first in range(0, len(words), together):
        asked = np.unique(words[first : first + together])
        total += int(np.bincount(asked % banks).max())
    return total


def refuse(instruction: Any, kind: str, name: str, arch: str) -> None:
    """What the emulator would decode, or run, as something else."""
    word = instruction._raw
    plain = kind.startswith(("VOP3", "VOPD", "VOP1", "VOP2", "VOPC")) and "DPP" not in kind and "SDWA" not in kind
    if plain and "PX2" not in kind:
        source = bits(word, 40, 32) if kind.startswith("VOP3") else bits(word, 8, 0)
        if source in ((249, 250) if arch == "cdna" else (233, 234, 250)):
            raise Unsupported(f"{name}: DPP or SDWA of {kind}")
    if "SDWA" in kind and (bits(word, 53, 52) or bits(word, 61, 60)):
        raise Unsupported(f"{name}: SDWA of a negated or absolute value")
    if (
        kind.startswith("VOP3")
        and not kind.startswith(("VOP3P", "VOP3SD"))
        and "BITOP3" not in name
        and bits(word, 60, 59)
    ):
        raise Unsupported(f"{name}: an output modifier")
    if any(part in name for part in ("SMFMAC", "MFMA_F64", "MFMA_SCALE", "F8F6F4")):
        raise Unsupported(f"{name}: nobody has checked it")
