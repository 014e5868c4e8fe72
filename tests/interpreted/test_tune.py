"""The search for tiles, on a few candidates in the interpreter: its times mean nothing here, its gate does."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashtile.bench import show, tune
from flashtile.tuning.portable import PortableConfig, Tiles

FEW = (Tiles(32, 32, 4, 2), Tiles(32, 64, 4, 2))


def test_search_writes_and_prints_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "REPEATS", 1)
    console = Console(record=True, width=200)
    search = tune.Search(16, "single", "cpu", tokens=40, heads=1, only=FEW[:1])
    assert show.tune([search], tmp_path, console) == 0
    assert "(16, PortableConfig(Tiles(32, " in console.export_text()
    assert len(list(tmp_path.glob("*/tuning/single-16.json"))) == 1


def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tune.Call.run

    def wrong(self: tune.Call, config: PortableConfig, *rest: object) -> tuple[torch.Tensor, ...]:
        found = right(self, config)
        return tuple(tensor * (1.01 if config.query.tile_kv == 64 else 1.0) for tensor in found)

    monkeypatch.setattr(tune.Call, "run", wrong)
    monkeypatch.setattr(tune.Call, "milliseconds", lambda self, role, config: 1.0 / config.query.tile_kv)
    search = tune.Search(16, "single", "cpu", tokens=70, heads=1, only=FEW)
    first, second = search.run(lambda text: None)["query"]
    assert (first.tiles, first.reason) == (FEW[0], "")
    assert second.ms is None
    assert "error" in second.reason
