"""What Triton compiles the kernels of calls over a KV cache to for NVIDIA's GPUs, emulated: bfloat16, asynchronous
copies under every schedule, tensor cores of both kinds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile import State, decoding, queues
from flashtile.backends import portable
from flashtile.backends.portable import cached
from flashtile.backends.portable.launch import Machine
from flashtile.decoding import CacheArguments
from flashtile.kernels import aot
from flashtile.problem import describe_cached
from flashtile.tuning.portable import Tiles
from tests import caches, oracle
from tests.binding import bind
from tests.caches import CASES, EVERYTHING, INT4, INT8, QUANTIZED, WIDE, CacheCall, CacheCase
from tests.emulated.hopper import plain
from tools.ptx_emulation import SWEEP, emulate_kernel

FAMILIES = {80: "ampere", 90: "hopper"}


class Emulated:
    """Runs calls for one architecture under one schedule, keys in `splits` parts, joined `inside` or behind. `ran`:
    kernels; `ptx`: of the last one; `complaints`: what the emulator suspects."""

    def __init__(self, arch: int, schedule: dict[str, Any], splits: int = 2, inside: bool = False) -> None:
        self.arch, self.schedule, self.splits, self.inside = arch, schedule, splits, inside
        self.ran: list[str] = []
        self.ptx = ""
        self.complaints: list[str] = []

    def run(self, call: CacheCall) -> State:
        given = CacheArguments(**call.options, num_splits=self.splits)
        made = decoding.build(call.q, call.k_cache, call.v_cache, given)
        problem = describe_cached(made.inputs, made.cache, made.options, made.interleaved, made.splits)
        config = portable.configure_decoding(problem, FAMILIES[self.arch])._replace(inside=self.inside)
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
        self.ptx = compiled.asm["ptx"]
        self.complaints += report.warnings


def _check(case: CacheCase, dtype: torch.dtype, arch: int, schedule: dict[str, Any]) -> None:
    device = Emulated(arch, schedule)
    caches.check(caches.make(case, dtype), device.run)
    appends = ["append_kernel"] if case.appended is not None else []
    assert device.ran == [*appends, "decode_kernel", "combine_kernel"]
    assert device.complaints == []


NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "case", [EVERYTHING, *(NAMED[name] for name in ("one_query", "group_of_seven", "sixty_four_queries"))], ids=str
)
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


JOINED = replace(NAMED["one_query"], name="joined", lengths=(700, 0, 130), capacity=704, headdim=64, headdim_v=64)
ORDERS: dict[str, dict[str, Any]] = {
    "in turn": {},
    "backwards": {"order": "reverse", "slice_": 10**6, "interleave": "all"},
    **{f"random {seed}": {"order": "random", "seed": seed, "interleave": "all"} for seed in range(3)},
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_whichever_program_comes_last_joins(arch: int) -> None:
    """Three parts of each tile, programs in any order: the bits of the kernel that joins parts behind them. Counters
    are left as they were."""
    found: list[State] = []
    for inside, order in ((False, {}), *((True, order) for order in ORDERS.values())):
        device = Emulated(arch, SWEEP[0] | order, splits=3, inside=inside)

        def run(call: CacheCall, device: Emulated = device) -> State:
            found.append(device.run(call))
            return found[-1]

        caches.check(caches.make(JOINED, torch.bfloat16), run)
        kernels = ["decode_kernel"] if inside else ["decode_kernel", "combine_kernel"]
        assert [kernel for kernel in device.ran if kernel != "append_kernel"] == kernels
        assert device.complaints == []
        oracle.assert_equal_bits(list(found[-1]), list(found[0]))
    assert not any(counters.any() for counters in queues._standing.values())


def test_joins_everything() -> None:
    """Four-bit numbers in pages, and all options at once."""
    for case in (EVERYTHING, QUANTIZED[-1]):
        device = Emulated(90, SWEEP[5], inside=True)
        caches.check(caches.make(case, torch.float16), device.run)
        assert device.ran[-1] == "decode_kernel"
        assert device.complaints == []
        # The emulator's memory has one order. On a GPU all warps' stores come before the one count that releases them.
        before, _, _ = device.ptx.partition("atom.global.gpu.acq_rel.add")
        assert before.rindex("bar.sync") > before.rindex("st.global")
