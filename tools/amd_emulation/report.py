"""What an emulation counted."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """instructions: executed, one a wave; counts: by name; seconds: of it all, build_seconds: to make the functions of
    instructions that were met for the first time. conflicts: `(accesses of LDS, cycles that they take, cycles that they
    would take if no two lanes met in a bank)`, by instruction."""

    gfx: str
    kernel: str
    waves: int = 0
    instructions: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    build_seconds: float = 0.0
    conflicts: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        times = f"{self.seconds:.2f} s, {self.build_seconds:.2f} s of it to build instructions"
        return f"{self.kernel} on {self.gfx}: {self.waves} waves, {self.instructions} instructions, {times}"
