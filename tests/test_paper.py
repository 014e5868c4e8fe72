"""`flashtile bench paper`: every row runs in toy sizes, wrong results get no figure, the page says what was not met."""

import json
import os
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashtile import cli
from flashtile.bench.paper import drawing, experiment, kernels, page
from flashtile.bench.paper.experiment import Figures, Pair, Row, Setting
from flashtile.bench.paper.rows import ROWS
from flashtile.bench.paper.worker import Worker, rehearse
from flashtile.cli import bench
from tests import conformance

QUICK = Setting("cpu", torch.float32, quick=True, seconds=0.0)


def _row(**changes: Any) -> Row:
    def measure(setting: Setting, note: Any) -> Figures:
        return experiment.timed(Pair(lambda: torch.ones(3), lambda: torch.ones(3)), setting, note)

    fields = {"name": "one", "title": "One", "claim": "2x", "claimed": 2.0, "baseline": "b", "share": "s"}
    return Row(**{**fields, "measure": measure, **changes})


@pytest.mark.parametrize("name", ROWS)
def test_rows_run(name: str) -> None:
    """Each with flashtile in one of its columns, compared with the other where both mean the same."""
    for module in ROWS[name].needs:
        pytest.importorskip(module, reason=f"{module} is not installed")
    with conformance.watched() as plans:
        entry = experiment.run(ROWS[name], QUICK)
    assert entry["status"] == "ok", entry["reason"]
    assert plans
    figures = entry["figures"]
    assert figures["ratio"] > 0
    if name.startswith(
        ("documents-32k", "documents-128k", "memory", "fp8", "gpt2-4k", "gpt2-longest", "unet-training")
    ):
        assert figures["difference"] is None
    else:
        assert figures["difference"] < 1e-3
    if name.startswith(("bert", "gpt2", "evoformer", "unet")):
        assert figures["details"]["ceiling"] > 0
    json.dumps(entry)


class TestExperiment:
    def test_ratio_counts_work(self) -> None:
        pair = Pair(lambda: torch.ones(1), lambda: torch.ones(1), work=(1.0, 3.0))
        found = experiment.timed(pair, QUICK, lambda text: None)
        assert found.ratio == pytest.approx(3 * found.baseline / found.ours)

    def test_wrong_results_get_no_figure(self) -> None:
        def measure(setting: Setting, note: Any) -> Figures:
            return experiment.timed(Pair(lambda: torch.ones(3), lambda: torch.full((3,), 1.1)), setting, note)

        entry = experiment.run(_row(measure=measure), QUICK)
        assert (entry["status"], "figures" in entry) == ("wrong", False)
        assert "results differ by 0.1 in norm, allowed are 0.001" in entry["reason"]

    def test_nan_is_wrong(self) -> None:
        def measure(setting: Setting, note: Any) -> Figures:
            return experiment.timed(Pair(lambda: torch.ones(1), lambda: torch.full((1,), torch.nan)), setting, note)

        assert experiment.run(_row(measure=measure), QUICK)["status"] == "wrong"

    def test_a_crash_is_kept(self) -> None:
        def measure(setting: Setting, note: Any) -> Figures:
            raise RuntimeError("no")

        entry = experiment.run(_row(measure=measure), QUICK)
        assert (entry["status"], entry["reason"]) == ("failed", "RuntimeError: no")

    def test_what_is_not_installed(self) -> None:
        entry = experiment.run(_row(needs=("no_such_module",)), QUICK)
        assert (entry["status"], entry["reason"]) == ("absent", "no_such_module not installed")


def _breaks(name: str) -> Row:
    """A row that prints what would confuse the answers, then does what its name says."""

    def measure(setting: Setting, note: Any) -> Figures:
        print("printed by a library", flush=True)
        note("begun")
        if name == "ends":
            os._exit(3)
        if name == "hangs":
            time.sleep(100)
        if name == "raises":
            raise torch.OutOfMemoryError("no memory")
        return Figures(2.0, 1.0, "ms", 2.0, None, {})

    return _row(name=name, measure=measure)


BREAKING = {name: _breaks(name) for name in ("works", "ends", "raises", "hangs")}


def _tells(name: str) -> Row:
    """A row that writes down where and how it was run."""

    def measure(setting: Setting, note: Any) -> Figures:
        told = f"{os.getpid()} {setting.rehearsal} {setting.seconds} {setting.batch(8, 2)}"
        Path(os.environ["REHEARSED"], name).write_text(told)
        raise RuntimeError("what comes of it does not matter")

    return _row(name=name, measure=measure)


REHEARSED = {name: _tells(name) for name in ("one", "two", "three")}


class TestWorker:
    def test_rows_are_apart(self) -> None:
        """One that ends its process or hangs costs its own figures; the next one gets a new process."""
        said: list[str] = []
        with Worker(QUICK, 60.0, f"{__name__}:BREAKING") as worker:
            names = ("raises", "works", "ends", "works")
            first, second, third, fourth = (worker.measure(BREAKING[name], said.append) for name in names)
            assert worker.measure(BREAKING["hangs"], said.append, seconds=0.5) is None
            worker.limit = 0.5
            hung = worker.measure(BREAKING["hangs"], said.append)
        assert first is not None
        assert (first["status"], first["reason"]) == ("failed", "OutOfMemoryError: no memory")
        assert [each["figures"]["ratio"] for each in (second, fourth) if each] == [2.0, 2.0]
        assert third is not None
        assert third["status"] == "failed"
        assert third["reason"].startswith("the measuring process ended with 3: ")
        assert hung is not None
        assert (hung["status"], hung["reason"]) == ("failed", "took longer than 0 s")
        assert said[:4] == ["begun"] * 4

    def test_a_rehearsal_keeps_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every row runs, those that fail too, in processes of their own that are told that it is one."""
        monkeypatch.setenv("REHEARSED", str(tmp_path))
        rehearse(list(REHEARSED.values()), QUICK, 2, 60.0, f"{__name__}:REHEARSED")
        told = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
        assert {name: rest for name, (_, *rest) in told.items()} == {name: ["True", "0.0", "1"] for name in REHEARSED}
        processes = {process for process, *_ in told.values()}
        assert 1 <= len(processes) <= 2
        assert str(os.getpid()) not in processes

    def test_a_rehearsal_ends(self) -> None:
        begin = time.monotonic()
        rehearse([BREAKING["hangs"]], QUICK, 2, 0.2, f"{__name__}:BREAKING")
        assert time.monotonic() - begin < 20

    def test_settings_travel(self) -> None:
        assert experiment.loaded(experiment.dumped(QUICK)) == QUICK


class TestPage:
    @pytest.fixture
    def rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = {
            name: _row(name=name, title=name.title(), claimed=claimed)
            for name, claimed in (("slow", 1e9), ("any", None))
        }
        monkeypatch.setattr(page, "ROWS", rows)

    @pytest.mark.usefixtures("rows")
    def test_written_in_parts(self, tmp_path: Path) -> None:
        setting = Setting("cpu", torch.float32, quick=False, seconds=0.0)
        results, docs = tmp_path / "results", tmp_path / "docs"
        assert page.run(["slow"], setting, results, docs) == 0
        assert "| Any | 2x (–) | not run: the record has no figures of it |" in (docs / "paper.md").read_text()
        assert page.run(["any"], setting, results, docs) == 0
        text = (docs / "paper.md").read_text()
        assert text.index("| Slow |") < text.index("| Any |")
        assert "not run" not in text
        assert text.count("not met |") == 1
        assert "| 2x (–) |" in text
        (plot,) = (docs / "benchmarks").glob("*-paper.png")
        assert f"(benchmarks/{plot.name})" in text
        assert plot.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.usefixtures("rows")
    def test_older_rows_are_dated(self, tmp_path: Path) -> None:
        """A record made in parts says when and of what the rows were measured that its last run left."""
        setting = Setting("cpu", torch.float32, seconds=0.0)
        folders = (tmp_path / "results", tmp_path / "docs")
        page.run(["slow"], setting, *folders)
        (path,) = folders[0].glob("*/paper/rows.json")
        record = json.loads(path.read_text())
        assert record["rows"][0]["date"][:10] == record["machine"]["date"][:10]
        # As in records from before rows had dates: theirs is the record's.
        del record["rows"][0]["date"], record["rows"][0]["commit"]
        record["machine"] |= {"date": "2026-01-02T03:04:05+00:00", "source": {"commit": "abcdef0123", "dirty": False}}
        path.write_text(json.dumps(record))
        page.run(["any"], setting, *folders)
        slow, other = (
            line for line in (tmp_path / "docs" / "paper.md").read_text().splitlines() if line[2:6] in ("Slow", "Any ")
        )
        assert "x, not met (2026-01-02 03:04 at abcdef0) |" in slow
        assert "(20" not in other

    @pytest.mark.usefixtures("rows")
    def test_kept_row_by_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run that is killed keeps the rows before."""

        def measure(setting: Setting, note: Any) -> Figures:
            raise KeyboardInterrupt

        monkeypatch.setitem(page.ROWS, "any", _row(name="any", measure=measure))
        setting = Setting("cpu", torch.float32, seconds=0.0)
        with pytest.raises(KeyboardInterrupt):
            page.run(["slow", "any"], setting, tmp_path / "results", tmp_path / "docs")
        (record,) = (tmp_path / "results").glob("*/paper/rows.json")
        assert [entry["name"] for entry in json.loads(record.read_text())["rows"]] == ["slow"]

    @pytest.mark.usefixtures("rows")
    def test_budget(self, tmp_path: Path) -> None:
        console = Console(width=200, file=StringIO())
        folders = (tmp_path / "results", tmp_path / "docs")
        assert page.run(["slow", "any"], QUICK, *folders, console, budget=1e-9) == 0
        assert "no time left for --rows slow any" in console.file.getvalue()
        assert not list((tmp_path / "results").glob("*/paper/rows.json"))

    def test_rows_of_a_suite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The FP8 suite's record answers its row where no run of these rows has; a cell that failed there has no
        figure here either."""
        rows = {"any": _row(name="any"), "fp8": ROWS["fp8"]}
        monkeypatch.setattr(page, "ROWS", rows)
        results, docs = tmp_path / "results", tmp_path / "docs"
        page.run(["any"], Setting("cpu", torch.float32, seconds=0.0), results, docs)
        case = {"feature": "plain", "seqlen": 16384, "headdim": 256}
        cells = [
            {"case": case, "peer": peer, "pass": "forward", "status": "ok", "gflops": 1e6 * rate, "gate": {}}
            for peer, rate in (("fa3_fp8", 1.1), ("flashtile_eight", 0.9))
        ]
        other = {**cells[1], "case": {**case, "headdim": 64}, "gflops": 1.0}
        (folder,) = results.iterdir()
        (folder / "fp8.json").write_text(json.dumps({"rows": [other, *cells]}))
        page.write(results, docs)
        text = (docs / "paper.md").read_text()
        assert "| 0.75x, not met | 1200 TFLOP/s | 900 TFLOP/s |" in text
        assert "the claim's own program comes to 1100 TFLOP/s on this GPU |" in text
        with pytest.raises(experiment.Wrong, match="out: max"):
            kernels.eight_bits([{**cells[1], "status": "wrong", "reason": "out: max error 1"}])

    def test_what_no_attention_would_come_to(self) -> None:
        entry = experiment.run(_row(claimed=3.0), QUICK)
        entry["figures"] |= {"ratio": 1.5, "details": {"ceiling": 2.25}}
        assert page.table([entry]).rows[0][2] == "1.50x, not met: 2.25x if attention took no time"

    def test_why_a_claim_is_missed(self) -> None:
        """Attention's part of both steps, and the host's, as far as they were measured; nothing where it is met."""
        entry = experiment.run(_row(claimed=3.0), QUICK)
        details = {"ceiling": 2.0, "without_attention_ms": 30.0, "gpu_busy": {"baseline": 0.95, "ours": 0.8}}
        entry["figures"] |= {"baseline": 60.0, "ours": 40.0, "ratio": 1.5, "details": details}
        assert page.table([entry]).rows[0][-1] == (
            "s; attention takes 50% of the baseline's time and 25% of ours; "
            "the GPU is at work in 95% and 80% of it: the host is too slow"
        )
        entry["figures"]["details"] = {"rates": {"fa3_fp8": 1100.0}}
        assert page.table([entry]).rows[0][-1] == "s; the claim's own program comes to 1100 TFLOP/s on this GPU"
        entry["claimed"] = 1.5
        assert page.table([entry]).rows[0][-1] == "s"
        entry["figures"]["ratio"] = 3.5
        assert page.table([entry]).rows[0][2] == "3.50x"

    def test_memory_is_shown(self, tmp_path: Path) -> None:
        """At the peak of a row, and of attention alone as a curve."""
        entry = experiment.run(_row(claimed=None), QUICK)
        entry["figures"]["details"] = {"peak_bytes": {"baseline": 3 * 2**30, "ours": 2**20}}
        assert page.table([entry]).rows[0][-1] == "s; beside weights and inputs it takes 3 GiB and 1 MiB"
        curve = {"baseline": {"1024": 2**30, "2048": 2**32}, "ours": {"1024": 2**20, "2048": 2**21, "4096": 2**22}}
        entry["figures"]["details"] = {"peak_bytes": curve}
        assert page.table([entry]).rows[0][-1] == "s"
        path = drawing.memory(entry, tmp_path / "memory.png")
        assert path is not None
        assert path.read_bytes().startswith(b"\x89PNG")
        assert drawing.memory({**entry, "status": "failed"}, path) is None

    @pytest.mark.usefixtures("rows")
    def test_quick_runs_make_no_page(self, tmp_path: Path) -> None:
        assert page.run(["any"], QUICK, tmp_path / "results", tmp_path / "docs") == 0
        assert not (tmp_path / "docs").exists()

    def test_failures_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(setting: Setting, note: Any) -> Figures:
            raise RuntimeError("no")

        monkeypatch.setattr(page, "ROWS", {"one": _row(measure=measure)})
        setting = Setting("cpu", torch.float32, seconds=0.0)
        assert page.run(["one"], setting, tmp_path / "results", tmp_path / "docs") == 1
        assert "| failed: RuntimeError: no | – | – |" in (tmp_path / "docs" / "paper.md").read_text()


class TestCommand:
    def test_unknown_rows(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bench", "paper", "--rows", "nothing", "--quick"]) == 2
        assert "--rows: got 'nothing', need some of bert-training" in capsys.readouterr().err

    def test_the_cpu(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main(["bench", "paper"]) == 2
        assert "paper: got the CPU, need a GPU for models of these sizes; try --device cuda" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "expected"),
        [([], Setting("cuda", torch.bfloat16)), (["--dtype", "float16"], Setting("cuda", torch.float16))],
    )
    def test_the_gpu_by_default(self, options: list[str], expected: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
        settings: list[Setting] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(bench, "need_device", lambda device: None)
        monkeypatch.setattr(page, "run", lambda names, setting, *rest, **more: settings.append(setting) or 0)
        assert cli.main(["bench", "paper", "--seconds", "4", *options]) == 0
        assert settings == [expected]

    def test_quick(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folders = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs"), "--processes", "2"]
        options = ["--device", "cpu", "--quick", "--seconds", "0", "--rows", "fa2-forward", *folders]
        assert cli.main(["bench", "paper", *options]) == 0
        assert "fa2-forward" in capsys.readouterr().out
        (record,) = (tmp_path / "results").glob("*/paper/rows.json")
        assert json.loads(record.read_text())["settings"]["quick"] is True
