"""The demo: both runs compute the same, a wrong one is caught, what does not fit is computed and not run."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flashtile.bench import machine
from flashtile.demo import scaling, show, training
from flashtile.demo.model import GPT, Size, by_flashtile, by_formula
from flashtile.demo.scaling import Point, Scaling
from flashtile.demo.show import Demo
from flashtile.demo.training import TOLERANCE, Training

PNG = b"\x89PNG"
TINY = Training(size=Size(seqlen=24, layers=2, heads=2, width=32), steps=8, batch=2)
SHORT = Scaling(seqlens=(32, 64, 128), heads=2, headdim=16, seconds=1.0)


def shown(demo: Demo) -> tuple[int, str]:
    """(exit code, what was printed)."""
    text = io.StringIO()
    code = show.run(demo, Console(file=text, width=120))
    return code, text.getvalue()


def test_writes_both_plots_and_the_curves_agree(tmp_path: Path) -> None:
    code, text = shown(Demo(TINY, SHORT, tmp_path / "out"))
    assert code == 0
    assert "The curves lie on each other" in text
    assert "runs on pytorch/aten_flash" in text
    for name in ("loss.png", "scaling.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
        assert name in text
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    losses = [record["runs"][name]["losses"] for name in ("textbook", "flashtile")]
    assert [len(found) for found in losses] == [TINY.steps, TINY.steps]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= record["tolerance"]
    assert losses[0][-1] < losses[0][0]
    assert len(record["scaling"]["points"]) == 6


def test_a_wrong_attention_parts_the_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_formula(q.flip(1), k.flip(1), v.flip(1)).flip(1)

    monkeypatch.setattr(training, "by_flashtile", not_causal)
    # Seen from the end, a byte predicts itself from its successor: the loss differs once something is learnt.
    demo = Demo(replace(TINY, steps=40, rate=2e-2), replace(SHORT, seqlens=(32,)), tmp_path)
    code, text = shown(demo)
    assert code == 1
    assert "The curves part" in text


def test_nan_never_agrees() -> None:
    runs = training.train(replace(TINY, steps=2))
    assert training.agree(runs, TOLERANCE["float32"])
    runs[1].losses[-1] = float("nan")
    assert not training.agree(runs, TOLERANCE["float32"])


def test_runs_start_equal_and_see_the_same_batches() -> None:
    runs = training.train(replace(TINY, steps=5), {"a": by_formula, "b": by_formula})
    assert runs[0].losses == runs[1].losses
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_trains_too() -> None:
    runs = training.train(replace(TINY, dtype="bfloat16"))
    assert training.agree(runs, TOLERANCE["bfloat16"])


def test_training_stops_when_its_time_is_up() -> None:
    seen: list[int] = []
    runs = training.train(replace(TINY, seconds=0.0), progress=lambda step, _: seen.append(step))
    assert len(runs[0].losses) == len(seen) == training.PROBE + 2
    assert len(runs[0].seconds) == 1


@pytest.mark.parametrize("steps", [1, training.PROBE, training.PROBE + 1, training.PROBE + 2])
def test_few_steps_have_a_time(steps: int) -> None:
    runs = training.train(replace(TINY, steps=steps))
    assert all(run.ms > 0 and len(run.losses) == steps for run in runs)


def test_the_formula_takes_more_memory_a_step() -> None:
    sizes = {run.name: run.step_memory for run in training.train(replace(TINY, size=Size(256, 1, 4, 32), steps=4))}
    # The scores of one layer, once; the formula holds two or three of that size.
    assert sizes["textbook"] - sizes["flashtile"] > TINY.batch * 4 * 256 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_of_attending_are_one_function(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 33, 4, 16, dtype=dtype)
    torch.testing.assert_close(by_flashtile(q, k, v), by_formula(q, k, v))


def test_the_model_sees_no_byte_before_its_time() -> None:
    model = GPT(TINY.size, by_flashtile)
    text = torch.randint(256, (1, 20))
    changed = text.clone()
    changed[0, 12:] = 7
    torch.testing.assert_close(model(text)[:, :12], model(changed)[:, :12])


def test_the_model_writes_beyond_its_context() -> None:
    model = GPT(TINY.size, by_flashtile)
    written = model.write(torch.tensor([[65]]), 40)
    assert written.shape == (1, 41)
    assert 0 <= int(written.min()) <= int(written.max()) < 256


def test_the_corpus_is_english() -> None:
    text = bytes(training.corpus().tolist()).decode()
    assert len(text) > 300_000
    assert text.count(" the ") > 3_000


class TestScaling:
    def points(self, found: Scaling) -> dict[tuple[str, int], Point]:
        return {(point.peer, point.seqlen): point for point in scaling.measure(found)}

    def test_what_does_not_fit_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "free_memory", lambda device: int(1.5 * 2**20))
        points = self.points(replace(SHORT, seqlens=(64, 128, 256, 512)))
        last = points["textbook", 128]
        assert last.ms is not None
        for seqlen in (256, 512):
            point = points["textbook", seqlen]
            assert point.ms is None
            assert point.extra == pytest.approx(last.extra * (seqlen / 128) ** 2)
            assert point.reason.startswith("would need")
            assert points["flashtile", seqlen].ms is not None

    @pytest.mark.parametrize(("limit", "reason"), [({"seconds": 1e-9}, "over"), ({"total": 0.0}, "out of time")])
    def test_what_takes_too_long_is_not_run(self, limit: dict[str, Any], reason: str) -> None:
        points = self.points(replace(SHORT, **limit))
        assert points["flashtile", 32].ms is not None
        assert points["flashtile", 64].ms is None
        assert points["flashtile", 128].reason.startswith(reason)

    def test_tables_and_plots_take_missing_cells(self, tmp_path: Path) -> None:
        points = [Point("textbook", 32, None, 1e6, "would need 1 MiB"), Point("flashtile", 32, 2.0, 0.0)]
        assert show._scaling_table(points).row_count == 1
        assert show.plots.scaling(points, "caption", tmp_path / "plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("make", [lambda demo: demo, lambda demo: demo.quick()])
def test_sizes_for_the_cpu(make: Callable[[Demo], Demo], tmp_path: Path) -> None:
    demo = make(Demo.on("cpu", "float32", tmp_path))
    assert demo.training.size.width % demo.training.size.heads == 0
    assert demo.training.seconds + demo.scaling.total < 180
