"""What all tests share: one thread, fixed seeds, hypothesis without timing or chance, and small tiles on request."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from flashtile import plan
from flashtile.tuning import cpu

# Triton decides once per process whether it interprets kernels; those tests run by themselves (see the Makefile).
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py", "gpu/*", "emulated/*"] if interpreted else ["interpreted/*"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob += ["emulated/*", "test_builds.py", "test_compile.py", "test_lower.py"]

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=int(os.environ.get("FLASHTILE_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")
# Test processes share the cores, and most tensors here are too small for a second thread to do anything but wait.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The PyTorch backend with tiles of 16 x 8, walked 24 keys and 3 heads at a time, so that small calls have many."""
    monkeypatch.setattr(cpu, "TILES", ((2**62, 16, 8, 24),))
    monkeypatch.setattr(cpu, "SCORES_HELD", 3 * 16 * 24)
    plan.choose.cache_clear()
    yield
    monkeypatch.undo()
    plan.choose.cache_clear()
