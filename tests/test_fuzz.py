"""The fuzzer finds mistakes that are planted, notes them once, and finds none where there are none."""

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flashtile import check
from flashtile.backends.hopper import calls
from flashtile.backends.pytorch import sweep
from tests import stubborn
from tests.fuzz import crew
from tests.fuzz import loop as fuzz
from tests.fuzz.doors import DOORS, INTERPRETED
from tests.fuzz.where import DTYPES, Where
from tests.fuzz.wrong import ARGUMENTS, WrongCall
from tests.fuzz.wrong import check as check_wrong

CPU = Where("cpu")


def _tally(door: str, monkeypatch: pytest.MonkeyPatch, cases: int = 8) -> fuzz.Tally:
    monkeypatch.setattr(fuzz, "BATCH", cases)
    tally = fuzz.Tally()
    fuzz._batch(door, 3, CPU, time.monotonic() + 600, tally, shrink=False)
    return tally


@pytest.mark.parametrize("door", DOORS)
def test_sound_calls_pass(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = _tally(door, monkeypatch)
    assert tally.cases == 8
    assert tally.failures == {}
    assert tally.refused < 8


@pytest.mark.parametrize("door", INTERPRETED)
def test_a_wrong_number_is_found(
    door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = sweep._forward_rows

    def off(*arguments: Any, **more: Any) -> Any:
        out, lse = original(*arguments, **more)
        return out * 1.001, lse

    monkeypatch.setattr(sweep, "_forward_rows", off)
    tally = _tally(door, monkeypatch, cases=20)
    assert tally.failed > 0
    assert any("out" in kind and "error #, allowed #" in kind for kind in tally.failures)
    assert len(tally.failures) <= tally.failed
    assert "FAILED (seed 3)" in capsys.readouterr().out


def test_emulated_calls_run_under_many_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under one; what looks suspicious to the emulator fails."""
    where, tally = Where("emulated"), fuzz.Tally()
    monkeypatch.setattr(fuzz, "BATCH", 3)
    fuzz._batch("dense", 2, where, time.monotonic() + 600, tally, shrink=False)
    assert (tally.cases, tally.failures) == (3, {})
    assert tally.refused < 3
    with pytest.raises(AssertionError), where.ready(True, 1):
        calls.DEVICE.launch.__self__.complaints.append("a wait is missing")  # type: ignore[attr-defined]


def test_an_error_that_is_not_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = WrongCall(packed=False, changed=(("softcap", ("object", "text")),))
    assert not check_wrong(call, CPU)
    monkeypatch.setattr(check, "softcap", lambda value: None)
    with pytest.raises(AssertionError, match=r"ValueError from request\.py"):
        check_wrong(call, CPU)


def test_every_argument_may_be_wrong() -> None:
    from flashtile.request import Arguments, Packing

    of_calls = {*Arguments._fields, *Packing._fields} - {"sharding"}
    assert set(ARGUMENTS) == of_calls | {"q", "k", "v"}


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "fuzz.json"
    monkeypatch.setattr(fuzz, "BATCH", 5)
    options = ["--seconds", "60", "--door", "evoformer", "--shrink", "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["fuzz", *options])
    assert fuzz.main() == 0
    found = json.loads(record.read_text())
    assert found["device"] == "cpu"
    assert found["processes"] == {"died": 0, "late": 0}
    assert found["doors"]["evoformer"] == {"cases": 5, "refused": 0, "failed": 0, "failures": {}}


def test_processes_that_die_and_that_do_not_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they said is known before they are ended, and nobody waits for them."""
    monkeypatch.setattr(crew, "LATE", 0.0)
    monkeypatch.setattr(crew, "PATIENCE", 0.5)
    team = crew.Crew(stubborn.work, [("works",), ("does not end",), ("dies",)])
    begin = time.monotonic()
    while team.late > 1 and time.monotonic() < begin + 60:
        team.listen(0.2)
    team.listen(0.2)
    assert team.heard == {0: "works ends", 1: "does not end at all", 2: "dies begins"}
    assert (team.late, team.died) == (1, 1)
    assert "FAILED process 2" in capsys.readouterr().out
    begin = time.monotonic()
    assert team.dismiss() == 0
    assert time.monotonic() - begin < 30


def test_an_interrupted_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "fuzz.json"
    original = fuzz._batch

    def interrupted(*arguments: Any, **more: Any) -> None:
        original(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "BATCH", 5)
    monkeypatch.setattr(fuzz, "_batch", interrupted)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--door", "evoformer", "--record", str(record)])
    assert fuzz.main() == fuzz.INTERRUPTED
    assert json.loads(record.read_text())["doors"]["evoformer"]["cases"] == 5


def test_devices_are_described() -> None:
    assert set(DTYPES) == set(fuzz.DEVICES)


def test_processes_can_import_what_they_run() -> None:
    """Under `python -m tests.fuzz` the module that was named is not `tests.fuzz`'s in them."""
    assert b"tests.fuzz.loop" in pickle.dumps(fuzz._work)
