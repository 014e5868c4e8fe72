"""tinygrad's emulator of AMD GPUs, from a clone of its repository that the environment variable TINYGRAD names."""

import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

KNOWN_COMMIT = "a9069c177"
"""Of github.com/tinygrad/tinygrad, whose emulator the changes below fit."""

_COMPILERS = ("clang", *(f"clang-{version}" for version in range(25, 13, -1)))


def missing() -> str | None:
    """What the emulation lacks here, or None."""
    if "TINYGRAD" not in os.environ:
        return f"TINYGRAD is not set: a clone of github.com/tinygrad/tinygrad at {KNOWN_COMMIT}"
    if not (Path(os.environ["TINYGRAD"]) / "test/mockgpu/amd/emu.py").is_file():
        return f"TINYGRAD: there is no test/mockgpu/amd/emu.py in {os.environ['TINYGRAD']}"
    if not any(map(shutil.which, _COMPILERS)):
        return "the emulator compiles its instructions with clang, which is not installed"
    return None


@cache
def load() -> Any:
    """The emulator's module, changed where it is wrong; the clone stays as it is."""
    lacking = missing()
    if lacking is not None:
        raise RuntimeError(lacking)
    os.environ.setdefault("CC", next(name for name in _COMPILERS if shutil.which(name)))
    os.environ.setdefault("DEV", "CPU")
    sys.path.insert(0, os.environ["TINYGRAD"])
    module = importlib.import_module("test.mockgpu.amd.emu")
    # Register numbers from 128 on mean a high half in RDNA's encodings of 16 bits only.
    for name in ("_compile_vop12", "_load_vsrc0", "_compile_vopc"):
        _edit(module, name, r"(bits\['(?:d|s0)'\] == 16)(?= and|:)", r"(ctx.wave_size == 32 and \1)")
    # Writes to LDS whose data lies in accumulators.
    data = r"ctx\.rvgpr_dyn\((?=vdata_reg|data1_reg)"
    _edit(module, "_compile_mem_op", data, "(ctx.raccvgpr_dyn if use_acc else ctx.rvgpr_dyn)(")
    module.decode_inst = _decoder(module.decode_inst)
    return module


def _decoder(original: Callable[[bytes, str], Any]) -> Callable[[bytes, str], Any]:
    """The clone takes what stands before a matrix instruction of 8 to 4 bits for its scales, whatever it is."""

    def decode(text: bytes, arch: str = "rdna3") -> Any:
        scales = text[2:4] == _SCALES
        return original(text if arch != "cdna" or scales else text[:8] + bytes(8), arch)

    return decode


_SCALES = b"\xac\xd3"
"""The upper half of the first word of v_mfma_ld_scale_b32."""


def _edit(module: Any, name: str, pattern: str, replacement: str) -> None:
    """Makes a function of the module anew, from its text with one change."""
    old = getattr(module, name)
    text, places = re.subn(pattern, replacement, inspect.getsource(old))
    if not places:
        raise RuntimeError(f"this clone's {name} is not that of {KNOWN_COMMIT}; check out that commit")
    exec(compile(text, f"<changed {name}>", "exec"), module.__dict__)
    for kind, handler in list(module._INST_HANDLERS.items()):
        if handler is old:
            module._INST_HANDLERS[kind] = getattr(module, name)


def architecture(gfx: str) -> str:
    """What the emulator calls a GPU."""
    known = {"gfx942": "cdna", "gfx950": "cdna", "gfx1100": "rdna3", "gfx1201": "rdna4"}
    if gfx not in known:
        raise ValueError(f"{gfx}: the emulator has {', '.join(known)}")
    return known[gfx]
