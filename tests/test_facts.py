"""What a machine is told of itself: builds of PyTorch, releases of Triton, GPUs of several makers, each pretended."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import facts, plan
from flashtile.backends import hopper, portable
from flashtile.compiling.targets import TARGETS
from flashtile.problem import Inputs, Options, Problem, describe

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Says what GPUs there are (by architecture), what PyTorch is built for and which Triton is installed."""

    def machine(*gpus: str, hip: str | None = None, cuda: str | None = None, triton: str | None = "3.8.0") -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        names = [SimpleNamespace(gcnArchName=f"{gpu}:sramecc+:xnack-") for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: names[index])
        numbers = [divmod(int(gpu.removeprefix("sm_")), 10) if gpu.startswith("sm_") else None for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: numbers[index])
        monkeypatch.setattr(facts, "triton_version", lambda: triton)
        _forget()

    yield machine
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    facts._arch.cache_clear()
    facts._judge.cache_clear()
    plan.choose.cache_clear()


def _problem(**changed: Any) -> Problem:
    q = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16)
    return replace(describe(Inputs(q, q, q), Options(scale=0.1, out_dtype=q.dtype)), device="cuda", **changed)


@pytest.mark.parametrize("gpu", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_amd_gpus(pretend: Pretend, gpu: str) -> None:
    """PyTorch calls them "cuda", and nothing for NVIDIA's is tried on them."""
    pretend(gpu, hip="6.4.43482")
    assert dict(plan.available()) == {
        "hopper": f"there is no Hopper (sm_90), but {gpu}",
        "portable": None,
        "pytorch": None,
    }
    assert facts.arch(torch.device("cuda", 0)) == facts.arch(torch.device("cuda")) == gpu
    assert portable.family_of(gpu) == ("cdna" if gpu.startswith("gfx9") else "rdna")
    chosen = plan.choose(_problem(arch=gpu))
    assert (chosen.backend, chosen.rejected[0][0]) == ("portable", "hopper")


@pytest.mark.parametrize(
    ("gpu", "family"),
    [("sm_80", "ampere"), ("sm_86", "ampere"), ("sm_89", "ampere"), ("sm_90", "hopper"), ("sm_100", "blackwell"),
     ("sm_120", "ampere")],
)  # fmt: skip
def test_nvidia_gpus(pretend: Pretend, gpu: str, family: str) -> None:
    pretend(gpu, cuda="12.8")
    assert facts.architectures() == [gpu]
    assert portable.family_of(gpu) == family
    assert plan.choose(_problem(arch=gpu)).backend == ("hopper" if gpu == "sm_90" else "portable")


@pytest.mark.parametrize("target", TARGETS)
def test_wide_float32(pretend: Pretend, target: str) -> None:
    """Where shared memory is small, the backward pass is refused before any launch, and PyTorch's runs."""
    arch = target.removesuffix("a") if target.startswith("sm_") else target
    pretend(arch, **({"cuda": "12.8"} if arch.startswith("sm_") else {"hip": "6.4.43482"}))
    wide = _problem(arch=arch, headdim=512, headdim_v=257, backward=True)
    wide = replace(wide, dtype=torch.float32, out_dtype=torch.float32)
    small = TARGETS[target].shared == 99 * 1024
    assert plan.choose(wide).backend == ("pytorch" if small else "portable")
    for fits in (replace(wide, backward=False), replace(wide, headdim_v=256), replace(wide, dtype=torch.bfloat16)):
        assert plan.choose(fits).backend == "portable"
    if small:
        with pytest.raises(NotImplementedError, match="backward pass of more than 256 columns in float32 exceeds"):
            plan.choose(wide, "portable")


def test_gpus_of_two_kinds(pretend: Pretend) -> None:
    """The plan is for the GPU that the tensors lie on, not for the first one or the last one planned for."""
    pretend("sm_90", "sm_80", cuda="12.8")
    assert [facts.arch(torch.device("cuda", index)) for index in range(2)] == ["sm_90", "sm_80"]
    for arch, backend in (("sm_90", "hopper"), ("sm_80", "portable"), ("sm_90", "hopper")):
        assert plan.choose(_problem(arch=arch)).backend == backend
    assert hopper.refuses(_problem(arch="sm_80")) == "it runs on sm_90, the tensors are on a GPU of sm_80"
    with pytest.raises(NotImplementedError, match=r"hopper/warp_specialized: it runs on sm_90, .* a GPU of sm_80"):
        plan.choose(_problem(arch="sm_80"), "hopper")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({}, r"PyTorch .* is built for the CPU alone; on a GPU install its build for CUDA or ROCm"),
        ({"cuda": "12.8"}, r"there is no GPU that PyTorch sees \(it is built for CUDA 12.8\)"),
        ({"hip": "6.4.1"}, r"there is no GPU that PyTorch sees \(it is built for ROCm 6.4.1\)"),
    ],
    ids=("cpu", "cuda", "rocm"),
)
def test_no_gpu(pretend: Pretend, build: dict[str, str], said: str) -> None:
    pretend(**build)
    assert facts.architectures() == []
    assert facts.arch(torch.device("cuda")) == ""
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=f"portable: {said}"):
        flashtile.attention(q, q, q, backend="portable")
    assert flashtile.explain(q, q, q).backend == "pytorch"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "triton is not installed; it needs 3.6 to 3.9, try pip install triton"),
        ("3.5.1", "triton 3.5.1 is too old; it needs 3.6 to 3.9, try pip install -U triton"),
        ("2.3.0", "triton 2.3.0 is too old"),
        ("", "this triton does not say which version it is"),
    ],
)
def test_releases_of_triton_that_do_not_do(pretend: Pretend, version: str | None, said: str) -> None:
    pretend("sm_80", cuda="12.8", triton=version)
    assert said in str(dict(plan.available())["portable"])
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=r"portable: .*triton"):
        flashtile.attention(q, q, q, backend="portable")
    assert flashtile.attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.9.0+git1234", "3.7.0+rocm6.4"])
def test_releases_that_are_supported(pretend: Pretend, version: str) -> None:
    pretend("gfx942", hip="6.4", triton=version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert facts.no_triton() is None


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0"])
def test_newer_releases_are_tried_with_one_warning(pretend: Pretend, version: str) -> None:
    pretend("sm_80", cuda="13.0", triton=version)
    with pytest.warns(RuntimeWarning, match=rf"triton {version} is newer than flashtile was tested with, 3.6 to 3.9"):
        assert dict(plan.available())["portable"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dict(plan.available())["portable"] is None


def _python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    begin = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=300)


USE = """
import torch, flashtile
q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))
out = flashtile.attention(q, k, v, mask=lambda b, h, i, j: i - j < 9, score_mod=lambda s, b, h, i, j: s + j)
out.sum().backward()
assert q.grad.isfinite().all()
print(flashtile.explain(q, k, v))
print(flashtile.builds())
"""


def test_without_triton_the_cpu_backend_works() -> None:
    done = _python("sys.modules['triton'] = None\n" + USE + "print(flashtile.facts.no_triton())")
    assert done.returncode == 0, done.stderr
    assert "runs on  pytorch/aten_flash" in done.stdout
    assert "triton is not installed; it needs 3.6 to 3.9" in done.stdout


def test_the_version_is_read_where_the_package_lies(tmp_path: Path) -> None:
    """ROCm's builds of Triton have distributions of other names; reading imports nothing."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        '"""isort:skip_file"""\n__version__ = "3.4.0"\nraise SystemExit(3)\n'
    )
    code = "from flashtile import facts; print(facts.triton_version(), facts.no_triton())\n"
    done = _python(code + "assert 'triton' not in sys.modules", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3.4.0 triton 3.4.0 is too old" in done.stdout


def test_this_triton_is_found() -> None:
    triton = pytest.importorskip("triton")
    assert facts.triton_version() == triton.__version__
