"""The command line: what it prints, what it refuses and how, and what it does not import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from flashtile import cli, plan
from flashtile.bench import machine, show
from flashtile.bench.suite import SUITES, usual
from flashtile.cli import bench, demo
from flashtile.demo import show as demo_show


def test_importing_it_loads_neither_torch_nor_the_extra() -> None:
    code = (
        "import sys, flashtile.cli; print([m for m in ('torch', 'rich', 'matplotlib', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "flashtile", "--help"], capture_output=True, text=True, check=True)
    for name in ("doctor", "explain", "demo", "bench"):
        assert name in done.stdout


class TestDoctor:
    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["versions"]["flashtile"] == flashtile.__version__
        assert found["versions"]["torch"] == str(torch.__version__)
        assert found["cpu"]["threads"] == torch.get_num_threads()
        assert found["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
        assert len(found["gpus"]) == torch.cuda.device_count()
        assert [(b["name"], b["reason"]) for b in found["backends"]] == plan.available()
        assert next(b for b in found["backends"] if b["name"] == "pytorch")["usable"]

    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert "pytorch: usable, kernels" in text
        assert machine.cpu_name() in text

    def test_what_is_missing_is_said(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "c_compiler", lambda: None)
        monkeypatch.setattr(machine, "triton_version", lambda: None)
        monkeypatch.setattr(plan, "available", lambda: [("pytorch", "it has a cold")])
        _without(monkeypatch, "rich")
        assert cli.main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "none found; Triton builds its launchers with one" in text
        assert "triton not installed" in text
        assert "pytorch: it has a cold" in text
        assert "rich is missing: pip install 'flashtile[cli]'" in text


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, as far as defaults go; nothing may run there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("_no_gpu")
class TestExplain:
    def explain(self, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        assert cli.main(["explain", *options]) == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize(("options", "device"), [([], "cuda"), (["--device", "cpu"], "cpu")])
    def test_the_gpu_by_default(self, options: list[str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        _with_gpu(monkeypatch)
        asked: list[str] = []
        make = torch.empty

        def empty(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
            asked.append(device)
            return make(*shape, dtype=dtype)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(flashtile, "explain", lambda *tensors, **options: None)
        assert cli.main(["explain", *options]) == 0
        assert asked == [device] * 3

    def test_names_the_kernel_and_what_was_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "pytorch/aten_flash" in self.explain(capsys, "--causal")
        text = self.explain(capsys, "--causal", "--window", "512", "0", "--seqlen-q", "4096")
        assert "runs on  pytorch/tiled" in text
        assert "refused  pytorch/aten_flash: the mask is" in text

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--softcap", "30"], "softcap"),
            (["--alibi"], "alibi_slopes"),
            (["--bias"], "bias"),
            (["--sinks"], "sinks"),
            (["--dropout-p", "0.1"], "dropout_p"),
            (["--documents", "3"], "document"),
            (["--window", "none", "5"], "window(-1, 5)"),
            (["--headdim", "32", "--headdim-v", "48"], "headdim 32/48"),
            (["--heads", "8", "--heads-kv", "2", "--batch", "3"], "heads 8/2"),
            (["--seqlen-q", "70", "--seqlen-kv", "90"], "seqlen 70x90"),
            (["--dtype", "bfloat16"], "bfloat16"),
            (["--backend", "pytorch", "--deterministic"], "pytorch"),
        ],
    )
    def test_every_option_arrives(self, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
        assert said in self.explain(capsys, *options)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--heads", "8", "--heads-kv", "3"], "k: got 3 heads"),
            (["--backend", "abacus"], "backend"),
            (["--dropout-p", "1.5"], "dropout_p"),
            (["--documents", "0"], "--documents: got 0"),
            (["--device", "nowhere"], "nowhere"),
        ],
    )
    def test_a_wrong_call_ends_with_2_and_one_line(
        self, capsys: pytest.CaptureFixture[str], options: list[str], said: str
    ) -> None:
        assert cli.main(["explain", *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("flashtile explain: ")
        assert error.count("\n") == 1


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize(
    ("missing", "said"),
    [(("rich",), "needs rich, which is"), (("rich", "matplotlib"), "needs rich and matplotlib, which are")],
)
def test_without_the_extra_one_line_says_how_to_get_it(
    command: str,
    missing: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _without(monkeypatch, *missing)
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == f"flashtile {command}: {said} not installed: pip install 'flashtile[cli]'\n"


@pytest.mark.usefixtures("_no_gpu")
class TestBench:
    def given(self, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, ...]:
        """What reaches the suites."""
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(show, "run", lambda *given: calls.append(given) or 0)
        assert cli.main(["bench", *options]) == 0
        return calls[0]

    def test_all_suites_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names, settings, folder = self.given(monkeypatch)
        assert names == ["dense", "masks", "memory", "error"]
        assert set(names) < set(SUITES)
        assert (settings.device, settings.dtypes) == ("cpu", ("float32",))
        assert (settings.heads, settings.headdim, settings.seqlens) == (8, 64, (1024, 2048, 4096, 8192))
        assert folder == Path("benchmarks/results")

    @pytest.mark.parametrize(
        ("options", "device", "dtypes"),
        [
            ([], "cuda", ("bfloat16",)),
            (["--dtype", "float16", "float32"], "cuda", ("float16", "float32")),
            (["--device", "cuda:1"], "cuda:1", ("bfloat16",)),
            (["--device", "cpu"], "cpu", ("float32",)),
            (["--device", "cpu", "--dtype", "bfloat16"], "cpu", ("bfloat16",)),
        ],
    )
    def test_the_gpu_by_default(
        self, options: list[str], device: str, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _with_gpu(monkeypatch)
        monkeypatch.setattr(bench, "need_device", lambda device: None)
        names, settings, _ = self.given(monkeypatch, *options)
        assert (settings.device, settings.dtypes) == (device, dtypes)
        assert names == usual(device)
        assert ("functions" in names) == device.startswith("cuda")

    def test_options_arrive(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        options = ["masks", "--heads", "4", "--heads-kv", "2", "--seqlen", "512", "256", "--dtype", "bfloat16"]
        names, settings, folder = self.given(monkeypatch, *options, "--seconds", "3", "--results", str(tmp_path))
        assert (names, folder) == (["masks"], tmp_path)
        assert (settings.heads, settings.heads_kv, settings.seqlens) == (4, 2, (256, 512))
        assert (settings.dtypes, settings.effort.seconds) == (("bfloat16",), 3.0)

    def test_a_suite_and_its_report(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        results, docs = str(tmp_path / "results"), str(tmp_path / "docs")
        assert cli.main(["bench", "masks", "--quick", "--results", results]) == 0
        text = capsys.readouterr().out
        assert "geometric mean" in text
        assert "masks.json" in text
        assert cli.main(["bench", "report", "--results", results, "--docs", docs]) == 0
        assert "causal document" in (tmp_path / "docs" / "benchmarks.md").read_text()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                ["speed"],
                "suite: got 'speed', need one of dense, masks, grid, lengths, portable, fp8, fp8_error, grid_error, "
                "shapes, functions, packed, sparsity, decode, memory, error",
            ),
            (["--peers", "nobody"], "--peers: got 'nobody', need one of flashtile, flashtile_functions, textbook"),
            (["--heads", "8", "--heads-kv", "3"], "--heads-kv: got 3, need a divisor of 8 heads"),
            (["--device", "nowhere"], "--device: got 'nowhere'"),
            (["report", "--results", "no-such-folder"], "no-such-folder: got no record"),
        ],
    )
    def test_a_wrong_call_ends_with_2(self, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
        assert cli.main(["bench", *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"), [(["--steps", "0"], "--steps: got 0"), (["--device", "nowhere"], "nowhere")]
)
def test_a_wrong_demo_ends_with_2(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert cli.main(["demo", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ([], ("cuda", "bfloat16")),
        (["--device", "cpu"], ("cpu", "float32")),
        (["--dtype", "float32"], ("cuda", "float32")),
    ],
)
def test_the_demo_takes_the_gpu_by_default(
    options: list[str], on: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_gpu(monkeypatch)
    shown: list[demo_show.Demo] = []
    monkeypatch.setattr(demo, "need_device", lambda device: None)
    monkeypatch.setattr(demo_show, "run", lambda given: shown.append(given) or 0)
    assert cli.main(["demo", *options]) == 0
    assert (shown[0].training.device, shown[0].training.dtype) == on
