"""Runs the conformance list on the CPU, and proves that the list reaches every kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile import backends as contract
from flashtile.backends.pytorch import native
from tests import conformance, oracle
from tests.problems import CASES, FEATURES, Case, dense, make

POINTS = [
    pytest.param(case, dtype, backend, id=f"{backend}-{case}-{str(dtype).removeprefix('torch.')}")
    for backend in conformance.backends()
    for case in CASES
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "dtype", "backend"), POINTS)
def test_backend_matches_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    conformance.check_case(case, dtype, backend)


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_every_feature_has_a_case() -> None:
    used = {feature for case in CASES for feature in case.features}
    assert used == set(FEATURES)


@pytest.mark.parametrize("backend", conformance.backends())
def test_every_kernel_has_a_case(backend: str) -> None:
    named = {case.kernels[backend] for case in CASES if backend in case.kernels}
    assert named == {kernel.name for kernel in contract.load(backend).KERNELS}


def _spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Counts the calls of one of PyTorch's two operators."""
    calls: list[str] = []
    original: Callable[..., Any] = getattr(native, name)

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*arguments, **options)

    monkeypatch.setattr(native, name, called)
    return calls


@pytest.mark.parametrize(
    ("features", "lse_grad", "forwards", "backwards"),
    [
        ((), False, 1, 1),
        ((), True, 1, 0),
        (("causal",), False, 1, 1),
        (("causal", "varlen"), False, 2, 2),
    ],
)
def test_aten_flash_runs_the_operator(
    features: tuple[str, ...], lse_grad: bool, forwards: int, backwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel named aten_flash may hand hard cases to the sweep; ordinary ones must reach PyTorch's operator."""
    called = _spy(monkeypatch, "_FORWARD"), _spy(monkeypatch, "_BACKWARD")
    oracle.check(make("native", dense(2, 64, 64, 2, 2, 32), features, torch.float32, lse_grad=lse_grad))
    assert [len(calls) for calls in called] == [forwards, backwards]


@pytest.mark.parametrize("backend", conformance.backends())
def test_explain_names_the_kernel_that_runs(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    for case in CASES:
        call = case.call(case.dtypes[0])
        packing = {name: value for name, value in call.packing().items() if name.startswith("cu")}
        tensors = [call.leaves[name] for name in "qkv"]
        chosen = flashtile.explain(*tensors, **packing, **call.arguments(), backend=backend)
        assert chosen.kernel == case.kernels.get(backend, chosen.kernel)
        assert chosen.kernel in capsys.readouterr().out
