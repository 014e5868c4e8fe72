"""The GPUs that kernels are compiled for: data."""

from typing import NamedTuple


class Unit(NamedTuple):
    """A multiprocessor (SM, compute unit, or RDNA's pair of two), which has four SIMD units, or schedulers.

    registers: that the threads of one place share on a SIMD unit, given out by `granule`; waves: at most on it; shared:
    bytes of shared memory, of which each program takes `reserved` more than it asks for.
    """

    registers: int
    granule: int
    waves: int
    shared: int
    reserved: int

    def occupancy(self, registers: int, shared: int, waves: int) -> float:
        """Waves (warps) on a SIMD unit at a time, of programs of so many, as registers and shared memory allow."""
        given = max(self.granule, -(-registers // self.granule) * self.granule)
        programs = SIMDS * min(self.waves, self.registers // given) // waves
        if shared:
            programs = min(programs, self.shared // (shared + self.reserved))
        return programs * waves / SIMDS


class Target(NamedTuple):
    """backend, arch, warp: as Triton names them. shared: bytes of shared memory (LDS) that one program may have.
    family: whose tuning tables hold. unit: what a multiprocessor has."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    family: str
    unit: "Unit"

    @property
    def copy_engine(self) -> bool:
        """Whether it has NVIDIA's tensor memory accelerator."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def eight_bits(self) -> str:
        """The 8-bit format that its matrix instructions take; "": none."""
        if self.backend == "cuda":
            return "float8_e4m3fn" if int(self.arch) >= 89 else ""
        return {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}.get(str(self.arch), "")


KB = 1024
SIMDS = 4


def _nvidia(waves: int, shared: int) -> Unit:
    return Unit(512, 8, waves, shared * KB, KB)


_CDNA = Unit(512, 8, 8, 64 * KB, 0)
_RDNA = Unit(1536, 24, 16, 128 * KB, 0)

TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * KB, "ampere", _nvidia(16, 164)),
    "sm_86": Target("cuda", 86, 32, 99 * KB, "ampere", _nvidia(12, 100)),
    "sm_89": Target("cuda", 89, 32, 99 * KB, "ampere", _nvidia(12, 100)),
    "sm_90a": Target("cuda", 90, 32, 227 * KB, "hopper", _nvidia(16, 228)),
    "sm_100": Target("cuda", 100, 32, 227 * KB, "blackwell", _nvidia(16, 228)),
    "sm_120": Target("cuda", 120, 32, 99 * KB, "ampere", _nvidia(12, 100)),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * KB, "cdna", _CDNA),
    "gfx942": Target("hip", "gfx942", 64, 64 * KB, "cdna", _CDNA),
    "gfx950": Target("hip", "gfx950", 64, 160 * KB, "cdna", _CDNA._replace(shared=160 * KB)),
    "gfx1100": Target("hip", "gfx1100", 32, 64 * KB, "rdna", _RDNA),
    "gfx1201": Target("hip", "gfx1201", 32, 64 * KB, "rdna", _RDNA),
}
"""NVIDIA: table of technical specifications in the CUDA C programming guide. AMD: LDS of a workgroup; registers and
waves as LLVM's AMDGPU backend counts them, of which CDNA's are vector and accumulation registers together."""
