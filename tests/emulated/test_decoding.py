"""What Triton compiles the kernels of calls over a KV cache to for NVIDIA's GPUs, emulated: bfloat16, asynchronous
copies under every schedule, tensor cores of both kinds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile import State, decoding
from flashtile.backends import portable
from flashtile.backends.portable import cached
from flashtile.backends.portable.launch import Machine
from flashtile.decoding import CacheArguments
from flashtile.kernels import aot
from flashtile.problem import describe_cached
from flashtile.tuning.portable import Tiles
from tests import caches
from tests.binding import bind
from tests.caches import CASES, EVERYTHING, INT4, INT8, QUANTIZED, WIDE, CacheCall, CacheCase
from tests.emulated.hopper import plain
from tools.ptx_emulation import SWEEP, emulate_kernel

FAMILIES = {80: "ampere", 90: "hopper"}


class Emulated:
    """Runs calls for one architecture under one schedule, keys in so many parts. `ran`: kernels; `complaints`: what the
    emulator suspects."""

    def __init__(self, arch: int, schedule: dict[str, Any], splits: int = 2) -> None:
        self.arch, self.schedule, self.splits = arch, schedule, splits
        self.ran: list[str] = []
        self.complaints: list[str] = []

    def run(self, call: CacheCall) -> State:
        given = CacheArguments(**call.options, num_splits=self.splits)
        made = decoding.build(call.q, call.k_cache, call.v_cache, given)
        problem = describe_cached(made.inputs, made.cache, made.options, made.interleaved, made.splits)
        config = portable.configure_decoding(problem, FAMILIES[self.arch])
        return State(*cached.decode(made.inputs, made.cache, problem, config, Machine(self._launch, self.arch >= 90)))

    def _launch(
        self, kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        bound, how = bind(kernel, arguments, options)
        how |= tiles.options()
        compiled = aot.build(kernel, bound, GPUTarget("cuda", self.arch, 32), **how)
        constants = aot.source(kernel, bound).constants
        values = [plain(leaf) for path, leaf in aot.leaves(tuple(bound.values()), ()) if path not in constants]
        report = emulate_kernel(compiled, (programs, 1, 1), values, **self.schedule)
        self.ran.append(kernel.fn.__name__)
        self.complaints += report.warnings


def _check(case: CacheCase, dtype: torch.dtype, arch: int, schedule: dict[str, Any]) -> None:
    device = Emulated(arch, schedule)
    caches.check(caches.make(case, dtype), device.run)
    appends = ["append_kernel"] if case.appended is not None else []
    assert device.ran == [*appends, "decode_kernel", "combine_kernel"]
    assert device.complaints == []


NAMED = {case.name: case for case in CASES}
NAMES = ("one_query", "group_of_seven", "sixty_four_queries", "paged_tiles")


@pytest.mark.parametrize("case", [EVERYTHING, *(NAMED[name] for name in NAMES)], ids=str)
@pytest.mark.parametrize("arch", FAMILIES)
def test_matches_reference(arch: int, case: CacheCase) -> None:
    _check(case, torch.bfloat16, arch, SWEEP[0])


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch in FAMILIES
        for case in QUANTIZED
        if arch > 80 or case.stored in (INT8, INT4)
    ],
)
def test_quantized(arch: int, case: CacheCase) -> None:
    """8-bit floats for sm_80: the emulator does not know how Triton 3.9 converts them, and 3.6 rounds some twice."""
    _check(case, torch.bfloat16 if case.page else torch.float16, arch, SWEEP[0])


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide(case: CacheCase) -> None:
    _check(case, torch.bfloat16, 90, SWEEP[0])


def test_float32() -> None:
    _check(EVERYTHING, torch.float32, 90, SWEEP[0])


@pytest.mark.parametrize("schedule", range(1, len(SWEEP)))
def test_schedules(schedule: int) -> None:
    """Enough tiles a part that copies are in flight while others are multiplied."""
    case = replace(
        EVERYTHING, name="schedules", lengths=(700, 30), leftpad=(3, 0), capacity=720, headdim=64, window=None
    )
    _check(case, torch.float16, 90, SWEEP[schedule])
