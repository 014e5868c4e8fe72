"""The GPUs that kernels are compiled for: data."""

from typing import NamedTuple


class Target(NamedTuple):
    """backend, arch, warp: as Triton names them. shared: bytes of shared memory (LDS) that one program may have.
    family: whose tuning tables hold."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    family: str

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

TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * KB, "ampere"),
    "sm_86": Target("cuda", 86, 32, 99 * KB, "ampere"),
    "sm_89": Target("cuda", 89, 32, 99 * KB, "ampere"),
    "sm_90a": Target("cuda", 90, 32, 227 * KB, "hopper"),
    "sm_100": Target("cuda", 100, 32, 227 * KB, "blackwell"),
    "sm_120": Target("cuda", 120, 32, 99 * KB, "ampere"),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * KB, "cdna"),
    "gfx942": Target("hip", "gfx942", 64, 64 * KB, "cdna"),
    "gfx950": Target("hip", "gfx950", 64, 160 * KB, "cdna"),
    "gfx1100": Target("hip", "gfx1100", 32, 64 * KB, "rdna"),
    "gfx1201": Target("hip", "gfx1201", 32, 64 * KB, "rdna"),
}
"""NVIDIA: table of technical specifications in the CUDA C programming guide. AMD: LDS of a workgroup."""
