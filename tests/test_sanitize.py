"""What `tools/sanitize.py` makes of a tool's words, and of calls; the tools themselves need a GPU."""

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import sanitized
from tools import findings, sanitize, sanitizer_tables


def _line(path: str, function: str) -> int:
    """The last line of a function of the package."""
    tree = ast.parse((sanitize.ROOT / "flashtile" / path).read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert found.end_lineno is not None
    return found.end_lineno


def _race(*accesses: tuple[str, str, str], kernel: str = "forward_kernel") -> str:
    """As racecheck words it; each a kind of access, a file and a function."""
    lines = [
        f"{kind} access at {kernel}+0x{index}20 in {Path(path).name}:{_line(path, function)}"
        for index, (kind, path, function) in enumerate(accesses)
    ]
    others = "".join(f"=========     and {line} [32 hazards]\n" for line in lines[1:])
    return f"========= Error: Race reported between {lines[0]}\n{others}=========\n"


READ = ("Read", "backends/hopper/schedule.py", "read")
WRITE = ("Write", "backends/hopper/schedule.py", "write")
OTHER = ("Write", "backends/hopper/loading.py", "loader")
HEADER = "========= COMPUTE-SANITIZER\n"
RAN = "CALL hopper:some: ran in 1.5 s, 3 pieces stored by the copy engine\nCALLS ended, on some GPU\n"


def _summary(count: int) -> str:
    return f"{RAN}========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"


def _said(tool: str, log: str) -> tuple[str, int]:
    """(what is printed, findings that are not explained)."""
    report = findings.report(tool, log)
    return "\n".join(sanitize.lines_of(tool, report, sanitize.outcome(log, 0.0, False))), report.unexplained


def test_what_is_explained_is_counted_and_printed() -> None:
    said, unexplained = _said("racecheck", HEADER + 2 * _race(READ, WRITE, WRITE) + _summary(2))
    assert unexplained == 0
    assert "racecheck: 2 findings, 2 told, 2 of them explained; 1 calls ran" in said
    assert "2 x Race reported in forward_kernel: read in hopper/schedule.read, write in hopper/schedule.write" in said
    assert "2 explained: one warp writes" in said


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        ("racecheck", _race(READ, WRITE) + _race(READ, WRITE, OTHER)),
        # The same words of another tool, of another kernel, and what has no place.
        ("memcheck", _race(READ, WRITE)),
        ("racecheck", _race(READ, WRITE) + _race(READ, WRITE, kernel="latent_kernel")),
        ("racecheck", _race(READ, WRITE) + "========= Warning: something new in a kernel\n"),
    ],
)
def test_what_is_not_explained_is_found(tool: str, told: str) -> None:
    count = told.count("Error: ") + told.count("Warning: ")
    said, unexplained = _said(tool, HEADER + told + _summary(count))
    assert unexplained == 1
    assert f"{count} findings, {count} told, {count - 1} of them explained" in said


def test_more_than_was_told_is_not_explained() -> None:
    assert _said("racecheck", HEADER + _race(READ, WRITE) + _summary(9))[1] == 8


def test_a_total_is_counted_once() -> None:
    """The tool has a second line of the same beginning, of what it did not print."""
    lines = ("21672 errors", "11672 errors were not printed. Use --print-limit option to adjust the number")
    said = "".join(f"========= ERROR SUMMARY: {line}\n" for line in lines)
    assert findings.report("initcheck", said).total == 21672
    assert findings.report("memcheck", "========= ERROR SUMMARY: 1 error\n").total == 1


def test_reads_of_unset_memory_and_out_of_bounds() -> None:
    """The words of newer and of older releases; a kernel of PyTorch's has no lines."""
    joining = f"joining.py:{_line('kernels/joining.py', 'some_parts')}"
    said, unexplained = _said(
        "initcheck",
        f"""{HEADER}========= Uninitialized __global__ memory read of size 4 bytes
=========     at combine_kernel+0x1a0 in {joining}
=========     by thread (1,0,0) in block (3,0,0)
=========     Access to 0x7f3a00 is 16 bytes after an allocation
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, float>(T1)+0xf0
=========     by thread (1,0,0) in block (3,0,0)
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at 0xa0a50 in /usr/include/cub/thread_load.cuh:272:ThreadLoad<LOAD_CG, int>
=========     by thread (30,0,0) in block (1,0,0)
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
{RAN}""",
    )
    assert unexplained == 2
    assert "3 findings, 3 told, 1 of them explained" in said
    assert "1 x Uninitialized __global__ memory read of size 4 bytes in combine_kernel: joining.some_parts" in said
    assert "of size 16 bytes: void at::native::vectorized_elementwise_kernel" in said
    assert "of size 2 bytes: ThreadLoad" in said


@pytest.mark.parametrize(("count", "explained"), [(2, 2), (3, 3), (4, 3)])
def test_reads_of_what_the_copy_engine_stored(count: int, explained: int) -> None:
    """No more of them than the calls say that there are pieces."""
    read = f"""========= Uninitialized __global__ memory read of size 16 bytes
=========     at before_kernel+0x7f0 in tiles.py:{_line("kernels/tiles.py", "load_rows")}
=========     by thread (32,0,0) in block (4,0,0)
=========     Address 0x7f8fa7e2a400
=========
"""
    said, unexplained = _said("initcheck", f"{HEADER}{count * read}{RAN}========= ERROR SUMMARY: {count} errors\n")
    assert unexplained == count - explained
    assert f"{explained} explained: the output, which the copy engine stored" in said


def test_functions_that_are_explained_exist() -> None:
    for explained in findings.EXPLAINED:
        assert explained.tool in sanitize.TOOLS
        for name in explained.functions:
            module, _, function = name.rpartition(".")
            folder = "backends" if "/" in module else "kernels"
            line = _line(f"{folder}/{module}.py", function)
            assert name in findings.functions_at(f"{module.rpartition('/')[2]}.py", line)


def test_calls_leave_no_nan_and_know_their_pieces() -> None:
    """All there are; on an H100 initcheck counted 21,672 reads of what the copy engine had stored, of these calls."""
    pieces = 0
    for name in sanitized.CALLS:
        results, stored = sanitized.run(name, "cpu", True)
        assert not any(tensor.isnan().any() for tensor in results), name
        pieces += stored
    assert pieces == 21672


def test_a_call_that_fails_or_holds_nan_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitized.tell("cache:no_such", "cpu", False).startswith("CALL cache:no_such: failed, KeyError")
    monkeypatch.setattr(sanitized, "run", lambda *_: ([torch.tensor([0.0, torch.nan])], 5))
    assert sanitized.tell("some:call", "cpu", True) == "CALL some:call: failed, ValueError: a result holds NaN"
    assert sanitized.tell("some:call", "cpu", False).endswith(" s, 0 pieces stored by the copy engine")
    monkeypatch.setattr("sys.argv", ["sanitized", "some:call", "--unwritten"])
    assert sanitized.main() == 1


MACHINE = {"gpu": "some GPU", "slug": "some-gpu", "driver": "1.0", "versions": {"torch": "2", "triton": "3"}}


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *given: str) -> tuple[int, dict[str, Any]]:
    """(exit status, record)."""
    monkeypatch.setattr(sanitize, "describe", lambda: {**MACHINE, "date": "2026-01-02T03:04:05+00:00"})
    monkeypatch.setattr("sys.argv", ["sanitize.py", "--records", str(tmp_path), *given])
    status = sanitize.main()
    path = tmp_path / "sanitizer-some-gpu.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


def _sanitizer(folder: Path, said: str, then: str = "exit 1") -> str:
    """A program that says this, after the words that it was called with."""
    path, told = folder / "another", folder / "told"
    told.write_text(said)
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Version 1.2" && exit\necho "$@"; cat {told}; {then}\n')
    path.chmod(0o755)
    return str(path)


def test_a_sanitizer_by_path_what_it_says_in_files_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer = _sanitizer(tmp_path, HEADER + _race(READ, WRITE) + _summary(1))
    logs = tmp_path / "new" / "logs"
    given = ("--sanitizer", sanitizer, "--logs", str(logs), "--tools", "racecheck", "--calls", "cache:plain")
    status, record = _run(monkeypatch, tmp_path, *given, "--", "--kernel-name", "kns=some")
    assert status == 0
    command, _, said = (logs / "racecheck.log").read_text().partition("\n")
    assert said == (tmp_path / "told").read_text()
    assert command.index("--kernel-name kns=some --tool racecheck") < command.index("-m tests.sanitized cache:plain")
    assert "CALL cache:plain: ran" in (logs / "before.log").read_text()
    printed = capsys.readouterr().out
    assert "compute-sanitizer 1.2, some GPU" in printed
    assert "racecheck: 1 findings, 1 told, 1 of them explained; 1 calls ran" in printed
    assert record["before"]["ran"] == 1
    assert record["tools"]["racecheck"]["kinds"][0]["kernel"] == "forward_kernel"
    table = sanitizer_tables.sections(tmp_path)["sanitizer"]
    assert "1 calls under compute-sanitizer 1.2, on some GPU, driver 1.0, PyTorch 2, Triton 3, 2026-01-02:" in table
    places = "read in hopper/schedule.read, write in hopper/schedule.write"
    assert f"| racecheck | 1 | 0 | 1 x Race reported of `forward_kernel` ({places}) | 1 |" in table


def test_a_tool_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it started, and what it has said is kept."""
    sanitizer = _sanitizer(tmp_path, HEADER + RAN.splitlines()[0] + "\n", "sleep 60 & sleep 60")
    monkeypatch.setattr(sanitize, "warm", lambda calls, logs, limit: sanitize.outcome(RAN, 0.0, False))
    begin = time.monotonic()
    given = ("--sanitizer", sanitizer, "--tools", "memcheck", "--calls", "hopper:some", "--limit", "1")
    status, record = _run(monkeypatch, tmp_path, *given)
    assert time.monotonic() - begin < 30
    assert status == 1
    found = record["tools"]["memcheck"]
    assert (found["cut_off"], found["ended"], found["ran"], found["findings"]) == (True, False, 1, 0)
    assert "1, then cut off" in sanitizer_tables.sections(tmp_path)["sanitizer"]


@pytest.mark.parametrize(
    "said", [HEADER, HEADER + RAN.replace("CALLS ended", ""), HEADER + "CALL a:b: failed, no\n" + RAN]
)
def test_calls_that_did_not_run_fail(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "warm", lambda calls, logs, limit: sanitize.outcome(RAN, 0.0, False))
    given = ("--sanitizer", _sanitizer(tmp_path, said), "--tools", "memcheck", "--calls", "hopper:some")
    assert _run(monkeypatch, tmp_path, *given)[0] == 1


def test_no_record_no_table(tmp_path: Path) -> None:
    assert sanitizer_tables.sections(tmp_path) == {}


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, tmp_path, "--sanitizer", "/nowhere/sanitizer") == (2, {})
    assert "there is no /nowhere/sanitizer here" in capsys.readouterr().out
