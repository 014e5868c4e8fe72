"""Where fuzzed calls run, and what may be drawn there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from flashtile import plan
from flashtile.bench import machine
from flashtile.tuning import cpu, portable

BACKENDS: dict[str, tuple[str | None, ...]] = {
    "cpu": (None, "pytorch"),
    "interpreter": ("portable",),
    "cuda": (None, None, "portable", "hopper", "pytorch"),
}
WIDTHS = {
    "cpu": (1, 2, 3, 5, 8, 16, 17, 24, 32, 40, 64, 96, 130),
    "interpreter": (1, 3, 8, 16, 24, 32),
    "cuda": (3, 16, 32, 40, 64, 80, 96, 128, 192, 256),
}
"""Each is another kernel on a GPU, and compiling takes seconds."""
DTYPES = {
    "cpu": (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "interpreter": (torch.float32, torch.float32, torch.float16),
    "cuda": (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
}
LONGEST = {"cpu": 90, "interpreter": 50, "cuda": 300}


@dataclass(frozen=True)
class Where:
    """A device of the fuzzer: "cpu" (the PyTorch backend), "interpreter" (Triton's, on CPU tensors) or "cuda"."""

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

    def lost(self) -> bool:
        """Whether nothing more can be run in this process."""
        return self.device == "cuda" and machine.lost()

    @contextmanager
    def tiles(self, small: bool) -> Iterator[None]:
        """Small ones, so that small calls have many; interpreted kernels always get them. A GPU keeps its own."""
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
