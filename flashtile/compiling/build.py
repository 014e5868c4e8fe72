"""Compiles the kernels of one call for one target and reads the result: registers, spills, memory, instructions."""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from flashtile.autograd import wanted_of
from flashtile.backends import portable
from flashtile.backends.portable import launch
from flashtile.compiling import matrix
from flashtile.compiling.matrix import Entry
from flashtile.compiling.targets import TARGETS, Target
from flashtile.kernels import aot
from flashtile.problem import describe
from flashtile.tuning.portable import Tiles, spills_allowed

_PRODUCTS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "v_mfma": r"v_mfma_",
    "v_wmma": r"v_wmma_",
}
"""Matrix instructions by the name that a report gives them."""


@dataclass
class Row:
    """One kernel. spills: instructions that store registers to memory; bytes of memory; products: by instruction."""

    target: str
    kernel: str
    headdim: int
    dtype: str
    variant: str
    tiles: tuple[int, ...]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    products: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} headdim {self.headdim} {self.dtype} {self.variant} {self.tiles}"


def rows(entry: Entry) -> list[dict[str, Any]]:
    """What a forward and a backward pass of the entry would launch, compiled, as dicts of `Row`."""
    torch.set_num_threads(1)
    launch.forget_fitting()
    found: list[Row] = []
    target = TARGETS[entry.target]

    def compile_instead(kernel: Any, programs: int, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> None:
        row = _row(entry, target, kernel, tiles, arguments, options)
        if row.shared > target.shared and _smaller_left(tiles):
            # What the driver would say; the launch tries the next smaller tiles.
            raise triton.OutOfResources(row.shared, target.shared, "shared memory")
        found.append(row)

    inputs, options = matrix.call(entry)
    machine = launch.Machine(compile_instead, target.copy_engine)
    problem = describe(inputs, options)
    out, lse = launch.forward(inputs, problem, portable.configure(problem, target.family), machine)
    problem = describe(inputs, options, backward=True, wanted=wanted_of(inputs))
    launch.backward(inputs, problem, portable.configure(problem, target.family), out, lse, out, None, machine)
    return [asdict(row) for row in found]


def _smaller_left(tiles: Tiles) -> bool:
    return tiles.stages > 1 or max(tiles.tile_q, tiles.tile_kv) > 16


def _row(entry: Entry, target: Target, kernel: Any, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> Row:
    name = kernel.fn.__name__
    row = Row(entry.target, name, entry.headdim, entry.dtype, entry.variant, tuple(tiles), shared_limit=target.shared)
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | {key: options[key] for key in options if key in names}
    beside = {key: value for key, value in options.items() if key not in names}
    start = time.perf_counter()
    try:
        compiled = aot.build(
            kernel,
            given,
            GPUTarget(target.backend, target.arch, target.warp),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **beside,
        )
    except Exception as error:  # whatever the compiler says is a finding
        row.broken.append(f"does not compile: {' '.join(str(_innermost(error)).split())[-300:]}")
        return row
    row.seconds = round(time.perf_counter() - start, 2)
    row.shared = compiled.metadata.shared
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    counts = {label: len(re.findall(pattern, text)) for label, pattern in _PRODUCTS.items()}
    row.products = {label: count for label, count in counts.items() if count}
    row.registers, row.spills = _nvidia(compiled.asm["cubin"]) if target.backend == "cuda" else _amd(text)
    row.broken += _breaches(row)
    return row


def _innermost(error: BaseException) -> BaseException:
    """Triton wraps an error once for every function on the way to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _breaches(row: Row) -> Iterator[str]:
    """Which limits a row breaks."""
    allowed = spills_allowed(TARGETS[row.target].family, row.kernel, row.headdim, row.variant)
    if row.spills > allowed:
        yield f"{row.spills} spills, {allowed} allowed"
    if row.shared > row.shared_limit:
        yield f"{row.shared} bytes of shared memory, {row.shared_limit} allowed"
    # Exact products of float32 are no matrix unit's; the delta kernel multiplies no matrices.
    if not row.products and row.dtype != "float32" and row.kernel != "delta_kernel":
        yield "no matrix instruction"


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, spilling instructions) of a kernel, by NVIDIA's disassembler, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = re.findall(r"REG:(\d+)", usage)
    return max(map(int, registers), default=0), len(re.findall(r"\bSTL\b", text))


def _amd(text: str) -> tuple[int, int]:
    """(vector registers, spilled ones), from the metadata in the assembly text."""
    registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)), default=0)
    return registers, max(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)), default=0)
