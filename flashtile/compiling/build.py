"""Compiles the kernels of one call for one target and reads the result: registers, spills, memory, instructions."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from flashtile.autograd import wanted_of
from flashtile.backends import hopper, portable
from flashtile.backends.hopper import cached as hopper_cached
from flashtile.backends.hopper import launch as hopper_launch
from flashtile.backends.hopper.calls import Machine as HopperMachine
from flashtile.backends.portable import cached as portable_cached
from flashtile.backends.portable import launch as portable_launch
from flashtile.compiling import matrix, usage
from flashtile.compiling.matrix import Entry
from flashtile.compiling.targets import TARGETS
from flashtile.kernels import aot
from flashtile.kernels.tape import Grid
from flashtile.problem import describe, describe_cached
from flashtile.tuning import spills
from flashtile.tuning.portable import Tiles


@dataclass
class Row:
    """One kernel. tiles: queries, keys, warps, stages, and the compiler's options that differ from its own choice;
    registers to scratch, and products, by instruction: see `Usage`; shared memory in bytes; occupancy: waves on a SIMD
    unit, or warps of a scheduler, that registers and shared memory leave room for."""

    target: str
    backend: str
    kernel: str
    headdim: int
    dtype: str
    variant: str
    tiles: tuple[int, ...]
    registers: int = 0
    accumulators: int = 0
    scalars: int = 0
    spills: int = 0
    scratch: int = 0
    shared_accesses: int = 0
    occupancy: float = 0.0
    shared: int = 0
    shared_limit: int = 0
    products: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    spills_allowed: int = 0
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kernel = f"{self.target} {self.backend}/{self.kernel}"
        return f"{kernel} headdim {self.headdim} {self.dtype} {self.variant} {self.tiles}"


def rows(entry: Entry) -> list[dict[str, Any]]:
    """What a forward and a backward pass of the entry would launch, compiled, as dicts of `Row`: by the portable
    backend, and by Hopper's where it takes the call."""
    torch.set_num_threads(1)
    if entry.variant in matrix.CACHED:
        return [asdict(row) for row in _cached(entry)]
    if entry.variant in matrix.EIGHT:
        return [asdict(row) for row in _eight(entry)]
    found = [] if entry.variant in matrix.OWN_KERNELS else _portable(entry)
    if entry.target == "sm_90a":
        found += _hopper(entry)
    return [asdict(row) for row in found]


def _portable(entry: Entry) -> list[Row]:
    found: list[Row] = []
    target = TARGETS[entry.target]
    inputs, options = matrix.call(entry)
    machine = _portable_machine(entry, found)
    problem = describe(inputs, options)
    out, lse = portable_launch.forward(inputs, problem, portable.configure(problem, target.family), machine)
    problem = describe(inputs, options, backward=True, wanted=wanted_of(inputs))
    config = portable.configure(problem, target.family)
    portable_launch.backward(inputs, problem, config, out, lse, out, None, machine)
    return found


def _cached(entry: Entry) -> list[Row]:
    """Of a call over a KV cache."""
    found: list[Row] = []
    call, target = matrix.cached_call(entry), TARGETS[entry.target]
    if call.inputs.k.dtype is torch.float8_e4m3fn and target.backend == "cuda" and int(target.arch) < 89:
        return found  # the backend refuses it there
    problem = describe_cached(call.inputs, call.cache, call.options, call.interleaved, call.splits)
    config = portable.configure_decoding(problem, target.family)
    portable_cached.decode(call.inputs, call.cache, problem, config, _portable_machine(entry, found))
    there = replace(problem, device=hopper.DEVICE)
    if entry.target == "sm_90a" and hopper.refuses_latent(there) is None:
        config = hopper.configure_latent(there)
        hopper_cached.decode(call.inputs, call.cache, problem, config, _compiling(entry, config.tiles.chosen(), found))
    return found


def _eight(entry: Entry) -> list[Row]:
    """Of a forward pass with 8-bit inputs, which become 16 bits where the target multiplies no others."""
    found: list[Row] = []
    target = TARGETS[entry.target]
    dtype = getattr(torch, target.eight_bits or "float8_e5m2")
    inputs, options = matrix.eight_call(entry, dtype)
    problem = describe(inputs, options)
    config = portable.configure(problem, target.family)
    how = "products" if target.eight_bits else "halves"
    portable_launch.forward(inputs, problem, config, _portable_machine(entry, found), eight=how)
    if entry.target == "sm_90a" and hopper.refuses(replace(problem, device=hopper.DEVICE)) is None:
        for tiles in hopper.configs(problem):
            hopper_launch.forward(inputs, problem, tiles, _compiling(entry, _tiles(tiles), found))
    return found


def _portable_machine(entry: Entry, found: list[Row]) -> portable_launch.Machine:
    """A machine that compiles what it is to launch, and adds a row."""
    portable_launch.forget_fitting()
    target = TARGETS[entry.target]

    def compile_instead(kernel: Any, programs: int, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, arguments, strict=False)) | {key: options[key] for key in options if key in names}
        beside = {key: value for key, value in options.items() if key not in names}
        row = _named(entry, "portable", kernel, tiles.chosen())
        limits = spills.PORTABLE if target.family == "hopper" else {}
        row.spills_allowed = spills.allowed(limits, row.kernel, row.headdim, row.variant)
        _measure(row, kernel, given, {**beside, **tiles.options()})
        if row.shared > target.shared and _smaller_left(tiles):
            # What the driver would say; the launch tries the next smaller tiles.
            raise triton.OutOfResources(row.shared, target.shared, "shared memory")
        found.append(row)

    return portable_launch.Machine(compile_instead, target.copy_engine)


def _smaller_left(tiles: Tiles) -> bool:
    return tiles.stages > 1 or max(tiles.tile_q, tiles.tile_kv) > 16


def _hopper(entry: Entry) -> list[Row]:
    """With the tiles of every length."""
    found: list[Row] = []
    inputs, options = matrix.call(entry)
    out, lse = torch.empty_like(inputs.q), torch.zeros(inputs.q.shape[:-1]).transpose(-1, -2)
    for backward in (False,) if entry.variant in matrix.FORWARD_ALONE else (False, True):
        problem = describe(inputs, options, backward=backward, wanted=wanted_of(inputs) if backward else None)
        if hopper.refuses(replace(problem, device=hopper.DEVICE)):
            continue
        config: Any
        for config in hopper.configs(problem):
            machine = _compiling(entry, _tiles(config), found)
            if backward:
                hopper_launch.backward(inputs, problem, config, out, lse, out, None, machine)
            else:
                hopper_launch.forward(inputs, problem, config, machine)
    return found


def _tiles(config: Any) -> tuple[int, ...]:
    """Of a row of the Hopper backend's tables."""
    return config.tile_q, config.tile_kv, 4 * config.consumers, config.stages


def _compiling(entry: Entry, tiles: tuple[int, ...], found: list[Row]) -> HopperMachine:
    """A machine that compiles what it is to launch, and adds a row."""

    def compile_instead(kernel: Any, programs: int | Grid, arguments: Any, options: dict[str, Any]) -> None:
        given = {parameter.name: value for parameter, value in zip(kernel.params, arguments, strict=True)}
        row = _named(entry, "hopper", kernel, tiles)
        row.spills_allowed = spills.allowed(spills.HOPPER, row.kernel, row.headdim, row.variant)
        _measure(row, kernel, given, options)
        found.append(row)

    return HopperMachine(compile_instead, 1)


def _named(entry: Entry, backend: str, kernel: Any, tiles: tuple[int, ...]) -> Row:
    limit = TARGETS[entry.target].shared
    name = kernel.fn.__name__
    return Row(entry.target, backend, name, entry.headdim, entry.dtype, entry.variant, tiles, shared_limit=limit)


def _measure(row: Row, kernel: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
    """Compiles, and fills in what there is to see."""
    target = TARGETS[row.target]
    start = time.perf_counter()
    try:
        compiled = aot.build(kernel, given, GPUTarget(target.backend, target.arch, target.warp), **options)
    except Exception as error:  # whatever the compiler says is a finding
        row.broken.append(f"does not compile: {' '.join(str(_innermost(error)).split())[-300:]}")
        return
    row.seconds = round(time.perf_counter() - start, 2)
    row.shared = compiled.metadata.shared
    found = usage.nvidia(compiled) if target.backend == "cuda" else usage.amd(compiled)
    row.registers, row.accumulators, row.scalars = found.registers, found.accumulators, found.scalars
    row.spills, row.scratch, row.products = found.spills, found.scratch, found.products
    row.shared_accesses = found.shared_accesses
    row.occupancy = target.unit.occupancy(found.registers, row.shared, found.waves)
    if found.serial and row.backend == "hopper":
        row.broken.append("products wait for each other")
    row.broken += _breaches(row)


def _innermost(error: BaseException) -> BaseException:
    """Triton wraps an error once for every function on the way to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _breaches(row: Row) -> Iterator[str]:
    """Which limits a row breaks."""
    if row.spills > row.spills_allowed:
        yield f"{row.spills} spills, {row.spills_allowed} allowed"
    if row.shared > row.shared_limit:
        yield f"{row.shared} bytes of shared memory, {row.shared_limit} allowed"
    # Exact products of float32 are no matrix unit's.
    if not row.products and row.dtype != "float32" and row.kernel not in _WITHOUT_PRODUCTS:
        yield "no matrix instruction"


_WITHOUT_PRODUCTS = (
    *("append_kernel", "combine_kernel", "delta_kernel"),
    *("before_kernel", "after_kernel", "bits_kernel", "turn_kernel"),
)
