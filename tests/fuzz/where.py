"""Where fuzzed calls run, and what may be drawn there."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from flashtile import plan
from flashtile.bench import machine
from flashtile.tuning import cpu, portable
from tests.views import VIEWS
from tools.ptx_emulation import SWEEP

BACKENDS: dict[str, tuple[str | None, ...]] = {
    "cpu": (None, "pytorch"),
    "interpreter": ("portable",),
    "cuda": (None, None, "portable", "hopper", "pytorch"),
    "emulated": ("hopper",),
}
WIDTHS = {
    "cpu": (1, 2, 3, 5, 8, 16, 17, 24, 32, 40, 64, 96, 130),
    "interpreter": (1, 3, 8, 16, 24, 32),
    "cuda": (3, 16, 32, 40, 64, 80, 96, 128, 192, 256),
    "emulated": (16, 64, 64, 96, 128, 128, 128, 192, 256),
}
"""Each is another kernel on a GPU, and compiling takes seconds."""
DTYPES = {
    "cpu": (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "interpreter": (torch.float32, torch.float32, torch.float16),
    "cuda": (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
    "emulated": (torch.bfloat16, torch.bfloat16, torch.float16),
}
LONGEST = {"cpu": 90, "interpreter": 50, "cuda": 300, "emulated": 300}
FEW = ("emulated",)
"""Where a tile takes a second: one batch entry, at most four heads."""


@dataclass(frozen=True)
class Where:
    """A device of the fuzzer: "cpu" (the PyTorch backend), "interpreter" (Triton's, on CPU tensors), "cuda", or
    "emulated" (the PTX of the Hopper kernels, on CPU tensors, each call under a schedule of its own)."""

    device: str

    @property
    def tensors(self) -> str:
        """The device of tensors."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def backends(self) -> tuple[str | None, ...]:
        return BACKENDS[self.device]

    @property
    def widths(self) -> tuple[int, ...]:
        return WIDTHS[self.device]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return DTYPES[self.device]

    @property
    def longest(self) -> int:
        return LONGEST[self.device]

    @property
    def views(self) -> tuple[str, ...]:
        """How tensors lie: the Hopper kernels leave others than these to the portable ones."""
        return ("contiguous", "transposed") if self.device == "emulated" else tuple(VIEWS)

    @property
    def batches(self) -> tuple[int, int]:
        """The least and the most."""
        return (1, 1) if self.device in FEW else (0, 3)

    @property
    def groups(self) -> tuple[int, int]:
        """At most so many heads of keys, and queries of each."""
        return (2, 2) if self.device in FEW else (3, 4)

    @property
    def schedules(self) -> int:
        """Ways to order what a kernel leaves open."""
        return len(SWEEP) if self.device == "emulated" else 1

    def lost(self) -> bool:
        """Whether nothing more can be run in this process."""
        return self.device == "cuda" and machine.lost()

    def ready(self, small: bool, schedule: int) -> AbstractContextManager[None]:
        """With small tiles, so that small calls have many, which interpreted kernels always get, or in emulation."""
        return _emulated(schedule) if self.device == "emulated" else self._tiles(small)

    @contextmanager
    def _tiles(self, small: bool) -> Iterator[None]:
        """A GPU keeps its own."""
        if self.device == "cuda" or (self.device == "cpu" and not small):
            yield
            return
        tiles = portable.Tiles(32, 16, 4, 1)
        row = portable.PortableConfig(tiles, tiles, portable.Tiles(16, 32, 4, 1))
        rows: Any = {"hopper": dict.fromkeys(portable.KINDS, ((10**6, row),))}
        plan.choose.cache_clear()
        with (
            patch.object(portable, "TABLES", rows),
            patch.object(cpu, "TILES", ((2**62, 16, 8, 24),)),
            patch.object(cpu, "SCORES_HELD", 3 * 16 * 24),
        ):
            yield
        plan.choose.cache_clear()


@contextmanager
def _emulated(schedule: int) -> Iterator[None]:
    """Nothing may look suspicious to the emulator."""
    from tests.emulated.hopper import emulated

    with emulated(SWEEP[schedule]) as device:
        yield
    assert device.complaints == []
