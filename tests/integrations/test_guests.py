"""`tools/guests`: the table in the docs is the record's, and cases are drawn as it says."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["run", "in_place"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "guests"))
    found = importlib.import_module(request.param)
    yield found
    for name in ("run", "in_place", "doors"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["run"], indirect=True)
def test_docs_hold_the_record(module: Any) -> None:
    record = json.loads((ROOT / "benchmarks/robustness/guests.json").read_text())
    assert set(record) == set(module.SUITES)
    assert module.table(record) in (ROOT / "docs/integrations.md").read_text()


@pytest.mark.parametrize("module", ["run"], indirect=True)
def test_every_door_is_known(module: Any) -> None:
    doors = importlib.import_module("doors")
    assert {door for suite in module.SUITES.values() for door in (suite.door, suite.none)} <= set(doors.DOORS)


@pytest.mark.parametrize("module", ["run"], indirect=True)
def test_checkouts_lie_outside(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where pytest would find the settings of this repository."""
    monkeypatch.setattr(sys, "argv", ["run.py", f"pytorch={ROOT / 'docs'}"])
    with pytest.raises(SystemExit):
        module.main()
    assert "need a checkout outside of" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["run"], indirect=True)
def test_outcomes_are_counted(module: Any) -> None:
    lines = [
        {"test": "a", "outcome": "passed", "kernels": 2, "why": ""},
        {"test": "b", "outcome": "passed", "kernels": 0, "why": ""},
        {"test": "c", "outcome": "failed", "kernels": 1, "why": "assert 1"},
        {"test": "d", "outcome": "failed", "kernels": 0, "why": "no"},
        {"test": "e", "outcome": "skipped", "kernels": 0, "why": "Skipped: no GPU"},
    ]
    found = module._counted(lines, {"d"})
    assert (found["passed"], found["with_kernels"], found["kernels"]) == (2, 1, 3)
    assert (found["failed"], found["failed_without"], found["skipped"]) == (
        {"c": "assert 1"},
        {"d": "no"},
        {"no GPU": 1},
    )


@pytest.mark.parametrize("module", ["in_place"], indirect=True)
def test_cases_are_drawn(module: Any) -> None:
    lists = [[(1,), (2,), (3,)], [("a", "b"), ("c", "d")]]
    every = list(module._drawn(lists, 6, "seed"))
    assert len(set(every)) == 6
    some = list(module._drawn(lists, 4, "seed"))
    assert len(set(some)) == 4
    assert set(some) < set(every)
    assert some == list(module._drawn(lists, 4, "seed"))
    assert [
        module._is_small(*each, 400) for each in (("seqlen_q", 400), ("seqlen_q", 401), ("d", 160), ("d", 128))
    ] == [*(True, False, False, True)]
