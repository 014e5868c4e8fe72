"""Hopper's kernel for latent attention over a KV cache, emulated: against the reference, under every schedule."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import State, decoding, plan
from flashtile.decoding import CacheArguments
from flashtile.tuning import decoding as tables
from tests import caches
from tests.caches import FP8, INT8, LATENT, CacheCase
from tests.emulated.hopper import emulated
from tests.oracle import assert_equal_bits
from tools.ptx_emulation import SWEEP


def _plan(case: CacheCase, dtype: torch.dtype = torch.bfloat16, **more: Any) -> plan.Plan:
    call = caches.make(case, dtype)
    return decoding.build(call.q, call.k_cache, call.v_cache, CacheArguments(**call.options | more)).plan()


def _run(case: CacheCase, dtype: torch.dtype, schedule: dict[str, Any], splits: int) -> State:
    found: list[State] = []

    def run(call: caches.CacheCall) -> State:
        found.append(call.run(num_splits=splits, backend="hopper"))
        return found[-1]

    with emulated(schedule) as device:
        chosen = _plan(case, dtype)
        assert (chosen.backend, chosen.kernel) == ("hopper", "latent")
        caches.check(caches.make(case, dtype), run)
    assert device.complaints == []
    return found[0]


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (LATENT[0], 1),
        (LATENT[1], 2),
        pytest.param(LATENT[2], 1, marks=pytest.mark.one_triton),
        pytest.param(LATENT[4], 2, marks=pytest.mark.one_triton),
    ],
    ids=str,
)
def test_matches_reference(case: CacheCase, splits: int) -> None:
    _run(case, torch.bfloat16, SWEEP[0], splits)


SHORT = replace(LATENT[0], name="short", heads=40, lengths=(250, 40), capacity=256)
"""Every slot is used twice, or a part has few tiles."""


@pytest.mark.parametrize("schedule", range(len(SWEEP)))
@pytest.mark.parametrize("stored", [None, FP8], ids=["half", "fp8"])
def test_every_schedule_gives_the_same_bits(stored: torch.dtype | None, schedule: int) -> None:
    found = _run(replace(SHORT, stored=stored), torch.float16, SWEEP[schedule], 1)
    first = _first.setdefault(stored, found)
    assert_equal_bits([found.out, found.lse], [first.out, first.lse])


_first: dict[torch.dtype | None, State] = {}


@pytest.mark.parametrize("seed", range(8))
def test_warpgroups_may_be_late(seed: int) -> None:
    """Parts of one or two tiles, whose last turn comes at once."""
    case = replace(SHORT, name="two", lengths=(100, 20), stored=FP8 if seed % 2 else None)
    _run(case, torch.float16, {"async_mode": "random", "order": "random", "seed": seed, "interleave": 2}, 1)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(LATENT[0], stored=INT8), "no cache of torch.int8"),
        (replace(LATENT[1], stored=FP8, scale_by_page=True), "no scales of pages"),
        (replace(LATENT[1], page=32), "pages of a multiple of 64 rows"),
        (replace(LATENT[1], leftpad=(1, 0, 0)), "in pages it has no left padding"),
        (replace(LATENT[0], sinks=True), "no sinks"),
        (replace(LATENT[0], window=(3, 0)), "no window to the left"),
        (replace(LATENT[0], heads=32), "33 rows of queries or more"),
        (replace(LATENT[0], latent=False), "first 512 of 576 columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(case: CacheCase, reason: str) -> None:
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match=reason):
        _plan(case, backend="hopper")


def test_it_can_be_left_to_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LATENT_LEAST", None)
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match="tuning table"):
        _plan(LATENT[0], backend="hopper")


def test_equal_bits_in_any_pages_are_another_kernels() -> None:
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match="equal bits"):
        _plan(LATENT[1], backend="hopper", batch_invariant=True)


def test_steep_scales_are_no_kernels() -> None:
    with emulated(SWEEP[0]), pytest.raises(NotImplementedError, match="scaled by more than"):
        _plan(LATENT[0], backend="hopper", scale=2.0**70)
