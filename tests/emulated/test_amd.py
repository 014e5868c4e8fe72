"""The portable kernels against the reference on four AMD GPUs, emulated (`tests.emulated.amd` says what that needs)."""

from collections.abc import Iterator

import pytest
import torch

from flashtile import plan
from flashtile.backends import Kernel, portable
from flashtile.backends.portable import launch
from flashtile.backends.portable.launch import Machine
from flashtile.compiling.targets import TARGETS
from flashtile.kernels import support
from flashtile.tuning import portable as tuning
from flashtile.tuning.portable import PortableConfig, Tiles
from tests import conformance, oracle
from tests.emulated import amd
from tests.problems import Case, Shape, dense, packed

if (missing := amd.missing()) is not None:
    pytest.skip(missing, allow_module_level=True)

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TILES = PortableConfig(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 2, 2))
SMALL = dense(1, 45, 70, 2, 1, 32)
WIDE = dense(1, 70, 100, 2, 2, 64)
BATCH = dense(2, 33, 50, 2, 1, 32)
PACKED = packed((40, 1, 0, 33), (37, 20, 9, 0), 2, 1)
USED = packed((24, 40), (60, 30), 2, 1, used_q=(20, 40), used_kv=(47, 11))


def _case(name: str, shape: Shape, *features: str, dtype: torch.dtype = HALF) -> Case:
    return Case(name, shape, features, (dtype,))


CASES = (
    _case("plain", WIDE),
    _case("plain_bfloat16", WIDE, dtype=BRAIN),
    _case("plain_float32", SMALL, dtype=SINGLE),
    _case("causal", WIDE, "causal"),
    _case("causal_bfloat16", SMALL, "causal", dtype=BRAIN),
    _case("window", BATCH, "window"),
    _case("headdim_40", dense(1, 40, 50, 2, 1, 40), "causal"),
    _case("bias", BATCH, "bias"),
    _case("bias_queries", BATCH, "bias_queries", "causal"),
    _case("alibi_softcap_sinks", SMALL, "alibi", "softcap", "sinks"),
    _case("dropout", BATCH, "dropout", "causal"),
    _case("score_mod", SMALL, "score_mod"),
    _case("mask_mod", SMALL, "mask_mod"),
    _case("document", BATCH, "document_unsorted", "causal"),
    _case("varlen", PACKED, "causal"),
    _case("varlen_used", USED, "bias", "dropout"),
    _case("varlen_mods", PACKED, "score_mod", "mask_mod"),
)
SHIPPED = (
    _case("headdim_64", dense(1, 100, 150, 1, 1, 64), "causal"),
    _case("headdim_64_float32", dense(1, 70, 70, 1, 1, 64), dtype=SINGLE),
    _case("headdim_64_score_mod", dense(1, 70, 100, 1, 1, 64), "score_mod", "bias"),
    _case("headdim_128", dense(1, 100, 150, 1, 1, 128), "causal"),
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict.fromkeys(tuning.KINDS, ((10**6, TILES),))
    monkeypatch.setattr(tuning, "TABLES", dict.fromkeys(("cdna", "rdna"), rows))


@pytest.fixture(params=amd.EMULATED)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The portable backend takes CPU tensors, and its kernels run on this GPU, emulated."""
    monkeypatch.setattr(portable, "unavailable", lambda: None)
    _run_on(request.param, amd.machine(request.param), monkeypatch)
    yield request.param
    plan.choose.cache_clear()


def _run_on(arch: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    family = TARGETS[arch].family
    kernel = Kernel(
        "sweep",
        support.functions,
        lambda problem: portable.configure(problem, family),
        lambda *arguments: launch.forward(*arguments[:-1], machine=machine),
        lambda *arguments: launch.backward(*arguments[:-1], machine=machine),
    )
    monkeypatch.setattr(portable, "KERNELS", (kernel,))
    # What fits was found for another GPU.
    launch.forget_fitting()
    plan.choose.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, arch: str) -> None:
    conformance.check_case(case, case.dtypes[0], "portable")


@pytest.mark.parametrize("case", SHIPPED, ids=str)
def test_the_tiles_that_are_shipped(case: Case, arch: str) -> None:
    """Larger ones than above: other instructions, more loads in flight, and smaller ones where they do not fit."""
    conformance.check_case(case, case.dtypes[0], "portable")


def test_no_barrier_is_missing(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between barriers it does not matter which wave goes first."""
    call = _case("barriers", WIDE, "causal").call(HALF)
    found = oracle.ours(call, "portable")
    _run_on(arch, amd.machine(arch, reverse_waves=True), monkeypatch)
    reverse = oracle.ours(call, "portable")
    oracle.assert_equal_bits(list(reverse.values()), list(found.values()))
