"""What `tools/sanitize.py` makes of a tool's words; the tools themselves need a GPU."""

import ast
from pathlib import Path

import pytest

from tools import sanitize


def _line(path: str, function: str) -> int:
    """The last line of a function of the package."""
    tree = ast.parse((sanitize.ROOT / "flashtile" / path).read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert found.end_lineno is not None
    return found.end_lineno


def _race(*accesses: tuple[str, str, str]) -> str:
    """As racecheck words it; each a kind of access, a file and a function."""
    lines = [
        f"{kind} access at some_kernel+0x{index}20 in {Path(path).name}:{_line(path, function)}"
        for index, (kind, path, function) in enumerate(accesses)
    ]
    others = "".join(f"=========     and {line} [32 hazards]\n" for line in lines[1:])
    return f"========= Error: Race reported between {lines[0]}\n{others}=========\n"


READ = ("Read", "backends/hopper/schedule.py", "read")
WRITE = ("Write", "backends/hopper/schedule.py", "write")
OTHER = ("Write", "backends/hopper/loading.py", "loader")
HEADER, TESTED = "========= COMPUTE-SANITIZER\n", "18 passed in 2.00s\n"


def _summary(count: int) -> str:
    return f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n{TESTED}"


def test_what_is_explained_is_counted_and_printed() -> None:
    said, unexplained = sanitize.report("racecheck", HEADER + 2 * _race(READ, WRITE, WRITE) + _summary(2))
    assert unexplained == 0
    assert "racecheck: 2 findings, 2 told, 2 of them explained; 18 passed" in said
    assert "2 x Race reported: read in hopper/schedule.read, write in hopper/schedule.write" in said
    assert "explained: one warp writes" in said


@pytest.mark.parametrize(
    ("tool", "findings"),
    [
        ("racecheck", _race(READ, WRITE) + _race(READ, WRITE, OTHER)),
        # The same words of another tool, and what was not told.
        ("memcheck", _race(READ, WRITE)),
        ("racecheck", _race(READ, WRITE) + "========= Warning: something new in a kernel\n"),
    ],
)
def test_what_is_not_explained_is_found(tool: str, findings: str) -> None:
    count = findings.count("Error: ") + findings.count("Warning: ")
    said, unexplained = sanitize.report(tool, HEADER + findings + _summary(count))
    assert unexplained == 1
    assert f"{count} findings, {count} told, {count - 1} of them explained" in said


def test_more_than_was_told_is_not_explained() -> None:
    assert sanitize.report("racecheck", HEADER + _race(READ, WRITE) + _summary(9))[1] == 8


def test_reads_of_unset_memory_and_out_of_bounds() -> None:
    """The words of newer and of older releases; a kernel of PyTorch's has no lines."""
    joining = f"joining.py:{_line('kernels/joining.py', 'some_parts')}"
    said, unexplained = sanitize.report(
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
{TESTED}""",
    )
    assert unexplained == 2
    assert "3 findings, 3 told, 1 of them explained" in said
    assert "1 x Uninitialized __global__ memory read of size 4 bytes: joining.some_parts" in said
    assert "of size 16 bytes: void at::native::vectorized_elementwise_kernel" in said
    assert "of size 2 bytes: ThreadLoad" in said


def test_tests_that_fail_are_told() -> None:
    passed, failed = HEADER + _summary(0), HEADER + _summary(0).replace("18 passed", "2 failed, 16 passed")
    assert (sanitize.tested(passed), sanitize._passed(passed)) == ("18 passed in 2.00s", True)
    assert (sanitize.tested(failed), sanitize._passed(failed)) == ("2 failed, 16 passed in 2.00s", False)
    assert not sanitize._passed(HEADER)


def test_functions_that_are_explained_exist() -> None:
    for explained in sanitize.EXPLAINED:
        assert explained.tool in sanitize.TOOLS
        for name in explained.functions:
            module, _, function = name.rpartition(".")
            folder = "backends" if "/" in module else "kernels"
            line = _line(f"{folder}/{module}.py", function)
            assert name in sanitize.functions_at(f"{module.rpartition('/')[2]}.py", line)


def _run(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    monkeypatch.setattr("sys.argv", ["sanitize.py", *given])
    return sanitize.main()


def test_a_sanitizer_by_path_and_what_it_says_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer, told = tmp_path / "another", tmp_path / "told"
    told.write_text(HEADER + _race(READ, WRITE) + _summary(1))
    sanitizer.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Version 1.2" && exit\necho "$@"; cat {told}; exit 1\n'
    )
    sanitizer.chmod(0o755)
    logs = tmp_path / "new" / "logs"
    given = ("--sanitizer", str(sanitizer), "--logs", str(logs), "--tool", "racecheck", "--select", "none")
    assert _run(monkeypatch, *given, "--", "--kernel-name", "kns=some") == 0
    command, _, said = (logs / "racecheck.log").read_text().partition("\n")
    assert said == told.read_text()
    assert command.index("--kernel-name kns=some --tool racecheck") < command.index("pytest") < command.index("-k none")
    printed = capsys.readouterr().out
    assert "compute-sanitizer 1.2" in printed
    assert "racecheck: 1 findings, 1 told, 1 of them explained; 18 passed" in printed


def test_no_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--sanitizer", "/nowhere/sanitizer") == 2
    assert "there is no /nowhere/sanitizer here" in capsys.readouterr().out
