"""An AMD GPU for the portable backend's launches: Triton's code objects in tinygrad's emulator, on CPU tensors.

Two folders make it, named by environment variables: FLASHTILE_AMD_EMULATION holds run_hsaco.py, which loads and starts
a code object, and TINYGRAD a clone of tinygrad's repository, whose emulator executes the instructions. It knows those
that Triton 3.6 chooses, so that version must be the one that is imported:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR TINYGRAD=... FLASHTILE_AMD_EMULATION=... python -m pytest tests/emulated
"""

import importlib
import os
import shutil
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from flashtile.backends.portable.launch import Machine
from flashtile.compiling.targets import TARGETS
from flashtile.kernels import aot
from flashtile.tuning.portable import Tiles

EMULATED = ("gfx942", "gfx950", "gfx1100", "gfx1201")
"""MI300X, MI350, RX 7900 and RX 9070."""
FILES = {"FLASHTILE_AMD_EMULATION": "run_hsaco.py", "TINYGRAD": "test/mockgpu/amd/emu.py"}


def missing() -> str | None:
    """What the emulation lacks here, or None."""
    for variable, file in FILES.items():
        if variable not in os.environ:
            return f"{variable} is not set: the folder that holds {file}"
        if not (Path(os.environ[variable]) / file).is_file():
            return f"{variable}: there is no {file} in {os.environ[variable]}"
    if not any(shutil.which(name) for name in ("clang", *(f"clang-{version}" for version in range(14, 26)))):
        return "the emulator needs clang"
    if not triton.__version__.startswith("3.6."):
        return f"the emulator knows the instructions that Triton 3.6 chooses; this is Triton {triton.__version__}"
    return None


def machine(arch: str, reverse_waves: bool = False) -> Machine:
    """Where launches go. `reverse_waves`: the last wave first, so that a missing barrier shows."""
    emulator = _emulator()

    def execute(kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        bound, how = bind(kernel, arguments, options)
        source = aot.source(kernel, bound)
        how |= tiles.options()
        compiled = triton.compile(source, target=GPUTarget("hip", arch, TARGETS[arch].warp), options=how)
        there, needed = TARGETS[arch].shared, compiled.metadata.shared
        if needed > there:
            raise triton.OutOfResources(needed, there, "shared memory")
        emulator.launch(
            compiled.asm["hsaco"],
            device_arguments(tuple(bound.values()), source.constants),
            (programs,),
            shared=needed,
            num_warps=tiles.warps,
            reverse_waves=reverse_waves,
        )

    return Machine(execute, False)


def _emulator() -> Any:
    """The module run_hsaco, with tinygrad's emulator loaded."""
    folder = os.environ["FLASHTILE_AMD_EMULATION"]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module("run_hsaco")
    module.setup(os.environ["TINYGRAD"])
    return module


def bind(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the kernel's arguments by name, in its order, and the options that are the compiler's)."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | options
    return {name: given[name] for name in names}, {name: given[name] for name in options if name not in names}


def device_arguments(values: tuple[Any, ...], constants: Container[tuple[int, ...]]) -> list[Any]:
    """What a code object takes: tuples flattened, without what it was compiled for; tensors as arrays of their bytes.

    Tensors that begin at the same place are one array, so that one of them sees what is written through another.
    """
    arrays: dict[int, np.ndarray] = {}
    taken = []
    for path, value in aot.leaves(values, ()):
        if isinstance(value, Tensor):
            taken.append(arrays.setdefault(value.data_ptr(), _bytes(value)))
        elif path not in constants:
            taken.append(value)
    return taken


def _bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor, from its first element to the end of its storage."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage.numpy()[tensor.storage_offset() * tensor.element_size() :]
