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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted = dict(report.user_properties)
        if report.when == "call" and report.passed and "arch" in noted:
            test = report.nodeid.removeprefix("tests/amd/").replace(".py::", " ")
            self.config.stash[_REPORTS].append({"test": test, **noted})
        elif report.failed:
            self.config.stash[_REPORTS].append({"test": report.nodeid, "failed": report.when})

    def pytest_sessionfinish(self) -> None:
        path, reports = self.config.getoption("--record"), self.config.stash[_REPORTS]
        if path is None or not reports or hasattr(self.config, "workerinput"):
            return
        versions = {name: version(name) for name in ("triton", "torch", "numpy")}
        failed = {report["test"] for report in reports if "failed" in report}
        before = json.loads(path.read_text())["tests"] if path.exists() else []
        tests = {one["test"]: one for one in (*before, *reports) if "failed" not in one}
        record = {
            "executed": "in emulation, not on hardware",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions | {"python": platform.python_version()},
            "failed": sorted(failed),
            "tests": [tests[name] for name in sorted(tests)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
