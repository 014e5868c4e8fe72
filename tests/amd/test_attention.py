"""The portable kernels against the reference on four AMD GPUs, emulated (`tests.amd.machine` says what that needs)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from flashtile import plan
from flashtile.backends import portable
from flashtile.backends.portable import launch
from flashtile.compiling.targets import TARGETS
from flashtile.tuning import portable as tuning
from flashtile.tuning.portable import PortableConfig, Tiles
from tests import conformance, invariance, oracle
from tests.amd.machine import EMULATED, Emulated, missing
from tests.binding import portable_on
from tests.problems import Case, Shape, dense, packed

if (lacking := missing()) is not None:
    pytest.skip(lacking, allow_module_level=True)

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TILES = PortableConfig(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 2, 2))
APART = PortableConfig(Tiles(32, 16, 2, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 2, 1))
SMALL = dense(1, 45, 70, 2, 1, 32)
WIDE = dense(1, 45, 70, 1, 1, 64)
BATCH = dense(2, 33, 50, 2, 1, 32)
PACKED = packed((40, 1, 0, 33), (37, 20, 9, 0), 2, 1)
USED = packed((24, 40), (60, 30), 2, 1, used_q=(20, 40), used_kv=(47, 11))


def _case(name: str, shape: Shape, *features: str, dtype: torch.dtype = HALF) -> Case:
    return Case(name, shape, features, (dtype,))


CASES = (
    _case("plain", WIDE),
    _case("plain_bfloat16", WIDE, dtype=BRAIN),
    _case("plain_float32", SMALL, dtype=SINGLE),
    _case("out_float32", SMALL, "out_float32", "scale"),
    _case("causal", WIDE, "causal"),
    _case("causal_bfloat16", SMALL, "causal", dtype=BRAIN),
    _case("causal_top_left", dense(1, 50, 33, 2, 2, 32), "causal_top_left"),
    _case("window", BATCH, "window"),
    _case("window_left", WIDE, "window_left", dtype=BRAIN),
    _case("window_top_left", SMALL, "window_top_left", "causal"),
    _case("one_query", dense(3, 1, 77, 4, 2, 32)),
    _case("one_key", dense(1, 19, 1, 2, 1, 16), "sinks"),
    _case("mqa", dense(1, 40, 50, 5, 1, 32), "causal"),
    _case("headdim_8_v_24", dense(1, 40, 50, 2, 1, 8, 24), "causal"),
    _case("headdim_40", dense(1, 40, 50, 2, 1, 40), "causal"),
    _case("headdim_100", dense(1, 35, 40, 1, 1, 100), dtype=BRAIN),
    _case("bias", BATCH, "bias"),
    _case("bias_keys", BATCH, "bias_keys", dtype=BRAIN),
    _case("bias_queries", BATCH, "bias_queries", "causal"),
    _case("softcap_float32", SMALL, "softcap", "causal", dtype=SINGLE),
    _case("alibi_batch", BATCH, "alibi_batch", "causal"),
    _case("alibi_softcap_sinks", SMALL, "alibi", "softcap", "sinks"),
    _case("dropout", BATCH, "dropout", "causal"),
    _case("dropout_bfloat16", SMALL, "dropout", "window", dtype=BRAIN),
    _case("score_mod", SMALL, "score_mod"),
    _case("score_mod_dropout", BATCH, "score_mod", "dropout", "causal", dtype=BRAIN),
    _case("mask_mod", SMALL, "mask_mod"),
    _case("block_mask", dense(1, 140, 150, 2, 2, 32), "block_mask"),
    _case("block", dense(1, 140, 150, 2, 1, 32), "block", "causal"),
    _case("dense_mask", SMALL, "dense_mask"),
    _case("padding", BATCH, "padding", "causal"),
    _case("prefix_lm", SMALL, "prefix_lm"),
    _case("far_apart", dense(1, 70, 120, 2, 2, 32), "far_apart"),
    _case("document", BATCH, "document_unsorted", "causal"),
    _case("varlen", PACKED, "causal"),
    _case("varlen_window_alibi", PACKED, "window", "alibi", dtype=BRAIN),
    _case("varlen_used", USED, "bias", "dropout"),
    _case("varlen_mods", PACKED, "score_mod", "mask_mod"),
    _case("varlen_sinks_softcap", PACKED, "sinks", "softcap"),
)
SHIPPED = (
    _case("headdim_64", dense(1, 100, 150, 1, 1, 64), "causal"),
    _case("headdim_64_float32", dense(1, 70, 70, 1, 1, 64), dtype=SINGLE),
    _case("headdim_64_score_mod", dense(1, 70, 100, 1, 1, 64), "score_mod", "bias"),
    _case("headdim_128", dense(1, 100, 150, 1, 1, 128), "causal"),
    _case("headdim_128_varlen_dropout", packed((70, 20), (60, 90), 1, 1, 128), "dropout", "causal", dtype=BRAIN),
    _case("headdim_192_v_128", dense(1, 50, 40, 1, 1, 192, 128), "causal", dtype=BRAIN),
    _case("headdim_256_mask_mod", dense(1, 40, 50, 1, 1, 256), "mask_mod", dtype=BRAIN),
    _case("headdim_512", dense(1, 20, 35, 1, 1, 512), "causal"),
    _case("headdim_512_mask_mod", dense(1, 20, 35, 1, 1, 512), "mask_mod", dtype=BRAIN),
)
BARRIERS = (
    _case("barriers", WIDE, "causal"),
    _case("barriers_bias", BATCH, "bias", "dropout", dtype=BRAIN),
    _case("barriers_mods", PACKED, "score_mod", "mask_mod"),
    _case("barriers_float32", SMALL, "alibi", "window", dtype=SINGLE),
)


def _use_tiles(config: PortableConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict.fromkeys(tuning.KINDS, ((10**6, config),))
    monkeypatch.setattr(tuning, "TABLES", dict.fromkeys(tuning.TABLES, rows))


@pytest.fixture(params=EMULATED)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """The portable backend takes CPU tensors, and its kernels run on this GPU, emulated."""
    monkeypatch.setattr(portable, "unavailable", lambda: None)
    with running(Emulated(request.param), monkeypatch, request.node) as emulated:
        yield emulated


@contextmanager
def running(device: Emulated, monkeypatch: pytest.MonkeyPatch, node: Any = None) -> Iterator[Emulated]:
    """Launches go to this GPU; what it ran is noted with the test."""
    kernel = portable_on(device.machine, TARGETS[device.arch].family)
    monkeypatch.setattr(portable, "KERNELS", (kernel,))
    # What fits was found for another GPU.
    launch.forget_fitting()
    plan.choose.cache_clear()
    yield device
    plan.choose.cache_clear()
    if node is not None:
        device.note(node)


def _check(case: Case, device: Emulated) -> None:
    conformance.check_case(case, case.dtypes[0], "portable")
    assert {"forward_kernel", "delta_kernel", "query_kernel", "key_kernel"} <= set(device.ran)
    assert ("bias_kernel" in device.ran) == any(feature.startswith("bias") for feature in case.features)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, device: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_tiles(TILES, monkeypatch)
    _check(case, device)


@pytest.mark.parametrize(
    "case", [_case("apart", WIDE, "causal"), _case("apart_bias", SMALL, "bias", dtype=BRAIN)], ids=str
)
def test_dk_and_dv_apart(case: Case, device: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a launch of its own, with other tiles."""
    _use_tiles(APART, monkeypatch)
    _check(case, device)
    assert device.ran["key_kernel"] == 2


@pytest.mark.parametrize("case", SHIPPED, ids=str)
def test_the_tiles_that_are_shipped(case: Case, device: Emulated) -> None:
    """Larger ones than above: other instructions, more loads in flight, and smaller ones where they do not fit."""
    _check(case, device)


@pytest.mark.parametrize("headdim", [64, 128, 512])
def test_banks_of_shared_memory(headdim: int, device: Emulated) -> None:
    """Of what several lanes want at a time, little lies in one bank: no kind of access takes more than twice the cycles
    that it must."""
    device.conflicts = {}
    _check(_case("banks", dense(1, 64, 64, 1, 1, headdim), dtype=BRAIN), device)
    counted = {
        (kernel, name): (cycles, least)
        for kernel, found in device.conflicts.items()
        for name, (_, cycles, least) in found.items()
    }
    assert counted
    assert {key: pair for key, pair in counted.items() if pair[0] > 2 * pair[1]} == {}


@pytest.mark.parametrize("headdim", [64, 128])
def test_no_product_is_made_twice(headdim: int, device: Emulated) -> None:
    """By waves that have the same rows and columns, as those of tiles have that are too small for all of them."""
    _check(_case("products", dense(1, 128, 128, 1, 1, headdim), dtype=BRAIN), device)
    kernels = {"forward_kernel": 2, "query_kernel": 3, "key_kernel": 4}
    assert {name: device.multiplied[name] for name in kernels} == {
        name: count * 128 * 128 * headdim for name, count in kernels.items()
    }


@pytest.mark.parametrize("case", BARRIERS, ids=str)
def test_no_barrier_is_missing(case: Case, device: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between barriers it does not matter which wave goes first."""
    _use_tiles(TILES, monkeypatch)
    found = oracle.ours(case.call(case.dtypes[0]), "portable")
    with running(Emulated(device.arch, reverse_waves=True), monkeypatch) as other:
        reverse = oracle.ours(case.call(case.dtypes[0]), "portable")
    assert other.ran == device.ran
    # Gradients of captured tensors are added in any order.
    added = set(found) - {"out", "lse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks"}
    for name in added:
        torch.testing.assert_close(reverse.pop(name), found.pop(name), rtol=1e-5, atol=1e-5)
    oracle.assert_equal_bits(list(reverse.values()), list(found.values()))


def test_a_sequence_gets_the_same_bits_everywhere(device: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_tiles(TILES, monkeypatch)
    invariance.check("causal", HALF, "portable", 32)
    assert device.ran["forward_kernel"] > 1
