"""What a compiled kernel takes, read from its text: registers, spills, memory, matrix instructions."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Usage(NamedTuple):
    """registers: of a thread, vector ones on AMD's GPUs, among them `accumulators` that only matrix instructions and
    moves reach; scalars: of a wave. spills: on NVIDIA's GPUs instructions that store registers to memory, on AMD's
    vector registers that lie there. scratch: bytes of a thread there. shared_accesses: instructions that read or
    write shared memory. waves: of a program. serial: whether products wait for each other."""

    registers: int
    accumulators: int
    scalars: int
    spills: int
    scratch: int
    shared_accesses: int
    waves: int
    products: dict[str, int]
    serial: bool = False


def nvidia(compiled: Any) -> Usage:
    """Of PTX and a cubin, by the disassembler in Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        taken, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    products, batches = (len(re.findall(pattern, text)) for pattern in (r"\b[HQ]GMMA\.", r"WARPGROUP\.ARRIVE"))
    ptx = compiled.asm["ptx"]
    threads = re.search(r"\.reqntid\s+(\d+)", ptx) or re.search(r"\.maxntid\s+(\d+)", ptx)
    return Usage(
        registers=_largest(r"REG:(\d+)", taken),
        accumulators=0,
        scalars=0,
        spills=_spills(text),
        scratch=_largest(r"STACK:(\d+)", taken),
        shared_accesses=len(re.findall(r"\b(?:LDS|LDSM|STS|STSM)\b", text)),
        waves=int(threads[1]) // 32 if threads else compiled.metadata.num_warps,
        products={name: count for name in _NVIDIA if (count := len(re.findall(_NVIDIA[name], ptx)))},
        # The compiler may make each of a warpgroup's products wait for the one before: as many batches as products.
        serial=0 < products < 2 * batches,
    )


_NVIDIA = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}


def _spills(text: str) -> int:
    """Instructions that store what another one loads again. Others hand something to a function: under Triton 3.6 for
    sm_120 to the one that says of a copy's barrier that it lies in no block of the cluster."""
    loaded = set().union(*_places(text, "LDL"))
    return sum(not place.isdisjoint(loaded) for place in _places(text, "STL"))


def _places(text: str, name: str) -> Iterator[set[tuple[str, int]]]:
    """The bytes that each of these instructions reaches: (register, offset)."""
    pattern = rf"\b{name}(?:\.\w+)*?(?:\.(64|128))? .*?\[(\w+)(?:\+(0x[0-9a-f]+))?\]"
    for bits, base, start in re.findall(pattern, text):
        yield {(base, int(start or "0", 16) + byte) for byte in range(int(bits or 32) // 8)}


def amd(compiled: Any) -> Usage:
    """Of the assembly text and the metadata in it."""
    text = compiled.asm["amdgcn"]
    products = re.findall(r"^\s*(v_mfma|v_wmma)\w*?_(\d+x\d+x\d+)", text, re.MULTILINE)
    return Usage(
        registers=_largest(r"\.vgpr_count:\s*(\d+)", text),
        accumulators=_largest(r"\.agpr_count:\s*(\d+)", text),
        scalars=_largest(r"\.sgpr_count:\s*(\d+)", text),
        spills=_largest(r"\.vgpr_spill_count:\s*(\d+)", text),
        scratch=_largest(r"\.private_segment_fixed_size:\s*(\d+)", text),
        shared_accesses=len(re.findall(r"^\s*ds_(?:read|write|load|store)", text, re.MULTILINE)),
        waves=compiled.metadata.num_warps,
        products=dict(Counter(map(" ".join, products))),
    )


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)
