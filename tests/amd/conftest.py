"""`--record FILE` writes down which tests passed, on which GPU, and how long they took; those of other runs stay."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_REPORTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what ran in emulation to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORTS] = []
    config.pluginmanager.register(_Recorder(config), "amd-recorder")


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What ran is noted by the end of a test's teardown; a run that is stopped keeps what passed."""
        path, reports = self.config.getoption("--record"), self.config.stash[_REPORTS]
        if path is None or hasattr(self.config, "workerinput"):
            return
        test, noted = report.nodeid.removeprefix("tests/amd/").replace(".py::", " "), dict(report.user_properties)
        if report.failed:
            reports.append({"test": test, "failed": report.when})
        elif report.when == "call" and report.passed:
            self.passed.add(test)
        elif report.when == "teardown" and test in self.passed and "arch" in noted:
            reports.append({"test": test, **noted})
        if report.when == "teardown" and reports:
            write(path, reports)


def write(path: Path, reports: list[dict[str, Any]]) -> None:
    """Adds these to what the file holds."""
    versions = {name: version(name) for name in ("triton", "torch", "numpy")}
    before = json.loads(path.read_text())["tests"] if path.exists() else []
    failed = {report["test"] for report in reports if "failed" in report}
    tests = {one["test"]: one for one in (*before, *reports) if one["test"] not in failed}
    record = {
        "executed": "in emulation, not on hardware",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions | {"python": platform.python_version()},
        "failed": sorted(failed),
        "tests": [tests[name] for name in sorted(tests)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
