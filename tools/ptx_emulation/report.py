"""What an emulation found."""


class Report:
    """Counts, times and what looks wrong.

    Attributes:
        warnings: (kind, message) -> how often.
        instructions: executed, one per warp.
        counts: of the instructions that are worth counting, by name.
        seconds: time of the emulation, without decoding.
        decode_seconds: time to parse and decode the kernel; it was spent once if the kernel ran before.
        setmaxnreg: ("inc" or "dec", registers, warp) that were asked for.
        ctas: blocks that ended.
    """

    def __init__(self) -> None:
        self.warnings: dict[tuple[str, str], int] = {}
        self.instructions = 0
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self.decode_seconds = 0.0
        self.setmaxnreg: list[tuple[str, int, int]] = []
        self.ctas = 0

    def warn(self, kind: str, message: str) -> None:
        """Notes something that looks wrong but lets the emulation go on."""
        self.warnings[kind, message] = self.warnings.get((kind, message), 0) + 1

    def count(self, name: str) -> None:
        """Counts an instruction."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def kinds(self) -> list[str]:
        """The kinds of warnings there are."""
        return sorted({kind for kind, _ in self.warnings})

    def __str__(self) -> str:
        lines = [
            f"ctas {self.ctas}, warp-instructions {self.instructions}, "
            f"{self.seconds:.2f} s (+{self.decode_seconds:.2f} s decode)  {self.counts}"
        ]
        for kind in self.kinds():
            found = [(message, times) for (other, message), times in self.warnings.items() if other == kind]
            lines += [f"  [{kind}] x{times} {message}" for message, times in found[:3]]
            if len(found) > 3:
                lines.append(f"  [{kind}] and {len(found) - 3} more places (report.warnings has all)")
        return "\n".join(lines)
