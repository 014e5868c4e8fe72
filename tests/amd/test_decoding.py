"""Calls over KV caches against the reference on four AMD GPUs, emulated."""

import pytest
import torch

from flashtile import State, decoding
from flashtile.backends import portable
from flashtile.backends.portable import cached, launch
from flashtile.compiling.targets import TARGETS
from flashtile.decoding import CacheArguments
from flashtile.problem import describe_cached
from tests import caches, oracle
from tests.amd.machine import EMULATED, Emulated, missing
from tests.caches import CASES, EVERYTHING, QUANTIZED, WIDE, CacheCall, CacheCase

if (lacking := missing()) is not None:
    pytest.skip(lacking, allow_module_level=True)

NAMES = ("one_query", "nothing_new", "sixty_four_queries", "no_group", "group_of_seven", "window", "rotary_apart")
NAMES += ("modifiers", "paged_odd", "paged_leftpad", "everything_long", "everything")
CHOSEN = tuple(case for case in CASES if case.name in NAMES)


def run(call: CacheCall, device: Emulated) -> State:
    """With the tiles that are shipped for the GPU, keys in two parts."""
    given = CacheArguments(**call.options, num_splits=2)
    made = decoding.build(call.q, call.k_cache, call.v_cache, given)
    problem = describe_cached(made.inputs, made.cache, made.options, made.interleaved, made.splits)
    config = portable.configure_decoding(problem, TARGETS[device.arch].family)
    launch.forget_fitting()
    return State(*cached.decode(made.inputs, made.cache, problem, config, device.machine))


def _check(case: CacheCase, dtype: torch.dtype, arch: str, request: pytest.FixtureRequest) -> None:
    device = Emulated(arch)
    caches.check(caches.make(case, dtype), lambda call: run(call, device))
    appends = {"append_kernel": 1} if case.appended is not None else {}
    assert device.ran == {**appends, "decode_kernel": 1, "combine_kernel": 1}
    device.note(request.node)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
@pytest.mark.parametrize("arch", EMULATED)
def test_matches_reference(arch: str, case: CacheCase, request: pytest.FixtureRequest) -> None:
    _check(case, torch.bfloat16 if case.page else torch.float16, arch, request)


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
@pytest.mark.parametrize("arch", EMULATED)
def test_quantized(arch: str, case: CacheCase, request: pytest.FixtureRequest) -> None:
    """Caches hold the formats that torch calls e4m3fn and e5m2, on every GPU: they are converted, not multiplied."""
    _check(case, torch.bfloat16 if case.page else torch.float16, arch, request)


@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("arch", EMULATED)
def test_wide(arch: str, case: CacheCase, request: pytest.FixtureRequest) -> None:
    _check(case, torch.bfloat16, arch, request)


@pytest.mark.parametrize("arch", EMULATED)
def test_float32(arch: str, request: pytest.FixtureRequest) -> None:
    _check(EVERYTHING, torch.float32, arch, request)


@pytest.mark.parametrize("case", [EVERYTHING, QUANTIZED[-1]], ids=str)
@pytest.mark.parametrize("arch", EMULATED)
def test_no_barrier_is_missing(arch: str, case: CacheCase, request: pytest.FixtureRequest) -> None:
    """Between barriers it does not matter which wave goes first."""
    found, reverse = (
        run(caches.make(case, torch.float16), device) for device in (Emulated(arch), Emulated(arch, reverse_waves=True))
    )
    oracle.assert_equal_bits(list(reverse), list(found))
    Emulated(arch).note(request.node)
