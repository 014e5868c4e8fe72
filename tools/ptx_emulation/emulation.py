"""The way in: a kernel's PTX and its arguments as a launch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tools.ptx_emulation.errors import EmuError
from tools.ptx_emulation.formats import PTX_TYPES, U8, U64, UNSIGNED, Array
from tools.ptx_emulation.launch import Launch
from tools.ptx_emulation.machine import Place
from tools.ptx_emulation.memory import ARRAY_SHIFT, FIRST_VARIABLE, PARAMETER_BASE, Buffer
from tools.ptx_emulation.program import Parameter, Program, program
from tools.ptx_emulation.report import Report
from tools.ptx_emulation.tensor_maps import TensorMap

Argument: TypeAlias = Array | TensorMap | int | float | None

# A kernel should run under all of these: each one catches mistakes that the others miss.
SWEEP: list[dict[str, Any]] = [
    {"async_mode": "late"},
    {"async_mode": "late", "order": "eager"},
    {"async_mode": "late", "order": "reverse", "slice_": 10**6},
    {"async_mode": "mixed"},
    {"async_mode": "early"},
    *({"async_mode": "random", "order": "random", "seed": seed, "interleave": 2} for seed in range(4)),
]


def emulate(
    ptx: str,
    entry: str | None = None,
    grid: Sequence[int] = (1, 1, 1),
    args: Sequence[Argument] = (),
    shared: int = 0,
    num_threads: int | None = None,
    async_mode: str | Mapping[str, str] = "late",
    interleave: int | str = 1,
    seed: int = 0,
    order: str = "rr",
    slice_: int = 300,
    max_instr: int = 200_000_000,
    expand_maps: bool | None = None,
) -> Report:
    """Runs an entry of a PTX module.

    Args:
        ptx: the module.
        entry: the first one by default.
        grid: blocks in x, y and z.
        args: arrays (changed in place; bfloat16 as uint16, FP8 as uint8), numbers, None for a null pointer, and
            TensorMaps, each of which also stands for the shape and strides that Triton appends to it. Pointers at
            the end may be left out.
        shared: bytes of dynamic shared memory.
        num_threads: of a block; the PTX says so by default.
        async_mode: when asynchronous operations happen: "late" (when they are waited for), "early" (at once),
            "mixed" (loads early, the rest late), "random", or one of the first two for each of "wgmma", "tma",
            "store" and "cp".
        interleave: how many blocks run at once, or "all".
        seed: of everything random.
        order: of the warps: "rr" (in turn), "reverse", "random", or "eager" (who waits for an mbarrier runs as soon
            as it completes, before the warp that completed it goes on).
        slice_: instructions of a warp in its turn.
        max_instr: more instructions than these are an endless loop.
        expand_maps: whether a TensorMap stands for shape and strides too; None: whatever fits.

    Raises:
        EmuError: the arguments do not fit, or the kernel does what is not allowed.
    """
    with np.errstate(all="ignore"):
        decoded = program(ptx, entry)
        report = Report()
        report.decode_seconds = decoded.decode_seconds
        launch = Launch(decoded, async_mode, order, seed, report)
        _bind(launch, _matched(decoded, args, expand_maps))
        threads = num_threads or decoded.threads
        if threads is None:
            raise EmuError("num_threads is not in the PTX: pass it")
        x, y, z = (*grid, 1, 1)[:3]
        blocks = x * y * z if interleave == "all" else int(interleave)
        started = time.time()
        try:
            launch.run(_places((x, y, z)), (x, y, z), threads, shared, blocks, slice_, max_instr)
        finally:
            report.seconds = time.time() - started
    return report


def emulate_kernel(kernel: Any, grid: Sequence[int], args: Sequence[Argument], **options: Any) -> Report:
    """Runs what `triton.compile` returned; see `emulate`."""
    shared = kernel.metadata.shared
    return emulate(kernel.asm["ptx"], kernel.metadata.name, grid, args, shared, **options)


def _places(grid: Place) -> Iterator[Place]:
    return ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0]))


def _expanded(args: Sequence[Argument]) -> list[Argument]:
    """With shape and strides after each TensorMap."""
    expanded: list[Argument] = []
    for argument in args:
        expanded.append(argument)
        if isinstance(argument, TensorMap):
            expanded += [*argument.shape, *argument.strides]
    return expanded


def _matched(decoded: Program, args: Sequence[Argument], expand_maps: bool | None) -> list[Argument]:
    """As many arguments as there are parameters; up to two pointers at the end may be missing."""
    wanted = len(decoded.parameters)
    candidates = {True: _expanded(args), False: list(args)}
    for expand in (True, False) if expand_maps is None else (expand_maps,):
        missing = wanted - len(candidates[expand])
        if missing in (0, 1, 2):
            return candidates[expand] + [None] * missing
    names = ", ".join(f"{each.name}.{each.kind}[{each.size}]" for each in decoded.parameters)
    given = f"{len(args)} arguments ({len(candidates[True])} with expanded descriptors)"
    raise EmuError(f"{given} for {wanted} PTX parameters: {names}")


def _bind(launch: Launch, args: Sequence[Argument]) -> None:
    """Gives arrays their addresses, and writes the bytes of the parameters."""
    decoded = launch.program
    data = np.zeros(max(decoded.parameter_bytes, 16) + 16, U8)
    for position, (argument, parameter) in enumerate(zip(args, decoded.parameters, strict=True)):
        if isinstance(argument, TensorMap):
            if parameter.size != 128:
                raise EmuError(f"parameter {parameter.name} ({parameter.size} bytes) got a TensorMap")
            launch.tensor_maps[PARAMETER_BASE + parameter.offset] = argument
            continue
        value = _encoded(launch, position, argument, parameter)
        data[parameter.offset : parameter.offset + parameter.size] = value.view(U8)
    for position, (name, initial) in enumerate(decoded.variables.items(), FIRST_VARIABLE):
        launch.buffers[position] = Buffer(position << ARRAY_SHIFT, initial.copy(), name)
    launch.parameters = Buffer(PARAMETER_BASE, data, "parameters")


def _encoded(launch: Launch, position: int, argument: Array | float | None, parameter: Parameter) -> Array:
    """One number; of an array, its address."""
    name, kind, size, _ = parameter
    if size == 128 and kind == "b8":
        raise EmuError(f"parameter {name} needs a TensorMap, got {type(argument).__name__}")
    if isinstance(argument, np.ndarray):
        if size != 8:
            raise EmuError(f"parameter {name} ({kind}) got an array")
        if not argument.flags.c_contiguous:
            raise EmuError(f"array for {name} is not C-contiguous")
        base = (position + 1) << ARRAY_SHIFT
        launch.buffers[position + 1] = Buffer(base, argument, f"argument {position} ({name})")
        return np.array([base], U64)
    number = argument or 0
    if kind.startswith("f"):
        return np.array([number], PTX_TYPES[kind])
    return np.array([int(number) & ((1 << (8 * size)) - 1)], UNSIGNED[size])
