"""An AMD GPU for the portable backend's launches: Triton's code objects in `tools.amd_emulation`, on CPU tensors.

The emulator is in a clone of tinygrad's repository, which TINYGRAD names; it knows the instructions that Triton 3.6
chooses, so that version must be the one that is imported:

    git clone https://github.com/tinygrad/tinygrad && git -C tinygrad checkout a9069c177
    make .venv/triton-3.6
    PYTHONPATH=.venv/triton-3.6 TINYGRAD=tinygrad .venv/bin/python -m pytest tests/amd
"""

import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
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
from tests.binding import bind
from tools import amd_emulation

EMULATED = ("gfx942", "gfx950", "gfx1100", "gfx1201")
"""MI300X, MI350, RX 7900 and RX 9070."""


def missing() -> str | None:
    """What the emulation lacks here, or None."""
    if not triton.__version__.startswith("3.6."):
        return f"the emulator knows the instructions that Triton 3.6 chooses; this is Triton {triton.__version__}"
    return amd_emulation.missing()


@dataclass
class Emulated:
    """A GPU. reverse_waves: the last wave goes first, so that a missing barrier shows. ran: launches, by kernel;
    instructions: of them all, one a wave; seconds: that they took. conflicts: what conflicts of LDS banks
    cost, counted if it is a dictionary: kernel -> instruction -> (accesses, cycles, cycles if there were none).
    multiplied: numbers with others by matrix instructions, by kernel."""

    arch: str
    reverse_waves: bool = False
    ran: Counter[str] = field(default_factory=Counter)
    multiplied: Counter[str] = field(default_factory=Counter)
    instructions: int = 0
    seconds: float = 0.0
    conflicts: dict[str, dict[str, tuple[int, int, int]]] | None = None

    def note(self, node: Any) -> None:
        """What ran, with the test, for the record."""
        node.user_properties += [
            ("arch", self.arch),
            ("kernels", dict(self.ran)),
            ("instructions", self.instructions),
            ("seconds", round(self.seconds, 2)),
            *([("conflicts", self.conflicts)] if self.conflicts else []),
        ]

    @property
    def machine(self) -> Machine:
        """Where launches go."""
        return Machine(self.execute, False)

    def execute(
        self, kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        bound, how = bind(kernel, arguments, options)
        target = TARGETS[self.arch]
        compiled = aot.build(kernel, bound, GPUTarget("hip", self.arch, target.warp), **how, **tiles.options())
        needed = compiled.metadata.shared
        if needed > target.shared:
            raise triton.OutOfResources(needed, target.shared, "shared memory")
        report = amd_emulation.launch(
            compiled.asm["hsaco"],
            device_arguments(tuple(bound.values()), aot.source(kernel, bound).constants),
            (programs,),
            shared=needed,
            num_warps=tiles.warps,
            reverse_waves=self.reverse_waves,
            count_conflicts=self.conflicts is not None,
        )
        if self.conflicts is not None:
            self.conflicts[kernel.fn.__name__] = report.conflicts
        self.ran[kernel.fn.__name__] += 1
        self.multiplied[kernel.fn.__name__] += _multiplied(report.counts)
        self.instructions += report.instructions
        self.seconds += report.seconds


def _multiplied(counts: Mapping[str, int]) -> int:
    """Of matrix instructions, by how often each ran, as V_MFMA_F32_32X32X8_F16 or V_WMMA_F32_16X16X16_F16."""
    found = [(re.search(r"V_(?:MF|WM)MA_F32_(\d+)X(\d+)X(\d+)", name), times) for name, times in counts.items()]
    return sum(times * math.prod(map(int, match.groups())) for match, times in found if match is not None)


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
